# make demo   installs into .venv and runs the main job
# make test   installs into .venv, lints, type-checks, tests
# make flower installs into .venv-flower and tests what runs on Flower
PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
VENV_FLAGS ?=
FLOWER ?= .venv-flower
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test flower lint docs bench results clean

demo: $(READY)
	$(BIN)/featherweight run dense-digits random-digits imp-digits lrr-digits --out runs/demo --jobs 2 --report

test: lint
	$(BIN)/python -m pytest

# Flower pins older versions of what the lab uses: an environment of its own.
flower: $(FLOWER)/.ready
	FEATHERWEIGHT_FLOWER=1 FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 \
	RAY_USAGE_STATS_ENABLED=0 FLWR_HOME=$$(mktemp -d) $(FLOWER)/bin/python -m pytest tests/flower

$(FLOWER)/.ready: pyproject.toml
	test -x $(FLOWER)/bin/python || $(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/python -c "import torch" 2>/dev/null || $(FLOWER)/bin/pip install --quiet torch==$(TORCH)
	$(FLOWER)/bin/python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > $(FLOWER)/constraints.txt
	$(FLOWER)/bin/pip install --quiet --constraint $(FLOWER)/constraints.txt --editable '.[lab,flower]' pytest hypothesis
	touch $(FLOWER)/.ready

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python -m benchmarks

# Regenerates docs/results/ from training runs; DATA is the folder that holds cifar10/.
results: $(READY)
	$(BIN)/python -m benchmarks.results $(if $(DATA),--data $(DATA))

# torch goes in first and is then pinned to exactly the build that was installed (or already there
# with VENV_FLAGS=--system-site-packages), so that no other package can replace it.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==$(TORCH)
	$(BIN)/python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) $(FLOWER) site runs build *.egg-info
