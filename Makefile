# Needs only make and Python 3.10 or newer. Everything is installed into $(VENV), from the package index that pip uses.

PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 7860
# Test processes, one more than two cores, since many tests wait for a server or a browser; each computes on one thread,
# so that they do not fight for cores. A file's tests stay in one of them: what several tests share (training runs, an
# installed wheel, a server) would be made in each.
JOBS ?= 3
PYTEST_ARGS ?=
# Those that need neither data nor a browser; the others say in their --help what they take.
BENCHMARKS ?= collection_speed pair_cost training_speed

python := $(VENV)/bin/python
pip_install := $(python) -m pip install --disable-pip-version-check --no-input -c constraints.txt
demo_stamp := $(VENV)/.installed-demo
dev_stamp := $(VENV)/.installed-dev

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo install hooks test lint typecheck benchmark clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(demo_stamp) ## Install what the app needs and serve it on http://127.0.0.1:7860 (PORT=... for another port)
	$(python) app.py --host $(HOST) --port $(PORT)

install: $(dev_stamp) ## Install the package with everything for development

hooks: $(dev_stamp) ## Run `make lint` on each git commit and `make typecheck` on each push
	$(python) -m pre_commit install --hook-type pre-commit --hook-type pre-push

test: lint typecheck ## Check style and types, then run the tests (PYTEST_ARGS="-k name" for some of them)
	OMP_NUM_THREADS=1 $(python) -m pytest -n $(JOBS) --dist loadfile --durations=25 $(PYTEST_ARGS)

lint: $(dev_stamp) ## Check style, formatting, the demo's JavaScript and CSS, and which folder may import which
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(VENV)/bin/lint-imports
	@if [ -x $(VENV)/bin/biome ]; then $(VENV)/bin/biome lint --error-on-warnings macosnet_hf/demo/assets; \
		else echo "biome has no wheel for this machine: the demo's JavaScript and CSS are not checked."; fi

typecheck: $(dev_stamp) ## Check the types of the package
	$(python) -m mypy

benchmark: $(dev_stamp) ## Print the speed of pairs, collections and training beside the published flow (ten minutes)
	@set -e; for script in $(BENCHMARKS); do echo "== benchmarks/$$script.py"; $(python) "benchmarks/$$script.py"; done

clean: ## Remove caches and build products
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## The same, and remove the environment too
	rm -rf $(VENV)

# A stamp is written last, so an install that was interrupted is done again.
$(demo_stamp): pyproject.toml constraints.txt
	$(ensure_venv)
	@echo "Installing the demo into $(VENV) (the first time this downloads PyTorch and takes minutes) ..."
	$(pip_install) -e ".[demo]"
	@touch $@

$(dev_stamp): pyproject.toml constraints.txt
	$(ensure_venv)
	@echo "Installing the development tools into $(VENV) (the first time this downloads PyTorch and takes minutes) ..."
	$(pip_install) -e ".[dev,browser]"
	@touch $(demo_stamp) $@

# Makes $(VENV) where there is none that runs, and gives pip to one that was interrupted before it had it.
define ensure_venv
@$(python) -c "" 2>/dev/null || { \
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" \
		|| { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }; \
	$(PYTHON) -m venv --clear $(VENV) \
		|| { rm -rf $(VENV); echo "Could not make $(VENV). On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; }
@$(python) -m pip --version >/dev/null 2>&1 || $(python) -m ensurepip --upgrade
endef
