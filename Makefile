# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
BROKER ?= nats
# Test processes: most of a test is waiting, so two for each core.
JOBS ?= 4

.PHONY: demo test lint bench soak clean

demo: .venv/.core  ## the content pipeline on an embedded NATS server, told step by step
	@$(BIN)/python examples/content-pipeline/demo.py

test: .venv/.dev lint  ## everything; installs what it needs
	@bash tests/servers/install.sh
	$(BIN)/python -m pytest -m "not soak" -n $(JOBS) || { \
	    [ $$? -eq 1 ] && echo "== once more, by itself: what failed beside others; it must pass now" && \
	    $(BIN)/python -m pytest -m "not soak" --last-failed --last-failed-no-failures none; }

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.bench  ## make bench BROKER=nats|kafka|redis: ours, the hand-written loop and FastStream, as ratios
	@bash tests/servers/install.sh
	$(BIN)/python -m benchmarks --broker $(BROKER)

soak: .venv/.dev  ## the long fault runs
	@bash tests/servers/install.sh
	$(BIN)/python -m pytest -m soak

clean:
	rm -rf .venv .cache build dist

.venv/.core: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/.dev: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ .venv/.core

.venv/.bench: .venv/.dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@
