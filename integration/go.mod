module usher.dev/usher/integration

go 1.26.0

require usher.dev/usher v0.0.0

replace usher.dev/usher => ../
