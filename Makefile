# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: two spinning thread pools on a small machine cost more than they give.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test soak hard lint types clean
.DELETE_ON_ERROR:

$(VENV)/.installed: pyproject.toml constraints.txt deploy/packaging.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "offbeat needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## a fleet with a straggler, then a network; tables, and pictures in runs
	$(BIN)/offbeat run examples/stragglers.toml --out runs/demo --overwrite
	$(BIN)/offbeat run examples/gossip.toml --out runs/demo-gossip --overwrite

FAST := $(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not soak"

test: $(VENV)/.installed  ## the fast suite
	$(FAST)

soak: $(VENV)/.installed  ## the long suite, by hand; then the fast one as it is hardest
	$(BIN)/python -m pytest -q -m soak
	$(MAKE) hard

hard: $(VENV)/.installed  ## the fast suite in any order, SIGINT ignored, beside two that burn
	trap '' INT; yes > /dev/null & first=$$!; yes > /dev/null & trap "kill $$first $$!" EXIT; \
	$(FAST) -p randomly

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy -p offbeat

clean:
	rm -rf $(VENV) build dist
