# `make quickstart` and `make test` set up everything they need on a fresh clone; a second run reuses what is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Arguments for pip, e.g. PIP_ARGS="--index-url …" for a CPU build of torch
PIP_ARGS ?=
# CUDA=12 or CUDA=13: the versions of constraints/ for that CUDA, see docs/gpu.md
CUDA ?=
PY = $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])')
CONSTRAINTS = $(if $(CUDA),constraints/$(PY)-cu$(CUDA).txt,constraints.txt)
DATA := data/kjv

.PHONY: quickstart compare docs test-fast test test-all test-long test-gpu gpu mutants golden traces lint setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "bitlm: Python 3.11 or newer is needed: set PYTHON=…" >&2; exit 2; }
	@echo "setting up $(VENV): a few minutes; 3 GB with a CPU build of torch, 8 GB with that for CUDA"
	@mkdir -p build
	@# a torch for CUDA that $(PYTHON) has, e.g. in a container, is kept if it fits
	$(PYTHON) constraints/keep_torch.py $(CONSTRAINTS) > build/constraints.txt
	$(PYTHON) -m venv $$(grep -q '^# keeps' build/constraints.txt && echo --system-site-packages) $(VENV)
	$(BIN)/pip install --quiet --progress-bar off -c build/constraints.txt $(PIP_ARGS) -e '.[dev]'
	@touch $@

$(DATA)/manifest.json: $(STAMP)
	$(BIN)/bitlm prep data_prep/sample/kjv.jsonl.zst --tokenizer bpe:4096 --out $(DATA)

# The scores over training are those of a few sequences; `eval` scores the whole validation split.
quickstart: $(DATA)/manifest.json
	$(BIN)/bitlm train quickstart
	$(BIN)/bitlm generate runs/quickstart --prompt "And God said" --blocks 48
	$(BIN)/bitlm eval runs/quickstart --evaluation.num_sequences 0
	$(BIN)/bitlm compare runs/quickstart --plot runs/quickstart/curve.svg
	@echo
	@echo "The curve is in runs/quickstart/curve.svg. What next (after: source $(BIN)/activate)"
	@echo "  your own text:       bitlm prep my.txt --tokenizer bpe:4096 --out data/mine"
	@echo "                       bitlm train quickstart --data.path data/mine --run.dir runs/mine"
	@echo "  another block size:  bitlm train quickstart --model.block_size 1 --run.dir runs/m1 --evaluation.num_sequences 0"
	@echo "                       bitlm compare runs/quickstart runs/m1"
	@echo "  what can be set:     bitlm config"

# The same model one token at a time, and as a softmax, beside quickstart's; one table and one plot.
# As many sequences of other blocks hold other text, so only scores of the whole split can be compared.
WHOLE := --evaluation.num_sequences 0
compare: $(DATA)/manifest.json
	$(BIN)/bitlm train quickstart
	$(BIN)/bitlm eval runs/quickstart $(WHOLE)
	$(BIN)/bitlm train quickstart --run.dir runs/compare/m1 --model.block_size 1 $(WHOLE)
	$(BIN)/bitlm train quickstart --run.dir runs/compare/softmax --model.output softmax $(WHOLE)
	$(BIN)/bitlm compare runs/compare/softmax runs/compare/m1 runs/quickstart --plot runs/compare/compare.svg

# The pages that are generated from the code
docs: $(STAMP)
	$(BIN)/bitlm config --docs > docs/config.md
	$(BIN)/python -m typer bitlm_dist.cli utils docs --name bitlm --title "Command line" --output docs/cli.md
	$(BIN)/python docs/overview.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell bitlm_dist kernels data_prep launch configs experiments docs *.md
	$(BIN)/mypy bitlm_dist experiments

# Three rings of tests, each about ten times as dear as the one before; what is longer still is test-long
PYTEST := $(BIN)/python -m pytest
MEGATRON := 0.19.2  # the newest that the CPU support is tested with, beside the pinned one

test-fast: $(STAMP)
	$(PYTEST) -n 2 -m "not (slow or long or integration or distributed or slurm or gpu)"

test: $(STAMP)
	$(PYTEST) -n 3 -m "not (slow or long)"

test-all: $(STAMP) build/megatron-core/.installed
	$(PYTEST) -n 3 -m "slow and not long"
	PYTHONPATH=build/megatron-core $(PYTEST) -m "not (slow or long)" tests/parallel/test_parity.py

build/megatron-core/.installed: $(STAMP) Makefile
	@rm -rf $(@D)
	@# it asks for a newer Python than it needs
	$(BIN)/pip install --quiet --progress-bar off --no-deps --ignore-requires-python --target $(@D) megatron-core==$(MEGATRON)
	@touch $@

# Kills, 30 of a training run (the table of docs/measured/kills.md) and 10 of a preparation; what large grids leave out elsewhere
test-long: $(STAMP)
	$(PYTEST) -s -m long

# Plants faults, one after the other, and runs the test that must see each
mutants: $(STAMP)
	$(BIN)/python tests/mutants/run.py $(MUTANTS)

# Losses of 20 steps on file: a diff is a change of numbers. OUT=folder writes them elsewhere, for tests/golden/compare.py
OUT ?= tests/golden
golden: $(STAMP)
	$(BIN)/python tests/golden/make.py --out $(OUT)

# What a training step waits for, sends and holds on fake GPUs, on file
traces: $(STAMP)
	$(BIN)/python tests/planning/traces.py
	$(BIN)/python tests/planning/memory_cases.py

# On a machine with GPUs
test-gpu: $(STAMP)
	$(PYTEST) -m gpu

# Everything once on this machine's cards: at most 10 minutes on one, 15 on several; a page in docs/measured.
# DEVICE=cpu tests the script itself at tiny sizes.
DEVICE ?= gpu
ACCEPT := $(if $(filter cpu,$(DEVICE)),build/acceptance,docs/measured)
gpu: $(STAMP)
	$(BIN)/bitlm doctor --accept $(ACCEPT) --device $(DEVICE)

clean:
	rm -rf $(VENV) data runs build *.egg-info
