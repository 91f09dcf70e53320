# Everything a fresh machine needs: Python 3.11 or newer, and make.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN := $(VENV)/bin/python
# Quiet start-up: the demo's output is meant to be read.
export TF_CPP_MIN_LOG_LEVEL := 2
# Memory in huge pages for the examples and the tests too; train.main asks for it by itself.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: demo test test-slow test-native attack lint wheel docs gpu check-gpu check-tpu clean

demo: $(VENV)/train.installed  ## Train on real digits, fuse, compare, predict: a few minutes on two cores
	$(RUN) -m train.main --preset digits --data-dir runs/data --workdir runs/demo
	$(RUN) -m examples.digits runs/demo --data-dir runs/data
	$(RUN) -m repvgg_jax predict runs/demo/deploy.safetensors runs/demo/digits/*.png --top 2

test: $(VENV)/dev.installed  ## The tests, without the slow ones
	$(RUN) -m pytest -n $${TEST_WORKERS:-2} -m "not slow" $(ARGS)

test-slow: $(VENV)/dev.installed  ## The slow ones: every variant at full size, runs killed and resumed, several processes
	$(RUN) -m pytest -n $${TEST_WORKERS:-2} -m slow $(ARGS)

test-native: $(VENV)/dev.installed  ## The C++ on random shapes: sanitizers, guard pages, each instruction set; ARGS="guard" for some
	ATTACK_SCALE=$${ATTACK_SCALE:-0.05} $(RUN) -m tests.attack.sanitizers $(ARGS)

attack: $(VENV)/dev.installed  ## What docs/reliability.md reports, done again: hours on two cores (ATTACK_SCALE=0.01 for minutes)
	nice -n 10 $(RUN) -m tests.attack $(ARGS)

lint: $(VENV)/dev.installed  ## Style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

wheel: $(VENV)/dev.installed  ## A wheel with the convolutions compiled for all x86-64 processors, in dist/
	rm -rf build dist
	REPVGG_JAX_COMPILE_WHEEL=$${MACHINE:-x86_64} $(RUN) -m build --outdir dist/here
	PATH="$(VENV)/bin:$$PATH" $(RUN) -m auditwheel repair dist/here/*.whl --wheel-dir dist
	mv dist/here/*.tar.gz dist
	rm -r dist/here

docs: $(VENV)/docs.installed  ## The documentation as a site in build/site; broken links are errors
	$(RUN) -m mkdocs build

gpu:  ## Correctness and speed on this machine's GPU, with the Python that has JAX for it; a row for benchmarks/RESULTS.md
	$(PYTHON) -m benchmarks.gpu $(ARGS)

check-gpu: $(VENV)-cuda/check.installed  ## What XLA's compiler for GPUs makes of the nets, for an H100 that need not be here; 5 GB to install
	REPVGG_TARGET=h100:8 JAX_PLATFORMS=cpu $(VENV)-cuda/bin/python -m pytest tests/compilers $(ARGS)

check-tpu: $(VENV)-tpu/check.installed  ## The same for 256 chips of TPU v5e
	REPVGG_TARGET=v5e:16x16 JAX_PLATFORMS=cpu $(VENV)-tpu/bin/python -m pytest tests/compilers $(ARGS)

clean:  ## Forget the environment and the runs
	rm -rf $(VENV) $(VENV)-cuda $(VENV)-tpu runs build/site

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[train]'
	touch $@

# The compilers live in environments of their own: JAX would take them for machines that are here.
$(VENV)-cuda/check.installed $(VENV)-tpu/check.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(patsubst $(VENV)-%,%,$(@D))]' pytest tyro
	touch $@

$(VENV)/docs.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[docs]'
	touch $@

# timm pins a torchvision that pins a torch; both are only oracles of the tests, so they come without.
$(VENV)/dev.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps timm torchvision
	touch $@
