SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build demo test test-unit test-integration test-faults test-conformance test-traefik check fmt cluster cluster-down bench bench-rollout soak clean deps

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS := -s -w -X main.version=$(VERSION)
# gRPC's request tracing, which nothing here shows, is a sixth of the agent's binary.
TAGS    := grpcnotrace
MODULES := . integration integration/cluster/pins/kubernetes integration/cluster/pins/etcd \
           integration/conformance integration/conformance/traefik tools
CODE    := . integration integration/conformance
LINT    := go tool -modfile=$(CURDIR)/tools/go.mod staticcheck

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build bin/usher-agent, bin/usher-prestop and bin/usherctl
	CGO_ENABLED=0 go build -trimpath -tags $(TAGS) -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

demo: ## Watch a rolling update lose nothing, on a real Kubernetes (root; KEEP=1 leaves all up)
	@cd integration && go run ./cmd/demo $(if $(KEEP),--keep)

test: test-unit test-conformance test-integration ## Run all tests but Traefik's: unit, real readers, a real etcd, end to end on a real Kubernetes

test-unit: deps ## Run the unit tests
	go test -race ./...

# These build and run programs that they don't import, so go's cache would call them passed whatever has become of those.
test-integration: deps ## Run the tests on a real etcd and, as root, on a real Kubernetes
	@[ $$(id -u) = 0 ] || echo 'The tests on a real Kubernetes are left out: they need root.'
	cd integration && go test -race -count 1 -p 1 -timeout 30m ./...

test-conformance: deps ## Run the tests with the real readers of the record formats, and show how long they lag
	cd integration/conformance && go test -race -v .

test-traefik: ## Run the tests with a real Traefik (its first build takes 5 to 10 minutes on two cores)
	cd integration/conformance && go test -v -timeout 30m ./proxy

test-faults: deps ## Run the faults of etcd, network, credentials and the agent alone, and print their table
	cd integration/faults && go test -race -count 1 -timeout 20m

check: ## Check format, vet, lint, go.mod files and the import rules
	@out=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$out" ] || { echo "gofmt would change:"; echo "$$out"; exit 1; }
	@for m in $(CODE); do echo "vet and lint: $$m"; (cd $$m && go vet ./... && $(LINT) ./...); done
	@for m in $(MODULES); do echo "tidy: $$m"; (cd $$m && go mod tidy -diff); done
	go test -run 'Import|GlobalState' .

fmt: ## Format the code
	gofmt -w $$(git ls-files '*.go')

cluster: ## Bring a real Kubernetes and a registry up, and print how to use them (root)
	@cd integration && go run ./cmd/cluster up

cluster-down: ## Take that cluster down
	@cd integration && go run ./cmd/cluster down

bench: ## Measure what Usher adds and costs, and print README's table of figures (root)
	@cd integration && go run ./cmd/bench

bench-rollout: ## Compare what rolling updates lose: without a hook, with sleeps, with Usher; and draw docs/rollout.svg (root)
	@cd integration && go run ./cmd/bench-rollout --svg ../docs/rollout.svg

soak: ## Replace pods under load, 30 times and more, and lose nothing (root; ROLLOUTS=N)
	@cd integration && go run ./cmd/soak $(if $(ROLLOUTS),--rollouts $(ROLLOUTS))

clean: ## Remove the programs that were built
	rm -rf bin

# The race detector needs a C compiler.
deps:
	@command -v gcc >/dev/null || { [ $$(id -u) = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev; } \
		|| { echo 'gcc is missing: install it, or run this as root on Debian' >&2; exit 1; }
