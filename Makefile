# Every target works on a fresh clone: it makes .venv, installs the versions of constraints.txt, and runs.
PYTHON ?= python3
ARGS ?=
TESTERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint bench install
.DELETE_ON_ERROR:

demo: $(INSTALLED)  ## make a pool, curate it, show what was kept
	$(BIN)/python -m jobs.demo $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -rs -n $(TESTERS) --dist loadfile --durations=25 -m 'not alone' $(ARGS); code=$$?; test $$code -eq 0 -o $$code -eq 5
	$(BIN)/python -m pytest -q -rs --durations=5 -m alone $(ARGS); code=$$?; test $$code -eq 0 -o $$code -eq 5  # 5: none of the tests asked for

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(INSTALLED)
	$(BIN)/python -m jobs.benchmark $(or $(NAMES),embed) $(ARGS)

install: $(INSTALLED)

# The interpreter is checked where it matters: the one in .venv if there is one already, else the one that will make it.
$(INSTALLED): pyproject.toml constraints.txt
	@python=$(BIN)/python; test -x $$python || python=$(PYTHON); \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' || { \
	  echo "curation needs Python 3.11 or 3.12, but $$python is: $$($$python --version 2>&1)." >&2; \
	  echo "Choose another one: make PYTHON=python3.12 $(or $(MAKECMDGOALS),demo) (remove .venv first if it exists)." >&2; \
	  exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (once; several GB, some minutes) ..."
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,dev,bench]'
	@touch $@
