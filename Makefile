# Everything here can be run again, and twice at once. State is in .state/, the Python environment in .venv/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup engine engine-stop demo run test proof lint format bench clean
.NOTPARALLEL:

# Recipes that use the engine get its address this way.
with_engine = eval "$$(.ci/engine env 2>/dev/null)"

# The old command of its own, or the new one of the Docker client.
have_compose = { command -v docker-compose || docker compose version; } >/dev/null 2>&1

# What tests use of the machine. Without an engine those that need it are skipped, unless REQUIRE_ENGINE=1.
define ready_for_tests
@.ci/engine start || { [ -z "$${REQUIRE_ENGINE:-}" ] && echo "Tests that need an engine will be skipped."; }
@$(have_compose) || [ "$$(id -u)" != 0 ] || .ci/apt docker-compose || echo "The test of compose.yaml needs Docker Compose."
@command -v pgbouncer /usr/sbin/pgbouncer >/dev/null || [ "$$(id -u)" != 0 ] || .ci/apt pgbouncer || echo "The test of poolers needs pgbouncer."
@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || [ "$$(id -u)" != 0 ] || .ci/apt postgresql || echo "The test of other versions needs a PostgreSQL of the distribution."
endef

# Whether no process holds this lock of the embedded PostgreSQL (app/store/embedded/server.py says which they are).
free = { [ ! -e .state/postgres/$(1).lock ] || flock -n .state/postgres/$(1).lock true; }

# A killed server leaves its PostgreSQL running. To join it and leave as the last user ends it in order.
define stop_postgres
.venv/bin/python -c 'from pathlib import Path; from app.store.embedded.server import EmbeddedPostgres as E; E.start(Path(".state")).stop()'
endef

help: ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install uv and the locked dependencies into this checkout
	@.ci/setup

engine: ## Find a Docker engine, or as root install and start a private one
	@.ci/engine start

engine-stop: ## Stop the private engine, if this checkout started one
	@.ci/engine stop

demo: setup engine ## See it work: sandboxes, crashes and their history, in about a minute
	@$(with_engine); .venv/bin/sandledger demo --agent-image "$$(.venv/bin/python -m tests.agent.image)"

run: setup engine ## Serve the API on this machine
	@$(with_engine); .venv/bin/sandledger serve

test: setup ## Run every test in parallel; ARGS="..." goes to pytest (ARGS=-n0: one process), REQUIRE_ENGINE=1 forbids skipping for want of an engine
	$(ready_for_tests)
	@$(with_engine); .venv/bin/python -m pytest -n auto --dist worksteal -m "not proof" --durations=20 $(ARGS)

proof: setup ## Run the tests that take minutes, one after the other; ARGS and REQUIRE_ENGINE as for test
	$(ready_for_tests)
	@$(with_engine); .venv/bin/python -m pytest -m proof $(ARGS) || { code=$$?; [ $$code = 5 ] || exit $$code; echo "No test is marked as a proof."; }

# One pass over the tests' calls beside the strict one over app/: each takes a core for about half a minute. pytest reads
# every test, so that one which cannot be imported is found here, and runs only those of the arrows.
lint: setup ## Check style, format, types, import arrows, and that the tests fit together
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	@echo ".venv/bin/basedpyright and .venv/bin/basedpyright --project tests"
	@.venv/bin/basedpyright --project tests & tests=$$!; code=0; .venv/bin/basedpyright || code=1; wait $$tests || code=1; exit $$code
	.venv/bin/python -m pytest -q -k test_arrows

format: setup ## Format the code and fix what can be fixed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: setup engine ## Measure, as ratios against raw engine calls and a minimal handler
	@$(with_engine); .venv/bin/python -m tests.bench

clean: ## Stop the private engine and remove all that was installed and stored here, the embedded database too
	@if ! $(call free,users); then echo "A server of this checkout runs on the embedded database. Stop it first." >&2; exit 1; fi
	@if ! $(call free,postmaster); then echo "Stopping the embedded PostgreSQL ..."; $(stop_postgres); fi
	@.ci/engine stop
	rm -rf .state .venv .pytest_cache .ruff_cache .hypothesis dist
