# make demo, make test and make lint each set up their own virtual environment when there is none.
# PIP_ARGS goes to pip, for example a package index with CPU builds of torch.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin

.PHONY: demo test lint nightly clean

demo: $(VENV)/ready
	$(BIN)/draftproof demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -m correctness -n 2 --dist worksteal

nightly: $(VENV)/ready
	$(BIN)/draftproof check --profile nightly

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) reports/out runs
