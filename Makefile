# Needs python3 (3.11 or later), pip and make; gcc builds the CPU kernel, and without it everything still runs, slower.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTHON_VERSION ?= 3.12
BIN := $(VENV)/bin
READY := $(VENV)/.volo-ready
WEB := $(VENV)/web
CONSTRAINTS := constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup browser test test-slow test-lowest lint format demo constraints wheels clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(READY) ## .venv with pinned versions and this package, installed editable

# uv is several times faster than pip, but nothing depends on it. Compiled once here, since where PYTHONDONTWRITEBYTECODE is
# set each of the tests' processes would compile torch, scipy and timm anew.
$(READY): pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "volo needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
	  echo "python3 -m venv is incomplete here; filling the environment with the outer pip"; \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	@$(BIN)/python -m pip install -q -c $(CONSTRAINTS) uv || echo "uv cannot be had; going on with pip"
	@{ test -x $(BIN)/uv && $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -c $(CONSTRAINTS) -e '.[dev]'; } \
	  || $(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

# Both are needed by tests alone: ONNX Runtime Web goes into the page, Chromium opens it. The newest Chromium of that package
# asks for a newer Node than is widespread, in its scripts, which are not used.
$(WEB)/browser/chromium: tests/get_browser.mjs
	@command -v npm > /dev/null || { echo "the tests of the page need npm and node, which are not here; they will be skipped"; exit 1; }
	npm install --prefix $(WEB) --no-audit --no-fund --ignore-scripts --loglevel=error onnxruntime-web@1.30.0 @sparticuz/chromium@153.0.0
	node tests/get_browser.mjs $(WEB)
	@touch $@

browser: setup $(WEB)/browser/chromium ## a browser and ONNX Runtime Web for the tests of the page, in .venv/web

test: setup lint ## lint, then all tests but the slow ones
	-@$(MAKE) --no-print-directory browser
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-slow: setup ## the tests that take minutes
	-@$(MAKE) --no-print-directory browser
	$(BIN)/python -m pytest -m slow

# Bounds become versions: torch>=2.11 means torch 2.11 with whatever follows a further dot.
test-lowest: ## all tests but the slow ones with the oldest torch, torchvision and timm, in .venv-lowest
	@mkdir -p build
	sed -nE 's/^ *"(torch|torchvision|timm)>=([0-9.]+)",$$/\1==\2.*/p' pyproject.toml > build/lowest.txt
	@$(MAKE) --no-print-directory setup VENV=$(VENV)-lowest CONSTRAINTS=build/lowest.txt
	$(VENV)-lowest/bin/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: setup ## train on handwritten digits, then name digits that were held out
	$(BIN)/volo train recipes/digits.toml --out runs/digits --overwrite
	rm -rf runs/digits/held_out
	$(BIN)/python examples/held_out_pictures.py runs/digits runs/digits/held_out
	$(BIN)/volo predict runs/digits runs/digits/held_out --sheet runs/digits/predictions.png
	@echo "Pictures to look at: runs/digits/predictions.png, runs/digits/curves.png, runs/digits/confusion.png"

# Without the extras of phones, of which litert would pin a typing_extensions of 2024 for everything.
constraints: setup ## bring constraints.txt in line with pyproject.toml; pins that still fit stay
	printf 'setuptools\nuv\n' | $(BIN)/uv pip compile pyproject.toml - --extra dev --extra quantize --universal \
	  --python-version 3.11 --no-header --no-annotate --quiet --output-file constraints.txt

# Everything else that the commands import comes with torch, torchvision and timm, or is only needed for some of them.
wheels: setup ## what a machine without a network lacks, for its Python (PYTHON_VERSION=3.12), in build/wheels
	rm -rf build/wheels
	$(BIN)/python -m pip download -q --only-binary=:all: --python-version $(PYTHON_VERSION) -c $(CONSTRAINTS) -d build/wheels tyro
	@ls build/wheels

clean: ## remove caches and build outputs; .venv and runs/ stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage* htmlcov
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
