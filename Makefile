# Short names for what .ci/run does, and the renewal of the locks.  Nothing here is needed to run or test Gatepost:
# ./gatepost run and ./gatepost test set themselves up.

BIN := .venv/bin

.PHONY: help test lint format types imports docs check lock

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST)

test: ## all tests
	./gatepost test

lint: ## style and mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	dash -n gatepost

format: ## mend what can be mended without thought
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: ## mypy: strict in src, bodies only in tests
	$(BIN)/mypy

imports: ## who may import whom
	$(BIN)/lint-imports

docs: ## links, commands, files and the generated reference
	$(BIN)/python scripts/docs_check.py

check: lint types imports docs ## all of it but the tests

# The locks hold versions, hashes and markers for every platform, and no address of any registry: where packages come from
# is the machine's own business.  Both come from one resolution, so that they agree where they overlap.
lock: ## renew requirements.lock and requirements-dev.lock
	$(BIN)/uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet uv
	@set -e; tree=$$(mktemp -d); trap 'rm -rf "$$tree"' EXIT; \
	mkdir -p "$$tree/src/gatepost"; \
	cp pyproject.toml README.md LICENSE "$$tree/"; cp src/gatepost/__init__.py "$$tree/src/gatepost/"; \
	$(BIN)/uv lock --quiet --project "$$tree"; \
	export="$(BIN)/uv export --quiet --frozen --no-header --no-emit-project --format requirements.txt --project $$tree"; \
	$$export --all-extras --group build >"$$tree/run.lock"; \
	$$export --only-group dev >"$$tree/dev.lock"; \
	mv "$$tree/run.lock" requirements.lock; mv "$$tree/dev.lock" requirements-dev.lock
