# `make train` and `make test` set everything up by themselves, given Python 3.11 or newer and make.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: train test slurm notebooks check format clean

train: $(READY) ## the sample corpus: prepare, train, evaluate, export
	$(BIN)/align-train prepare
	$(BIN)/align-train train exams=none export=false
	$(BIN)/align-train evaluate checkpoint=outputs/sample
	$(BIN)/align-train export checkpoint=outputs/sample

test: $(READY) ## run the tests
	$(BIN)/pytest --numprocesses 2 --dist loadfile

slurm: $(READY) ## run the tests on a Slurm cluster that they start on this machine; for root, with Slurm installed
	$(BIN)/pytest tests/slurm -rs --numprocesses 2 --dist loadfile

notebooks: $(READY) ## run the notebooks from the first cell to the last
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python notebooks/execute.py

check: $(READY) ## lint, format, types, import floors
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## put the code into its format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove the environment and what was built; outputs/ and shards/ stay
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or name it with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)
