# Every target does its own set-up on a fresh machine with Python >= 3.10 and GNU make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# with bytecode: where PYTHONDONTWRITEBYTECODE is set, every process would translate the compiler's modules again
PIP := $(BIN)/python -m pip install --quiet --compile
STAMP := $(VENV)/.installed
BUILT := artifacts/built
# OFF makes a wheel of cubins that artifacts/manifest.lock does not state: for trying, never for a release
LOCKED ?= ON
# what `make wheel` puts in: a profile of build_matrix.yaml, and architectures separated by commas, all where empty
PROFILE ?= full
ARCHITECTURES ?=

.PHONY: help quickstart test test-full lint typecheck wheel device-bundle blackwell-proof clean

help:
	@echo "quickstart     build the quick profile, run a layer where a GPU is present, say what could not run where none is"
	@echo "test           every test that needs no GPU, with lint and types"
	@echo "test-full      the same with the long grids"
	@echo "wheel          dist/*.whl with the full profile"
	@echo "device-bundle  one folder for a GPU machine without registry or compiler"
	@echo "blackwell-proof  on a B200 or B300: correctness, tuning and speed into PROOF (blackwell-proof.json)"

# a half-made environment would be taken for a whole one by the next call
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: name one, as in make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no environment was made: on Debian install python3-venv" >&2; exit 1; }

$(STAMP): pyproject.toml | $(VENV)/bin/python
	$(PIP) --upgrade pip scikit-build-core==1.1.2
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

# torch is pinned: another brings gigabytes of CUDA packages to a machine that only tests
$(VENV)/.torch: $(STAMP)
	$(PIP) --no-build-isolation --editable '.[torch-test]' torch==2.13.0
	touch $@

quickstart: $(STAMP)
	$(BIN)/densemoe build --profile quick
	$(BIN)/densemoe quickstart

lint: $(STAMP)
	$(BIN)/ruff check .

typecheck: $(STAMP)
	$(BIN)/python scripts/typecheck.py

# the emulator's tests take variants from this build, and compile what they do not find there
test: $(STAMP) $(VENV)/.torch lint typecheck
	$(BIN)/densemoe build --profile full --ptx build/ptx
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-full: $(STAMP) $(VENV)/.torch lint typecheck
	$(BIN)/densemoe build --profile full --ptx build/ptx
	$(BIN)/python -m pytest --full --numprocesses auto --dist loadfile --no-loadscope-reorder

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --no-isolation --outdir dist \
	    -C cmake.define.DENSEMOE_ARTIFACTS=$(CURDIR)/$(BUILT) -C cmake.define.DENSEMOE_LOCKED=$(LOCKED) \
	    -C cmake.define.DENSEMOE_PROFILE=$(PROFILE) -C cmake.define.DENSEMOE_ARCHITECTURES=$(ARCHITECTURES)

# DEVICE_PYTHON is the GPU machine's, as in 3.12, where it is not this one's
device-bundle: wheel
	$(BIN)/python scripts/device_bundle.py $(if $(DEVICE_PYTHON),--python $(DEVICE_PYTHON))

# for an owner of a B200 or B300 (docs/blackwell.md); refused on another device. --locked: a record is of the cubins that ship
PROOF ?= blackwell-proof.json
blackwell-proof: $(STAMP) $(VENV)/.torch
	$(BIN)/densemoe build --profile full --arch sm_100f --locked
	$(BIN)/densemoe proof --artifacts $(BUILT) --out $(PROOF)

clean:
	rm -rf $(BUILT) build dist device-bundle
