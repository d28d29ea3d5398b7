# The few commands that everybody needs. Each installs what it needs, or says the one command that does.

CARGO ?= cargo
CASE ?=
TARGET := $(or $(CARGO_TARGET_DIR),target)
FUZZ_SECONDS ?= 60
# cargo-nextest shows each test alone and in parallel; plain `cargo test` runs the same tests.
NEXTEST := $(shell $(CARGO) nextest --version >/dev/null 2>&1 && echo yes)

.PHONY: demo test lint bench fuzz coverage peers clean

demo:
	$(CARGO) build --locked --release -p hub -p agent -p nbd-server
	scripts/demo.sh

peers:
	scripts/install-peers.sh

test: peers
	$(CARGO) build --locked --workspace --bins
ifeq ($(NEXTEST),yes)
	$(CARGO) nextest run --locked --workspace
	$(CARGO) test --locked --workspace --doc
else
	$(CARGO) test --locked --workspace
endif

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --locked -p nbd-server --no-default-features --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked -p nbd-server --no-default-features --no-deps
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked -p nbd-server --no-default-features --features client --no-deps

bench: peers
	$(CARGO) build --locked --release -p nbd-server -p benches
	$(TARGET)/release/compare $(if $(CASE),--case $(CASE))

fuzz:
	scripts/fuzz.sh $(FUZZ_SECONDS)

# Needs `cargo install --locked cargo-llvm-cov` and `rustup component add llvm-tools`.
coverage: peers
	$(CARGO) build --locked -p qcow2-program
	$(CARGO) llvm-cov nextest --locked -p qcow2 -p block --all-features --summary-only

clean:
	$(CARGO) clean
	rm -rf demo bench-results
