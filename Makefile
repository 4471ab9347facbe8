# make install      makes .venv and installs everything into it
# make quickstart   install, then train and evaluate labs/quickstart; OPTS="SOLVER.MAX_ITER 50"
#                   appends options, FORCE=1 trains again
# make test         install, then the test suite and lint
#
# PYTHON=/path/to/python uses that environment instead of .venv: it is checked, and each problem
# named with the command that mends it; only this checkout is installed there, never torch.

PYTHON3 ?= python3  # makes .venv
TORCH ?= torch==2.11.0 torchvision==0.26.0
STAMP := .venv/.installed

ifdef PYTHON
python := $(abspath $(shell command -v $(PYTHON) 2>/dev/null))
$(if $(python),,$(error PYTHON=$(PYTHON) is not a program; expected the path of a python))
environment := given
else
python := $(CURDIR)/.venv/bin/python
environment := $(STAMP)
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)  # not installed yet, or the checkout has moved since
endif
endif

ifeq ($(FORCE)$(OPTS),)
weights := labs/quickstart/output/model_final.pth
trained := $(shell [ $(weights) -nt labs/quickstart/config.yaml ] && echo yes)
endif

parallel := --numprocesses auto --maxprocesses 4

.PHONY: install quickstart test given

install: $(environment)

$(STAMP): Makefile setup.py pyproject.toml tools/install_detectron2.py tools/check_environment.py
	@$(PYTHON3) tools/check_environment.py --python-only
	@"$(python)" -m pip --version >/dev/null 2>&1 || $(PYTHON3) -m venv --clear .venv
	@echo "Installing into .venv; the first time this takes some minutes and 6 GB"
	"$(python)" -m pip install -q $(TORCH) 'setuptools<81' wheel
	"$(python)" tools/install_detectron2.py
	@# headless: opencv-python would need libGL; any cv2 that is there will do
	@"$(python)" -c "import cv2" 2>/dev/null || "$(python)" -m pip install -q opencv-python-headless
	"$(python)" -m pip install -q --no-build-isolation -e '.[test]'
	"$(python)" tools/check_environment.py pytest
	@echo "$(CURDIR)" > $@

given:
	@"$(python)" tools/check_environment.py $(if $(filter test,$(MAKECMDGOALS)),pytest)
	@"$(python)" tools/check_environment.py --is-installed || \
		"$(python)" -m pip install -q --no-deps --no-build-isolation -e . 2>/dev/null || \
		"$(python)" -m pip install -q --no-deps -e .

quickstart: install
ifeq ($(trained),yes)
	@echo "Already trained: the results are in labs/quickstart/output (log.txt, metrics.json)."
	@echo "To train again: make quickstart FORCE=1"
else
	cd labs/quickstart && "$(python)" ../../train_net.py --config-file ./config.yaml $(OPTS)
endif

test: install
	@# with pytest-xdist in as many processes as there are cores, up to 4
	"$(python)" -m pytest -q tests $$("$(python)" -c "import xdist" 2>/dev/null && echo $(parallel))
	@if "$(python)" -m ruff --version >/dev/null 2>&1; then "$(python)" -m ruff check .; fi
