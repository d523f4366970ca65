VENV := .venv
STAMP := $(VENV)/.installed
PYTHON ?= python3

.PHONY: install demo test lint docs

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev,docs,interpreter,train]'
	touch $@

demo: install
	$(VENV)/bin/sparsekv demo

test: install
	$(VENV)/bin/pytest -n 2

lint: install
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

docs: install
	$(VENV)/bin/mkdocs build --strict
