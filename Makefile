# demo, demo-lm, test, lint, docs, bench: each sets up what it needs. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 2
# waiting threads sleep instead of spinning: on cores shared with others the demo is 5 times faster
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-lm test lint docs bench clean-demo clean-demo-lm

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Every stage is an ordinary command: repeat it with another config, or with options of your own.
demo: $(READY) clean-demo
	$(BIN)/python -m salve_lm fit      --config demo/1_backbone
	$(BIN)/python -m salve_lm fit      --config demo/2_autoencoder
	$(BIN)/python -m salve_lm discover --config demo/3_discover
	$(BIN)/python -m salve_lm sweep    --config demo/4_sweep --config edit/comparison
	$(BIN)/python -m salve_lm validate --config demo/5_verify
	$(BIN)/python -m salve_lm validate --config demo/6_validate --config runs/demo/sweep/validate/suppress_three.yaml
	$(BIN)/python -m salve_lm validate --config demo/6_validate --config runs/demo/sweep/validate/enhance_eight.yaml
	$(BIN)/python -m salve_lm edit     --config demo/7_export --config runs/demo/sweep/edits/suppress_three.yaml
	$(BIN)/python -m salve_lm validate --config demo/8_exported
	$(BIN)/python -m salve_lm report   runs/demo

clean-demo:
	rm -rf runs/demo

# The same for a language model: a tiny Gemma 3 that ships with the checkout, base and fine-tuned.
demo-lm: $(READY) clean-demo-lm
	$(BIN)/python -m salve_lm fit           --config demo_lm/2_autoencoders
	$(BIN)/python -m salve_lm select_layers --config demo_lm/3_layers
	$(BIN)/python -m salve_lm inject        --config demo_lm/4_inject
	$(BIN)/python -m salve_lm edit          --config demo_lm/5_export
	$(BIN)/python -m salve_lm measure       --config demo_lm/6_edits
	$(BIN)/python -m salve_lm report        runs/demo-lm

clean-demo-lm:
	rm -rf runs/demo-lm

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/python -m mkdocs build --strict --quiet

bench: $(READY)
	$(BIN)/python benchmarks/start_up.py
	$(BIN)/python benchmarks/thresholds.py
	$(BIN)/python benchmarks/editing_callback.py
	$(BIN)/python benchmarks/sae_step.py
	$(BIN)/python benchmarks/sae_step.py --architecture topk --without sparsify
	$(BIN)/python benchmarks/sae_step_sparse.py
	$(BIN)/python benchmarks/sae_memory.py
	$(BIN)/python benchmarks/store_reading.py
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/streaming_statistics.py
	$(BIN)/python benchmarks/harvest_layers.py --rounds 7
	$(BIN)/python benchmarks/many_saes.py
