module usher.dev/usher

go 1.26.0
