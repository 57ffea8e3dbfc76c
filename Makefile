# make demo | test-fast | test | soak | gpu | docs | bench-peers | bench-storage | dist | image | demo-docker | setup; each does its own set-up in .venv.
# STORE=s3 runs the demo on a local S3. IMAGES=DIR gives the benchmark photographs. TARGET=cpu (or gpu) makes one image alone.
PYTHON ?= python3
BIN := .venv/bin
STORE ?= local
TARGET ?= cpu gpu
COMPOSE := docker compose -f docker/compose.yaml
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PILLOW := pillow==13.0.0
pinned = $(shell grep -o '^$(1)==[^ ;]*' requirements-dev.lock)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
DALI_HOST := sys_platform == "linux" and platform_machine == "x86_64"

.PHONY: setup test-fast test check soak gpu demo s3 lock bench-peers bench-storage dist image demo-docker docs docs-reference

setup: .venv/.ready

# Torch comes first and with its dependencies, which differ by build (CPU, CUDA); all else is in the lock. (requirements.lock is
# what the images have; requirements-dev.lock is that, but for the clouds' own, and what developing takes.)
# Pillow and pillow-simd own the same folder, so nothing may bring the other in: hence --no-deps.
.venv/.ready: requirements-dev.lock pyproject.toml Makefile $(wildcard pipeline/decode/*.[ch])
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("maestream needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "setting up .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv || { echo "make: no Python venv module (Debian: apt-get install python3-venv)"; exit 1; }
	@$(BIN)/pip install -qq $(call pinned,torch)
	@grep -v -E '^(torch|pillow-simd)==' requirements-dev.lock | $(BIN)/pip install -qq --no-deps -r /dev/stdin
	@$(MAKE) --no-print-directory .venv/.pillow
	@$(BIN)/pip install -qq --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import pipeline.decode.jpeg_crop' 2>/dev/null || \
	    echo "pipeline/decode/jpeg_crop.c does not build here (C compiler or libjpeg-turbo headers missing?): Pillow decodes JPEGs, at two thirds of the speed"
	@touch $@

.PHONY: .venv/.pillow
.venv/.pillow:
	@if [ "$$(uname -sm)" != "Linux x86_64" ]; then $(BIN)/pip install -qq $(PILLOW); exit; fi; \
	simd() { $(BIN)/pip install -qq --no-deps --no-binary pillow-simd $(call pinned,pillow-simd) >.venv/pillow-simd.log 2>&1; }; \
	headers() { [ "$$(id -u)" = 0 ] && command -v apt-get && apt-get update && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev libjpeg-dev zlib1g-dev; }; \
	simd || { headers >.venv/apt.log 2>&1 && simd; } || { \
	    echo "pillow-simd does not build here (libjpeg or zlib headers missing? see .venv/pillow-simd.log): using Pillow, which is slower"; \
	    $(BIN)/pip install -qq --no-deps $(PILLOW); }

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Two test files at a time. Tests of one file share what its fixtures train, so they stay in one process. The order is kept: the
# longest files, of Ray, come first, so that both processes end at about the same time.
test-fast: check
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not integration and not soak"

test: check s3
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not soak"

soak: setup s3
	$(BIN)/pytest -m soak

# What needs an NVIDIA GPU; everything is skipped where there is none.
gpu: setup
	$(BIN)/pytest tests/gpu

# OpenStack Swift, the S3 server of tests and demo, in an environment of its own.
s3: .venv-s3/.ready
.venv-s3/.ready: requirements-s3.lock
	@$(PYTHON) -m venv .venv-s3
	@.venv-s3/bin/pip install -qq --no-deps -r requirements-s3.lock
	@touch $@

demo: setup $(if $(filter s3,$(STORE)),s3)
	@STORE=$(STORE) bash demo.sh

# The documentation as HTML in build/docs/, in an environment of its own. A dead link or anchor is an error.
docs: .venv-docs/.ready
	@.venv-docs/bin/python docs/check_links.py
	@.venv-docs/bin/sphinx-build -W -n --keep-going -q -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

.venv-docs/.ready: requirements-docs.lock
	@$(PYTHON) -m venv .venv-docs || { echo "make: no Python venv module (Debian: apt-get install python3-venv)"; exit 1; }
	@.venv-docs/bin/pip install -qq --no-deps -r requirements-docs.lock
	@touch $@

# The generated pages of docs/reference, from the commands, the config schema and the metrics.
docs-reference: setup
	@$(BIN)/python docs/generate_reference.py

# Our loader and its peers, which have two environments of their own: with pillow-simd and with Pillow.
bench-peers: setup .venv-peers-simd/.ready .venv-peers-pillow/.ready
	@$(BIN)/python -m benchmarks.peers $(if $(IMAGES),--images "$(IMAGES)")

# Cold and cached reads from the S3 server of the tests, and how many bytes are read.
bench-storage: setup s3
	@.venv-s3/bin/python tests/support/s3_server.py --dir runs/bench-s3 -- $(BIN)/python -m benchmarks.storage $(if $(IMAGES),--images "$(IMAGES)")

.venv-peers-simd/.ready: PIL := --no-binary pillow-simd $(call pinned,pillow-simd)
.venv-peers-pillow/.ready: PIL := $(PILLOW)
.venv-peers-%/.ready: benchmarks/requirements-peers.lock
	@echo "setting up .venv-peers-$* (2 GB)"
	@$(PYTHON) -m venv .venv-peers-$*
	@.venv-peers-$*/bin/pip install -qq $(call pinned,torch)
	@.venv-peers-$*/bin/pip install -qq --no-deps -r benchmarks/requirements-peers.lock
	@.venv-peers-$*/bin/pip install -qq --no-deps $(PIL)
	@touch $@

# The sources, and a wheel built from them. PyPI takes a wheel of Linux if it needs no library that a machine may lack, so
# its libjpeg-turbo goes in; there is none to go in where the decoder did not build, and that is an error.
dist: setup
	@rm -rf dist
	$(BIN)/python -m build
	@if [ "$$(uname -s)" = Linux ]; then \
	    PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair -w dist dist/*-linux_*.whl && rm dist/*-linux_*.whl; fi
	@ls -lh dist

image:
	@for target in $(TARGET); do \
	    docker build -f docker/Dockerfile --target $$target -t maestream:$(VERSION)-$$target \
	        --build-arg VERSION=$(VERSION) --build-arg REVISION="$$(git describe --always --dirty --abbrev=40 --exclude '*')" . ; \
	done

# A cluster of containers on this machine, and the demo's run across them: docker/compose.yaml.
demo-docker:
	$(COMPOSE) build
	@docker rm -f maestream-demo >/dev/null 2>&1 || true
	$(COMPOSE) run --name maestream-demo demo
	@mkdir -p runs && rm -rf runs/demo-docker && docker cp maestream-demo:/home/maestream/demo runs/demo-docker
	@docker rm maestream-demo >/dev/null
	@echo "runs/demo-docker has report and picture; all is still up: $(COMPOSE) down --volumes ends it"

# Renew the pins. Torch is pinned without its build's suffix, so that any build of that version will do.
lock: setup
	for to in ".lock --extra aws" "-dev.lock --extra dev -c requirements.lock"; do \
	    $(BIN)/pip-compile -q --strip-extras --allow-unsafe --no-emit-index-url --no-emit-find-links --no-emit-options \
	        --annotation-style=line -o requirements$$to pyproject.toml; done
	sed -i -e '/^pillow==/d' -e 's/^\(torch==[0-9.]*\)+cpu/\1/' -e 's/-c requirements.lock, //' \
	    -e '/^nvidia-[^;]*$$/s/  *#/ ; $(DALI_HOST)  #/' requirements.lock requirements-dev.lock
	{ sed '/^[^#]/,$$d' requirements-docs.lock; \
	    $(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	    | $(BIN)/pip-compile -q --strip-extras --allow-unsafe --no-header --no-emit-index-url --no-emit-find-links --no-emit-options \
	        --annotation-style=line -o - - ; } >requirements-docs.tmp
	mv requirements-docs.tmp requirements-docs.lock
