# Two commands do everything on a fresh machine: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-long lint docs bench bench-full clean

demo: $(READY)
	$(BIN)/secateur run digits-sdprun --out runs/digits-sdprun
	$(BIN)/secateur run digits-taylor --out runs/digits-taylor

# two processes with a thread each: libraries that start more get in each other's way
test test-long: export OMP_NUM_THREADS = 1
test test-long: export OPENBLAS_NUM_THREADS = 1
test test-long: export MKL_NUM_THREADS = 1

test: lint
	$(BIN)/python -m pytest -n 2

# the same with 10,000 random networks and everything that takes minutes
test-long: lint
	SECATEUR_NETWORKS=10000 $(BIN)/python -m pytest -n 2 -m "slow or not slow"

lint: $(READY)
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(READY)
	$(BIN)/mkdocs build

# a quarter of an hour on two cores; all of them take days, and go on where they were
bench bench-full: $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python bench/run.py $(if $(filter bench-full,$@),--full)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs site build dist src/*.egg-info
