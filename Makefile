# `make demo` and `make test` set up everything they need in .venv. With a GPU pip takes PyTorch's CUDA build, without one the CPU build.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
GPUS   := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
RUN    ?= runs/demo
ARGS   ?=
LAST   ?= 0.40
RISE   ?= 0.50

ifeq ($(GPUS),0)
CONSTRAINTS := -c constraints-cpu.txt
PROCESSES   := 2
export DS_ACCELERATOR  := cpu
export OMP_NUM_THREADS ?= 1
else
PROCESSES := $(GPUS)
endif
export TOKENIZERS_PARALLELISM := false
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help install demo demo-check pipeline test test-thorough mutations reliability lint check format bench bench-smoke clean

help:
	@echo "make demo    watch SmolLM2-135M learn by PPO (about 5 minutes on 2 CPU cores); results in $(RUN); ARGS=\"run.seed=1\" changes settings"
	@echo "make demo-check  did it learn? At least $(LAST) over the last four rollouts, $(RISE) above the first two"
	@echo "make pipeline  SFT, reward model, PPO, DPO, evaluation, merged model (about half an hour); goes on where it stopped"
	@echo "make test    the tests, two ranks under real ZeRO-3 among them"
	@echo "make test-thorough  those that take minutes: every mutation of the arithmetic, a rehearsal of the GPU exam"
	@echo "make mutations  the first of these alone"
	@echo "make reliability  every phase of a run struck by every signal, spoiled files, a full disk, a soak (an hour and more)"
	@echo "make check   formatting, lint and types (make lint), then all tests"
	@echo "make format  format the code"
	@echo "make bench   measure everything docs/performance.md quotes (about half an hour); see bench/README.md"
	@echo "make bench-smoke  every bench in a tiny size, which measures nothing: does it run?"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[dev]'
ifeq ($(GPUS),0)
	$(BIN)/python -m rlhf_toolkit.distributed.extensions
endif
	touch $@

demo: install
	MODEL=$$($(BIN)/python recipes/sentiment/fetch_model.py) && \
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu_zero3.yaml --num_processes $(PROCESSES) \
	  recipes/ppo.py --config recipes/sentiment/ppo.yaml --overwrite model.name="$$MODEL" run.output_dir=$(RUN) $(ARGS)

demo-check: install
	$(BIN)/python recipes/sentiment/learned.py $(RUN) --last $(LAST) --rise $(RISE)

pipeline: RUN = runs/gold_reward
pipeline: install
	$(BIN)/python recipes/gold_reward/run.py --to $(RUN) --processes $(PROCESSES)

test: install
	$(BIN)/python -m pytest -m "not thorough" -n 2 --dist loadfile

test-thorough: install
	$(BIN)/python -m pytest -m thorough

mutations: install
	$(BIN)/python -m pytest tests/test_mutations.py

reliability: install
	$(BIN)/python -m tests.reliability.kill_matrix
	$(BIN)/python -m tests.reliability.corruptions --every 3
	$(BIN)/python -m tests.reliability.small_disk
	$(BIN)/python -m tests.reliability.soak

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test test-thorough

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

BENCHES := versus_trl rollout traffic "traffic --like-7b" memory checkpoint scaling update roofline "packing prompts" "packing groups" \
  head role_lora cpu_attention adapters
bench: export OMP_NUM_THREADS := $(shell nproc 2>/dev/null || echo 2)
bench: install
	for bench in $(BENCHES); do set -- $$bench; name=$$1; shift; $(BIN)/python bench/$$name.py "$$@" || exit 1; done

SMOKES := $(BENCHES) "packing plan" learning portability quantised first_hour mistakes
bench-smoke: export OMP_NUM_THREADS := 1
bench-smoke: install
	for bench in $(SMOKES); do set -- $$bench; name=$$1; shift; echo "--- $$bench"; \
	  $(BIN)/python bench/$$name.py --smoke "$$@" > /dev/null || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build src/*.egg-info
