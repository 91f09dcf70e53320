# A fresh machine needs only Python 3.11 or newer, and make.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN := $(VENV)/bin/python
# No start-up messages, so that the demo's output is readable.
export TF_CPP_MIN_LOG_LEVEL := 2
# Huge pages for the examples and tests, too; train.main requests them itself.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: demo test test-slow test-native attack lint wheel docs gpu check-gpu check-tpu clean

demo: $(VENV)/train.installed  ## Train on real digits, fuse, compare, predict: a few minutes on two cores
	$(RUN) -m train.main --preset digits --data-dir runs/data --workdir runs/demo
	$(RUN) -m examples.digits runs/demo --data-dir runs/data
	$(RUN) -m repvgg_jax predict runs/demo/deploy.safetensors runs/demo/digits/*.png --top 2

test: $(VENV)/dev.installed  ## The tests, without the slow ones
	$(RUN) -m pytest -n $${TEST_WORKERS:-2} -m "not slow" $(ARGS)

test-slow: $(VENV)/dev.installed  ## The slow tests: every variant at full size, runs killed and resumed, several processes
	$(RUN) -m pytest -n $${TEST_WORKERS:-2} -m slow $(ARGS)

test-native: $(VENV)/dev.installed  ## Test the C++ alone: sanitizers, guard pages, every instruction set; ARGS="guard pages" selects builds
	ATTACK_SCALE=$${ATTACK_SCALE:-0.05} $(RUN) -m tests.attack.sanitizers $(ARGS)

attack: $(VENV)/dev.installed  ## Repeat the experiments of docs/reliability.md: hours on two cores (minutes with ATTACK_SCALE=0.01)
	nice -n 10 $(RUN) -m tests.attack $(ARGS)

lint: $(VENV)/dev.installed  ## Check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

wheel: $(VENV)/dev.installed  ## Build a wheel with compiled convolutions for every x86-64 processor in dist/
	rm -rf dist
	REPVGG_JAX_COMPILE_WHEEL=$${MACHINE:-x86_64} $(RUN) -m build --outdir dist/here
	PATH="$(VENV)/bin:$$PATH" $(RUN) -m auditwheel repair dist/here/*.whl --wheel-dir dist
	mv dist/here/*.tar.gz dist
	rm -r dist/here

docs: $(VENV)/docs.installed  ## Build the documentation site in build/site; broken links are errors
	$(RUN) -m mkdocs build

gpu:  ## Check and benchmark this machine's GPU, using a PYTHON that has JAX for it; adds a row to benchmarks/RESULTS.md
	$(PYTHON) -m benchmarks.gpu $(ARGS)

check-gpu: $(VENV)-cuda/check.installed  ## Compile the nets with XLA for H100s and check the programs; needs no GPU, installs 5 GB
	REPVGG_TARGET=h100:8 JAX_PLATFORMS=cpu $(VENV)-cuda/bin/python -m pytest tests/compilers $(ARGS)

check-tpu: $(VENV)-tpu/check.installed  ## The same for 256 TPU v5e chips
	REPVGG_TARGET=v5e:16x16 JAX_PLATFORMS=cpu $(VENV)-tpu/bin/python -m pytest tests/compilers $(ARGS)

clean:  ## Remove the environments, the runs and the built documentation
	rm -rf $(VENV) $(VENV)-cuda $(VENV)-tpu runs build/site

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[train]'
	touch $@

# The compilers have separate environments; in the main one, JAX would look for their devices on this machine.
$(VENV)-cuda/check.installed $(VENV)-tpu/check.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(patsubst $(VENV)-%,%,$(@D))]' pytest tyro
	touch $@

$(VENV)/docs.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[docs]'
	touch $@

# timm pins a torchvision that pins a torch. Only the tests need both, so they are installed without dependencies.
$(VENV)/dev.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps timm torchvision
	touch $@
