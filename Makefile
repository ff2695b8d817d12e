# The commands of this repository: `make` lists them, `make run` is the whole set-up.
#
# PYTHON  the interpreter, 3.11 or 3.12     (make run PYTHON=/opt/python3.12/bin/python3)
# VENV    the virtual environment           (make test VENV=/var/cache/speech-venv)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

supported = import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
ifndef PYTHON
PYTHON := $(firstword $(foreach python,python3.12 python3.11 python3,\
            $(shell $(python) -c '$(supported)' 2>/dev/null && command -v $(python))))
endif
VENV ?= .venv
BIN := $(VENV)/bin

# Only jieba, pure Python, may come as source: nothing here needs a compiler.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --require-hashes
FROM_WHEELS := --only-binary :all: --no-binary jieba --no-build-isolation
LOCK := uv pip compile --universal --fork-strategy fewest --python-version 3.11 --generate-hashes \
        --no-emit-index-url --no-header --no-annotate --upgrade --quiet

# A checkout's environment is kept in the user's cache folder, under the checksum of what is in it.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/indextts-openai-server
INDEXTTS_VENV := $(CACHE)/indextts-$(shell sha256sum tests/indextts/requirements.txt | cut -c1-16)
SIZE ?= full
INDEXTTS_WEIGHTS := $(CACHE)/indextts-$(SIZE)-$(shell sha256sum tests/indextts/make_checkpoint.py | cut -c1-12)

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

.PHONY: run
run: install ## install what is missing, then serve on http://127.0.0.1:6006 (HOST, PORT and TTS_* are its settings)
	@exec $(BIN)/gunicorn -c gunicorn.conf.py 'app:create_app()'

.PHONY: test
test: install-test ## ruff, shellcheck and pytest
	$(BIN)/ruff check .
	$(BIN)/shellcheck $(wildcard *.sh) .ci/run
	$(BIN)/python -m pytest

.PHONY: fuzz
fuzz: install-test ## 28,000 cases of anything at all as a request (a quarter of an hour)
	FUZZ_EXAMPLES=7000 $(BIN)/python -m pytest -q tests/test_fuzz.py

.PHONY: test-indextts
test-indextts: $(INDEXTTS_VENV)/installed ## prove the indextts engine on a real checkout, INDEXTTS_CHECKOUT=DIR, with random weights (9 GB, an hour)
	@[ -n "$(INDEXTTS_CHECKOUT)" ] || { echo "Name an index-tts-vllm checkout: make $@ INDEXTTS_CHECKOUT=DIR" >&2; exit 1; }
	INDEXTTS_CHECKOUT=$(INDEXTTS_CHECKOUT) $(INDEXTTS_VENV)/bin/python -m pytest -v tests/indextts

.PHONY: test-omni
test-omni: ## test the omni engine: real vLLM-Omni on the CPU, small random models (5 GB in the user's cache, 30 minutes)
	@venv=$$($(PYTHON) tests/omni/install.py) && \
	PYTHONPATH=. "$$venv/bin/python" -m pytest -rA --tb=short --show-capture=no tests/omni

.PHONY: bench
bench: install-bench ## measure this server and draw benchmarks/plots (an hour)
	$(BIN)/python benchmarks/figures.py
	$(BIN)/python benchmarks/plots.py

.PHONY: bench-deploy
bench-deploy: install-test ## print how long deploying, failing to and rolling back put the server out of service
	$(BIN)/python benchmarks/deploy.py

.PHONY: bench-peers
bench-peers: install ## race this server against kokoro-cli and fastkokoro, which it installs in the user's cache folder
	$(BIN)/python benchmarks/peers.py

.PHONY: bench-indextts
bench-indextts: $(INDEXTTS_VENV)/installed ## print what driving a checkout stage by stage is worth, INDEXTTS_CHECKOUT=DIR (7 GB, half an hour; SIZE=middle is quicker)
	@[ -n "$(INDEXTTS_CHECKOUT)" ] || { echo "Name an index-tts-vllm checkout: make $@ INDEXTTS_CHECKOUT=DIR" >&2; exit 1; }
	[ -e $(INDEXTTS_WEIGHTS)/made ] || { \
	  $(INDEXTTS_VENV)/bin/python tests/indextts/make_checkpoint.py $(INDEXTTS_CHECKOUT) $(INDEXTTS_WEIGHTS) --size $(SIZE) --codes 100; \
	  touch $(INDEXTTS_WEIGHTS)/made; }
	$(INDEXTTS_VENV)/bin/python benchmarks/indextts.py $(INDEXTTS_CHECKOUT) $(INDEXTTS_WEIGHTS)

.PHONY: soak
soak: install ## half an hour of mixed traffic with faults injected: sent, answered, refused, lost, drift
	$(BIN)/python benchmarks/soak.py

.PHONY: bench-threads
bench-threads: install ## compare the runtimes and ways to share the cores: TTS_EMBEDDED_RUNTIME, TTS_THREADS, TTS_SLOTS
	$(BIN)/python benchmarks/threads.py

.PHONY: test-e2e
test-e2e: install-test ## dub a video end to end as the dubbing worker does (needs ffmpeg; a quarter of an hour)
	@command -v ffmpeg > /dev/null || $(install_ffmpeg)
	$(BIN)/python -m pytest -s tests/e2e

.PHONY: bench-worker
bench-worker: install ## print the figures of a dubbing task: engine busy, evenness, memory over 500 segments
	$(BIN)/python benchmarks/worker.py

.PHONY: examples
examples: install ## make examples/voice_01.wav to voice_11.wav again
	PYTHONPATH=. $(BIN)/python examples/make_examples.py

.PHONY: ranges
ranges: install ## measure assets/activation_ranges.json again
	PYTHONPATH=. $(BIN)/python assets/measure_ranges.py

.PHONY: licences
licences: install ## list every installed package with its licence; fail on the GPL
	$(BIN)/python tests/licences.py

.PHONY: lock
lock: ## pin the newest versions that requirements*.in allow (needs uv)
	$(LOCK) requirements-build.in -o requirements-build.txt
	$(LOCK) requirements.in -o requirements.txt
	$(LOCK) -c requirements.txt requirements-gpu.in -o requirements-gpu.txt
	$(LOCK) requirements-test.in -o requirements-test.txt
	$(LOCK) --no-deps requirements-voices-test.in -o requirements-voices-test.txt
	$(LOCK) requirements-bench.in -o requirements-bench.txt

.PHONY: clean
clean: ## remove the virtual environment and the caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis benchmarks/results cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Each install leaves a stamp with the checksum of what it installed and does nothing while that holds.

.PHONY: install
install: $(BIN)/pip
	@sum=$$(cat requirements-build.txt requirements.txt | sha256sum); \
	if [ "$$sum" != "$$(cat $(VENV)/.installed 2>/dev/null)" ]; then \
	  $(PIP) -r requirements-build.txt; \
	  $(PIP) $(FROM_WHEELS) -r requirements.txt; \
	  echo "$$sum" > $(VENV)/.installed; \
	fi

.PHONY: install-test
install-test: install
	@sum=$$(cat requirements*.txt | sha256sum); \
	if [ "$$sum" != "$$(cat $(VENV)/.installed-test 2>/dev/null)" ]; then \
	  $(PIP) $(FROM_WHEELS) -r requirements-test.txt; \
	  $(PIP) $(FROM_WHEELS) --no-deps -r requirements-voices-test.txt; \
	  echo "$$sum" > $(VENV)/.installed-test; \
	fi

.PHONY: install-bench
install-bench: install
	@sum=$$(cat requirements-bench.txt | sha256sum); \
	if [ "$$sum" != "$$(cat $(VENV)/.installed-bench 2>/dev/null)" ]; then \
	  $(PIP) $(FROM_WHEELS) -r requirements-bench.txt; \
	  echo "$$sum" > $(VENV)/.installed-bench; \
	fi

$(BIN)/pip:
	@[ -n "$(PYTHON)" ] || { echo "No Python 3.11 or 3.12 found. Install one, or name it: make run PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c '$(supported)' || { echo "$(PYTHON) is not Python 3.11 or 3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(install_venv)
	$(PYTHON) -m venv $(VENV)

# Debian and Ubuntu keep venv apart from Python: root installs it, anyone else is told what to type.
venv_package = $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
define install_venv
if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  apt-get update -q && apt-get install -qy $(venv_package); \
	else \
	  echo "Python's venv module is missing. Type: sudo apt-get install $(venv_package)" >&2; exit 1; \
	fi
endef

$(INDEXTTS_VENV)/installed:
	python3.11 -m venv --clear $(INDEXTTS_VENV)
	$(INDEXTTS_VENV)/bin/python -m pip --disable-pip-version-check install --no-deps -r tests/indextts/requirements.txt
	touch $@

# ffmpeg is a program of the machine's, not a part of this repository; only the end-to-end test runs it.
define install_ffmpeg
if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  apt-get update -q && apt-get install -qy --no-install-recommends ffmpeg; \
	else \
	  echo "ffmpeg is missing. Type: sudo apt-get install ffmpeg" >&2; exit 1; \
	fi
endef
