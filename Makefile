# On a fresh Debian 12 with Rust, as root: `make demo` and `make test` install what they need and do everything.

CARGO ?= cargo
# Threads of the test runner: the tests start trees of processes of their own.
TEST_THREADS ?= 2

export SNAPBACK_STRICT = 1

.PHONY: demo test build release bench lint deps fixtures clean

## start Redis in a container, checkpoint it, wreck it, roll it back
demo: release
	fixtures/demo.sh target/release/snapback

## unit and integration tests; what can't be tested is a failure
test: deps fixtures
	$(CARGO) test --no-fail-fast -- --test-threads=$(TEST_THREADS)

build: deps
	$(CARGO) build

release: deps
	$(CARGO) build --release

## the measurements of docs/, printed as tables
bench: deps fixtures
	$(CARGO) bench

## formatting, clippy, documentation, and licences if cargo-deny is installed; warnings are errors
lint: deps
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --no-deps
	if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny check; fi

## packages of the machine that the build and the tests need
deps:
	@fixtures/deps.sh

## the programs that the tests roll back
fixtures: deps
	@$(MAKE) --no-print-directory --silent -C fixtures

clean:
	$(CARGO) clean
	@$(MAKE) --no-print-directory --silent -C fixtures clean
