# Everything runs in a virtual environment inside this folder, made when it is first needed. `make help` lists it all.
#
# Which torch it gets:
#   make test TORCH="torch==2.9.1"                      the one you name; options of `pip install` may follow
#   python3 can import torch 2.5 or later               that one, shared with the new environment, not copied
#   there is a GPU                                      one that fits the driver
#   otherwise                                           the CPU version in requirements/cpu.txt

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
RECIPE := recipes/digits.yaml
# Most tests wait for processes of their own; they go to as many workers as there are cores, four at most.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist worksteal

export TORCH
# uv does not read pip's settings.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.DEFAULT_GOAL := help
.PHONY: help demo test lint types check test-full bench clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## train a small classifier in 4 stages on the CPU; needs no account and no network
	$(BIN)/cpipe fit --config $(RECIPE)

test: $(READY) ## run the tests; for some of them: make test ARGS="-k schedule"
	$(BIN)/python -m pytest -m "not full" $(SIDE_BY_SIDE) $(ARGS)

lint: $(READY) ## check style and format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(READY) ## check types
	$(BIN)/python -m mypy

check: lint types test ## lint, types and test

test-full: $(READY) ## run every test, and write tests/last_full_run.json
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --junitxml=$(VENV)/full_run.xml $(ARGS); status=$$?; \
	$(BIN)/python -c "$$RECORD" $(VENV)/full_run.xml && exit $$status

bench: $(READY) ## measure speed against other schedules; takes long, wants a quiet machine
	mkdir -p benchmarks/results
	$(BIN)/python -m benchmarks.steady_state --output benchmarks/results/steady_state.json $(ARGS)

clean: ## remove the virtual environment and all caches; keeps runs/
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

# ---- the virtual environment ----

# Another TORCH than last time: install again.
ifneq ($(TORCH),)
ifneq ($(TORCH),$(shell cat $(READY) 2>/dev/null))
.PHONY: $(READY)
endif
endif

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no $(PYTHON) here. Install Python 3.10 or later," \
	    "or name one: make demo PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo "$(PYTHON) does not run," \
	    "or is older than 3.10. Name another one: make demo PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Making $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv "$(VENV)" || { echo "$(PYTHON) can't make virtual environments." \
	    "On Debian and Ubuntu: apt install python3-venv" >&2; rm -rf "$(VENV)"; exit 1; }

$(READY): pyproject.toml requirements/cpu.txt | $(BIN)/python
	@set -e; \
	packages() { site=$$("$(BIN)/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))"); }; \
	add() { \
	    command -v uv >/dev/null || [ -x "$(BIN)/uv" ] || "$(BIN)/python" -m pip install --quiet uv || true; \
	    PATH="$$PATH:$(BIN)" uv pip install --python "$(BIN)/python" "$$@" || { \
	        echo "uv could not do that; trying pip, which takes longer."; "$(BIN)/python" -m pip install "$$@"; }; }; \
	packages; rm -f "$$site/torch_of_yours.pth"; \
	if [ -n "$$TORCH" ]; then \
	    echo "Installing $$TORCH and the rest"; add $$TORCH; add -e ".[test]"; \
	elif yours=$$("$(PYTHON)" -c "$$FIND_TORCH" 2>/dev/null) && echo "$$yours" >"$$site/torch_of_yours.pth" \
	    && "$(BIN)/python" -c "import torch" 2>/dev/null; then \
	    echo "Using the torch in $$yours"; "$(BIN)/python" -m pip install -e ".[test]"; \
	elif rm -f "$$site/torch_of_yours.pth"; nvidia-smi -L >/dev/null 2>&1; then \
	    echo "There is a GPU: installing torch for it"; \
	    export UV_TORCH_BACKEND=$${UV_TORCH_BACKEND:-auto}; add -e ".[test]"; \
	else \
	    echo "Installing torch for the CPU"; \
	    if [ -z "$$UV_FIND_LINKS" ]; then export UV_TORCH_BACKEND=$${UV_TORCH_BACKEND:-cpu}; fi; \
	    add -c requirements/cpu.txt -e ".[test]"; \
	fi
	@# The first import writes bytecode, without which every process would compile torch and Lightning anew.
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c "import sys, torch, lightning.pytorch.cli, matplotlib.pyplot, wandb; \
	    print('Ready: Python', sys.version.split()[0], 'and torch', torch.__version__)"
	@echo "$$TORCH" >$(READY)

define FIND_TORCH
import pathlib, torch
assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5)
print(pathlib.Path(torch.__file__).parents[1])
endef
export FIND_TORCH

define RECORD
import datetime, json, os, platform, sys
from importlib.metadata import version
from xml.etree import ElementTree

suite = ElementTree.parse(sys.argv[1]).find("testsuite")
counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
record = {
    "date": datetime.date.today().isoformat(),
    "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"],
    **{name: counts[name] for name in ("failures", "errors", "skipped")},
    "seconds": round(float(suite.get("time"))),
    "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    "versions": {"python": platform.python_version()}
    | {name: version(name) for name in ("lightning-cpipe", "torch", "lightning", "wandb")},
}
with open("tests/last_full_run.json", "w") as file:
    file.write(json.dumps(record, indent=2) + "\n")
print("wrote tests/last_full_run.json")
endef
export RECORD
