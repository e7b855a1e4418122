# Everything runs in .venv, which the first target that needs it makes, with the versions of constraints.txt.
# Needs nothing but make and Python 3.11 or newer; PYTHON=... picks another interpreter, OUT=... the demo's folder.

PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
OUT ?= demo

VENV := .venv
# Without the checkout on its path, Python imports the installed steerrec with its mapped folders.
RUN := PYTHONSAFEPATH=1 $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
EDITABLE := --no-build-isolation --config-settings editable_mode=strict --editable
EXTRAS := [test,lint,browser]
SOURCES := steerrec adapters cli

unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all benchmark sae-lens lint types format clean distclean FORCE

help: ## list the targets
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/installed ## set up .venv (the other targets do it by themselves)

demo: $(VENV)/installed ## the whole story on simulated data, into demo/ (OUT=DIR)
	$(VENV)/bin/steerrec demo -o "$(OUT)"

test: $(VENV)/installed ## the fast tests
	$(RUN) -m pytest

test-all: $(VENV)/installed ## the slow tests too
	$(RUN) -m pytest -m ""

benchmark: $(VENV)/installed ## timings (tests/benchmarks)
	$(RUN) -m pytest -m "" --benchmark-only tests/benchmarks

# sae-lens brings about 120 packages, some older than ours: an environment of its own, outside `make test`.
sae-lens: ## what we write and how fast we train, against sae-lens itself (sets up .venv-sae; large)
	test -d .venv-sae || "$(PYTHON)" -m venv .venv-sae
	.venv-sae/bin/python -m pip install --quiet "sae-lens==6.54.12" "torch==2.13.0" pytest pytest-timeout \
		pytest-benchmark hypothesis sybil .
	PYTHONSAFEPATH=1 .venv-sae/bin/python -m pytest -m "" tests/optional/test_sae_libraries.py \
		tests/benchmarks/test_sae_training.py

lint: $(VENV)/installed ## ruff: rules and formatting
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

types: $(VENV)/installed ## mypy, strict, over the installed package
	@# In the checkout mypy would take the bare folder steerrec/; where the package is installed it finds all parts.
	cd "$$($(RUN) -c 'import pathlib, steerrec; print(pathlib.Path(steerrec.__file__).parents[1])')" && \
		"$(CURDIR)/$(VENV)/bin/python" -m mypy --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" --package steerrec

format: $(VENV)/installed ## let ruff mend what it can
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

clean: ## remove what the targets made, except .venv
	rm -rf build dist *.egg-info demo .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) tests -name __pycache__ -type d -exec rm -rf {} +
	rm -f $(VENV)/installed

distclean: clean ## remove .venv as well
	rm -rf $(VENV) .venv-sae

$(VENV)/created:
	@test -n "$(PYTHON)" || { \
		echo "steerrec needs Python 3.11 or newer; install it, or name one with make PYTHON=/path/to/python" >&2; \
		exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) does not run as Python 3.11 or newer, which steerrec needs" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

# A strict editable install links the files there were when it was made: new ones need it made anew.
$(VENV)/sources: $(VENV)/created FORCE
	@{ echo "$(CURDIR)"; find $(SOURCES) -name '*.py' -o -name py.typed -o -path '*/page/*'; } | LC_ALL=C sort > $@.$$$$; \
		if cmp -s $@.$$$$ $@; then rm $@.$$$$; else mv $@.$$$$ $@; fi

# torch goes first and alone, so that nothing later in the list can choose another build of it.
$(VENV)/installed: $(VENV)/sources pyproject.toml constraints.txt
	$(if $(filter %.toml %.txt,$?),\
		$(PIP) install --constraint constraints.txt setuptools torch && \
		$(PIP) install --constraint constraints.txt $(EDITABLE) '.$(EXTRAS)',\
		$(PIP) install --quiet --no-deps $(EDITABLE) .)
	@touch $@
