.DEFAULT_GOAL := help
PACKAGES := $(wildcard packages/*)

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

sync:  ## install everything, from the lock
	uv sync --locked

fmt:  ## format
	uv run ruff format .
	uv run ruff check --fix .

lint:  ## ruff, import-linter, deptry
	uv run ruff check .
	uv run ruff format --check .
	uv run lint-imports
	for package in $(PACKAGES); do (cd $$package && uv run deptry src) || exit 1; done

type:  ## mypy, package by package: strict; for tests and benchmarks what tests/mypy.ini says
	for package in $(PACKAGES); do uv run mypy $$package/src || exit 1; done
	for tests in $(wildcard packages/*/tests) tests; do \
		MYPYPATH=$$tests uv run mypy --config-file tests/mypy.ini $$tests || exit 1; \
	done
	MYPYPATH=packages/hbserve-compat/tests:packages/hbserve-core/tests:packages/hbserve-kv/tests uv run mypy --config-file tests/mypy.ini benchmarks

test:  ## every test that this machine can run
	uv run pytest

test-gpu:  ## only the tests that need a CUDA device
	uv run pytest -m gpu -n 0

isolate:  ## each wheel alone in an empty environment, and a dry run of a release
	uv run .ci/wheels_alone.py
	uv run .ci/release.py --home https://example.org/hbserve

lowest:  ## the lowest versions that the packages ask for, on another Python
	.ci/lowest

clients:  ## programs that people point at `hbserve serve`, in an environment of their own
	UV_PROJECT_ENVIRONMENT=.venv-clients uv run --locked --group clients pytest -W default -n 2 --dist loadgroup tests/clients

ray:  ## `hbserve serve --ray`, on a cluster of two nodes on this host
	UV_PROJECT_ENVIRONMENT=.venv-ray uv run --locked --group ray pytest -W default -n 0 tests/ray_cluster

site:  ## the site of the documentation, strictly
	UV_PROJECT_ENVIRONMENT=.venv-site uv run --locked --only-group site .ci/site.py --home https://example.org/hbserve

check: lint type isolate test  ## lint, type, isolate and test

.PHONY: help sync fmt lint type test test-gpu isolate lowest clients ray site check
