# Two commands do all on a fresh machine: `make baselines` and `make test`.
.DEFAULT_GOAL := help
.PHONY: help setup baselines test test-all test-lanes benchmarks docs lint format build constraints clean

RUN := .venv/bin
SEEDS ?= 1
JOBS ?= 2
# All but a second row of the slowest host, so that two cores need no more than a quarter of an hour.
TASKS ?= resnet,vit_90,vit_300,fed_emnist,t5,dqn_cnn

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make or mend .venv and install the whole workspace at the pinned versions
	@sh tools/setup.sh

baselines: setup  ## the paper's table at embedded scale, dense and with every method; table and plot
	@$(RUN)/jaxpruner-baselines suite --seeds $(SEEDS) --jobs $(JOBS) --tasks $(TASKS)

test: setup  ## the tests but for the slow ones
	@$(RUN)/ruff check .
	@$(RUN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: lint test  ## all tests: lint, those, and then the slow ones
	@$(RUN)/python -m pytest -n 2 --dist worksteal -m slow

test-lanes: setup  ## the core's quick tests on the oldest and the newest JAX, with the interpreters at hand
	@$(RUN)/python tools/lanes.py $(RECORD)

benchmarks: setup  ## speed and memory of the core against sorts and a bare optimizer
	@$(RUN)/jaxpruner-baselines bench

docs:  ## the documentation, from Markdown and docstrings, into site/
	@$(or $(PYTHON),python3) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "docs: Python 3.11 or newer is needed; name one: make PYTHON=python3.12 docs")'
	@.venv-docs/bin/python -m pip --version >/dev/null 2>&1 || $(or $(PYTHON),python3) -m venv --clear .venv-docs
	@.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ruff -r docs/requirements.txt
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict  # no news of its makers

lint: setup  ## check the code: ruff, and its types by mypy
	@$(RUN)/ruff check .
	@$(RUN)/ruff format --quiet --check .
	@$(RUN)/mypy

format: setup  ## format the code, and mend what ruff can
	@$(RUN)/ruff format .
	@$(RUN)/ruff check --fix .

build: setup  ## wheels and source distributions of all members, into dist/
	@rm -rf dist
	@sh tools/build.sh $(RUN) dist

constraints: setup  ## resolve constraints.txt anew
	@printf '%s\n' '-e core' '-e baselines[lunarlander,pretrained]' '-e integrations/fedjax' '-e integrations/dopamine' \
		'-e integrations/scenic' '-e integrations/t5x' '-e integrations/keras' '-r tests/requirements.txt' \
		'-r docs/requirements.txt' | \
		$(RUN)/uv pip compile --quiet --upgrade --no-annotate --no-header --python-version 3.11 \
		--prerelease if-necessary-or-explicit --override tools/overrides.txt - | \
		grep '==' > constraints.new && mv constraints.new constraints.txt

clean:  ## remove what the commands made, except results
	rm -rf .venv .venv-docs site .lanes dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
