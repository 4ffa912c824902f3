# On a fresh machine: `make demo`, `make test`. The first call builds .venv; it is rebuilt when the pins change.
# pip is taken as configured: to choose the build of torch (CPU, CUDA), set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEMO_TIMEOUT_S ?= 600
TEST_TIMEOUT_S ?= 3600
TEST_WORKERS ?= 2
BENCH_TIMEOUT_S ?= 3600

.PHONY: demo test bench lint clean

demo: $(STAMP)
	OMP_NUM_THREADS=1 timeout -k 10 $(DEMO_TIMEOUT_S) \
		$(PY) -m torch.distributed.run --standalone --nproc-per-node 2 examples/train_gpt.py

# One thread a process: threads of several workers that wait for each other by spinning take each other's cores.
test: lint
	OMP_NUM_THREADS=1 timeout -k 10 $(TEST_TIMEOUT_S) $(PY) -m pytest -q --durations=15 -n $(TEST_WORKERS) --dist loadfile

bench: $(STAMP)
	timeout -k 10 $(BENCH_TIMEOUT_S) $(PY) tests/benchmarks/compare.py

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# torch first and alone: nothing after it may choose another build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# Leaves .venv, which takes minutes to build again.
clean:
	rm -rf build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
