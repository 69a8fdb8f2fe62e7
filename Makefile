# make demo   set up a virtual environment and run the main job on the model and data that ship with the package
# make test   the same with the development tools: ruff, mypy, pytest
# Another interpreter: make demo PYTHON=python3.13

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Tests run side by side, one for each core: more threads within each would only be in the way.
PARALLEL := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: demo test test-all clean

demo: $(VENV)/.installed
	$(BIN)/pot-sparsity demo

test: $(VENV)/.dev-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PARALLEL) $(BIN)/pytest -n auto --dist worksteal

test-all: $(VENV)/.dev-installed
	$(BIN)/pytest -m ""

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("pot-sparsity needs Python 3.11 or newer, this is %d.%d; name another one: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev-installed: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist pot_sparsity.egg-info pot-sparsity-demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
