# Each target works from a fresh clone: it builds .venv first where that is not there.
#   make demo               train both models on images that the package draws, and generate a grid
#   make demo DATA=photos   the same on your own photos
#   make test               lint and tests
#   make test-fast          lint and the tests that run no script, within 90 seconds on two cores
#   make test-oldest        all tests with the oldest versions that setup.cfg allows, in .venv-oldest
#   make trials             kill the toolkit, damage its files, fill its disk, lie to it: two to three hours
#   make bench              what a step, a batch and a picture cost here, as ratios: benchmarks/results/<machine>.md
PYTHON ?= python3
BIN = .venv/bin
DATA ?=
OUT ?= $(if $(DATA),demo/$(notdir $(abspath $(DATA))),demo/scenes)
# a prepared folder and "scenes" are trained on as they are, anything else is prepared first
PREPARED = $(if $(filter-out scenes,$(DATA)),$(if $(wildcard $(DATA)/metadata.jsonl),$(DATA),$(OUT)/training_data/corel/corel_all),scenes)
# "compat" puts this folder on Python's path. Otherwise a program that runs beside a clone that is named corel_diffusers
# would import the clone's folder in place of the package in it.
EDITABLE = --config-settings editable_mode=compat --editable ".[test,tensorboard,dinov2]"
SIZE = --image-size 64 --config tiny --resume latest

.PHONY: demo test test-fast test-oldest lint install trials bench

install: .venv/installed

.venv/installed: constraints.txt setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(EDITABLE)
	touch $@
	@echo "installed in .venv: source .venv/bin/activate"

demo: .venv/installed
	$(if $(filter-out scenes $(DATA),$(PREPARED)),$(BIN)/corel-diffusers prepare --data-dir "$(DATA)" --output-dir "$(OUT)/training_data" --figs-dir "$(OUT)/figs")
	$(BIN)/python train_vae.py --data-dir "$(PREPARED)" --output-dir "$(OUT)/vae_models" $(SIZE) \
	  --max-train-minutes 3
	$(BIN)/python train_unet.py --vae-checkpoint "$(OUT)/vae_models" --data-dir "$(PREPARED)" --output-dir "$(OUT)/diffusion_models" $(SIZE) \
	  --max-train-minutes 5
	$(BIN)/corel-diffusers generate --pipeline "$(OUT)/diffusion_models" --num-images 36 --nrow 6 --seed 1 \
	  --output "$(OUT)/generated.png"
	@echo
	@echo "the photos over their reconstructions  $(OUT)/vae_models/reconstructions/"
	@echo "the VAE, its losses                    $(OUT)/vae_models/, $(OUT)/vae_models/training_losses.png"
	@echo "the pipeline, its losses               $(OUT)/diffusion_models/, $(OUT)/diffusion_models/loss_history.png"
	@echo "a row of images for each class         $(OUT)/diffusion_models/grid.png"
	@echo "36 images, the classes in turn         $(OUT)/generated.png"

test-fast: lint
	$(BIN)/python -m pytest -m "not slow and not gpu"

test: lint
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest -m gpu -n 0

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest

.venv-oldest/installed: constraints-oldest.txt setup.cfg
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt $(EDITABLE)
	touch $@

trials: .venv/installed
	$(BIN)/python trials/run.py

bench: .venv/installed
	$(BIN)/python benchmarks/all.py

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
