# Two commands do all on a fresh machine: `make baselines` and `make test`.
.DEFAULT_GOAL := help
.PHONY: help setup baselines test test-lanes benchmarks lint format constraints clean

RUN := .venv/bin
PRESET ?= quick
SEEDS ?= 3

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make or mend .venv and install core and baselines at the pinned versions
	@sh tools/setup.sh

baselines: setup  ## train a small ViT dense and with every method; table and plot
	@$(RUN)/jaxpruner-baselines run digits_vit --preset $(PRESET) --seeds $(SEEDS)

test:  ## all tests
	@sh tools/setup.sh tests
	@$(RUN)/ruff check .
	@$(RUN)/python -m pytest -n 2 --dist worksteal

test-lanes:  ## the core's tests on the oldest and the newest JAX, for each interpreter at hand
	@sh tools/setup.sh tests
	@$(RUN)/python tools/lanes.py

benchmarks: setup  ## speed and memory of the core against sorts and a bare optimizer
	@$(RUN)/jaxpruner-baselines bench

lint format:  ## format and lint the code
	@sh tools/setup.sh tests
	@$(RUN)/ruff format .
	@$(RUN)/ruff check --fix .

constraints:  ## resolve constraints.txt anew
	@sh tools/setup.sh tests
	@printf '%s\n' '-e core' '-e baselines' '-e integrations/fedjax' '-e integrations/dopamine' \
		'-e integrations/scenic' '-e integrations/t5x' '-r tests/requirements.txt' | \
		$(RUN)/uv pip compile --quiet --upgrade --no-annotate --no-header --python-version 3.11 \
		--prerelease if-necessary-or-explicit --override tools/overrides.txt - | \
		grep '==' > constraints.new && mv constraints.new constraints.txt

clean:  ## remove what the commands made, except results
	rm -rf .venv .lanes .pytest_cache .ruff_cache .hypothesis
