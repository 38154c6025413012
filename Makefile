# The commands of README.md. Each can be repeated, and does at once what is already done.
.PHONY: serve setup setup-dev test test-all test-next lint docs check format

serve: setup
	@.venv/bin/llumnix serve $(ARGS)

setup:
	@scripts/setup.sh

setup-dev:
	@scripts/setup.sh dev

test: setup-dev
	@scripts/test.sh $(ARGS)

test-all: setup-dev
	@LLUMNIX_TEST_SEEDS=$${LLUMNIX_TEST_SEEDS:-2000} .venv/bin/python -m pytest -m "slow or not slow" $(ARGS)

# The tests on the next vLLM's Python files over this one's CPU kernels (CONTRIBUTING.md says what that proves).
test-next: setup-dev
	@.venv/bin/python scripts/setup_next.py
	@.venv-next/bin/python -m pytest $(ARGS)

format: setup-dev
	@.venv/bin/ruff format .
	@.venv/bin/ruff check --fix .

lint: setup-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# README and docs/ as a site, in site/; a broken link or anchor is an error.
docs: setup-dev
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

check: lint docs test
