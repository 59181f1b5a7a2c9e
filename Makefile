# `make train` and `make test` each work on a clean clone: they make .venv when it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: train train-full test check bench ui clean help

help:  ## what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 14

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; try make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	# torch first and by its exact version, so that no other package asks for another build of it.
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock \
		"$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock \
		--editable '.[dev]'
	@touch $@

train: $(STAMP)  ## the main job on real traffic data, 2 epochs of 300 steps: minutes on a CPU
	$(BIN)/python -m expt +memory=lite experiment=probe

train-full: $(STAMP)  ## the main job with whole epochs, until validation stops improving
	$(BIN)/python -m expt +memory=lite

test: $(STAMP)  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal

check: $(STAMP)  ## style, types, layers
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

bench: $(STAMP)  ## the measurements under benchmarks/, resumable: hours on a CPU
	for name in memory monitor memory_timeline prediction clips vla ranks traps arithmetic allocation techniques attention speed shared_cores sweep sweep_race sweep_faults sweep_overhead accuracy peers; do $(BIN)/python benchmarks/$$name.py || exit 1; done

ui: $(STAMP)  ## the MLflow UI on http://127.0.0.1:5000
	$(BIN)/mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db --host 127.0.0.1 --port 5000

clean:  ## remove the environment and caches; outputs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
