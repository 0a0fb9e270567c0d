# `make quickstart` and `make test` set up everything they need on a fresh clone; a second run re-uses what is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Arguments for pip, e.g. PIP_ARGS="--index-url …" for a CPU build of torch
PIP_ARGS ?=
DATA := data/kjv

.PHONY: quickstart test faults lint setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "bitlm: Python 3.11 or newer is needed: set PYTHON=…" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off -c constraints.txt $(PIP_ARGS) -e '.[dev]'
	@touch $@

$(DATA)/manifest.json: $(STAMP)
	$(BIN)/bitlm prep data_prep/sample/kjv.jsonl.zst --tokenizer bpe:4096 --out $(DATA)

quickstart: $(DATA)/manifest.json
	$(BIN)/bitlm train quickstart
	$(BIN)/bitlm eval runs/quickstart
	$(BIN)/bitlm train quickstart --run.dir runs/quickstart-m1 --model.block_size 1
	$(BIN)/bitlm eval runs/quickstart-m1
	$(BIN)/bitlm generate runs/quickstart --prompt "And God said" --blocks 48

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# the type checker knows no package-dir map: show it the layout that is installed
	@rm -rf build/typed && mkdir -p build/typed && cp -r bitlm_dist build/typed/
	@cp -r kernels data_prep launch build/typed/bitlm_dist/
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml bitlm_dist

test: $(STAMP)
	$(BIN)/python -m pytest

# kill -9 at 30 random moments; the table of docs/reliability.md
faults: $(STAMP)
	FAULT_KILLS=30 $(BIN)/python -m pytest -s tests/faults

clean:
	rm -rf $(VENV) data runs build *.egg-info
