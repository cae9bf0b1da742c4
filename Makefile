# `make dev` and `make test` do all the set-up they need; both want only python3 (3.11 or later, with venv) and make.

SHELL := /bin/sh
BIN := .venv/bin
AUDIT := .venv/audit
export DAGSTER_HOME := $(CURDIR)/var/dagster

# pip says nothing for a minute; the seconds show that it works. Its exit code is kept.
define install
	@n=0; while sleep 5; do n=$$((n + 5)); printf '\rInstalling into .venv, once: %s s of about 90' $$n; done & \
	ticks=$$!; trap 'kill $$ticks' EXIT; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e $(1) && echo && touch $@
endef

.PHONY: dev doctor check test static cluster image bench fuzz audit screenshots format clean

PORT := 3000

# The web UI on http://127.0.0.1:3000 (PORT=3001: on another port), with sensors, schedules and, without POLYGON_API_KEY,
# the simulated demo.
dev: $(BIN)/.installed $(DAGSTER_HOME)/dagster.yaml
	@$(BIN)/python -m polygon_pipeline.terminal --port $(PORT)

# What works and what does not, a line each, with what to do; `make doctor DOCTOR="--backfill 2024-01-01"` says what a
# backfill from that day on costs.
doctor: $(BIN)/.installed
	@$(BIN)/python -m polygon_pipeline.doctor $(DOCTOR)

# Lint, types, the import contract and the fast tests: about two minutes.
check: static
	$(BIN)/pytest -m "not slow"

# Everything: about nine minutes on two cores, and two more the first time.
test: static
	$(BIN)/pytest

# Several machines made of namespaces, with PostgreSQL, Redis and S3: half an hour. Needs root, and changes no network
# but its own; `make cluster CLUSTER="-k backfill"` runs one scenario.
cluster: $(BIN)/.installed-cluster
	unshare --net --fork $(BIN)/pytest -n 0 -s polygon_pipeline_tests/cluster/scenarios.py \
		polygon_pipeline_tests/cluster/outlasting.py $(CLUSTER)

# The image is built, and a session collected by containers of it as deploy/celery/compose.yaml says: twelve minutes.
# Needs a Docker engine with Compose, and the ports 3000, 5432 and 6379.
image: $(BIN)/.installed-cluster
	docker build --file deploy/container/Dockerfile --tag polygon-pipeline:tried .
	$(BIN)/pytest -n 0 -s polygon_pipeline_tests/cluster/image.py

static: $(BIN)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Some five minutes; `make bench BENCH="--full --write"` writes benchmarks/RESULTS.md, `make bench BENCH=edge` runs one.
bench: $(BIN)/.installed-bench
	$(BIN)/python -m benchmarks $(BENCH)

# Hostile inputs for every parser, a minute each; `make fuzz FUZZ="--minutes 10 frames"` tries one for longer.
fuzz: $(BIN)/.installed-dev
	$(BIN)/python -m polygon_pipeline_tests.fuzzing $(FUZZ)

# The screenshots of the README and of docs, by the test that looks at the same pages; needs a Chromium.
screenshots: $(BIN)/.installed-dev
	SCREENSHOTS=docs $(BIN)/pytest -n 0 polygon_pipeline_tests/test_web_ui.py

# Known vulnerabilities of the pinned versions. Asks the advisory service of PyPI, so it needs the network.
audit: $(AUDIT)/bin/pip-audit
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

format: $(BIN)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info

$(BIN)/python:
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 is older than 3.11")'
	python3 -m venv .venv

$(BIN)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(call install,.)

$(BIN)/.installed-dev: $(BIN)/.installed
	$(call install,'.[dev]')

$(BIN)/.installed-bench: $(BIN)/.installed-dev
	$(call install,'.[bench]')

$(BIN)/.installed-cluster: $(BIN)/.installed-dev
	$(call install,'.[cluster]')

# In an environment of its own: what it needs is none of the project's dependencies.
$(AUDIT)/bin/pip-audit:
	python3 -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit

$(DAGSTER_HOME)/dagster.yaml: deploy/local/dagster.yaml
	mkdir -p $(DAGSTER_HOME)
	cp $< $@
