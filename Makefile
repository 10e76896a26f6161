# The road from a clone to a result: `make demo`, `make test`. Everything happens in .venv, is done once, and needs
# no network the second time. Paths are relative throughout, so that a folder with spaces in its name will do.
#
#   PYTHON=python3.12    the interpreter to make .venv with (3.11 to 3.13; the first that fits is taken)
#   TORCH_INDEX=URL      another package index for torch alone, for a CPU-only or a CUDA build
#   DEMO_OUT=FOLDER      where the demo writes
#   PYTEST_ARGS=...      instead of -n auto --dist worksteal, a process a core: for instance -n 0, or -n 2 -m "not slow"

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
TORCH_INDEX ?=
DEMO_OUT ?= demo-out
PYTEST_ARGS ?= -n auto --dist worksteal

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
SOURCES := $(wildcard $(addprefix laconic/kernels/cpu/,*.cpp *.hpp *.inl simd/*.hpp targets/*.cpp))

.DELETE_ON_ERROR:
.PHONY: help install demo test lint docs sanitize neon wheel clean distclean

help:
	@echo "make demo       compress a real network on real data, and report"
	@echo "make test       lint, types, and all tests"
	@echo "make lint       ruff and mypy alone"
	@echo "make docs       build the site into site/"
	@echo "make sanitize   the kernels' tests on a build that stops at every wrong address (GCC or Clang)"
	@echo "make neon       the NEON kernels against the portable ones, under qemu (or on an ARM machine, see NEON_CXX)"
	@echo "make install    set up .venv alone"
	@echo "make wheel      build a wheel and an sdist into dist/"
	@echo "make clean      remove what was built (the next make installs again, without network)"
	@echo "make distclean  remove .venv too"

# --- set-up: one stamp per step ---------------------------------------------------------------------------------------

.venv/.made:
	@test -n "$(PYTHON)" || { echo "laconic needs Python 3.11, 3.12 or 3.13 on PATH (or PYTHON=...)"; exit 1; }
	rm -rf .venv
	$(PYTHON) -m venv .venv
	@touch $@

# torch first: whatever is installed later finds the build that was asked for in place. From an index of its own it
# comes alone, since such an index holds no pinned versions of what torch needs; that follows with laconic.
.venv/.torch: constraints.txt .venv/.made
	$(PIP) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	@touch $@

# The tools of the build are installed like anything else, so that installing again needs no network.
.venv/.tools: constraints.txt .venv/.torch
	$(PIP) scikit-build-core nanobind cmake ninja build
	@touch $@

.venv/.installed: pyproject.toml CMakeLists.txt constraints.txt $(SOURCES) .venv/.tools
	$(PIP) --no-build-isolation -e '.[tasks,test]'
	@$(BIN)/python -c 'from laconic.kernels import native; s = native.status(); \
	  print("C++ kernels:", s["isa"] if s["present"] else s["why"])'
	@touch $@

install: .venv/.installed

# --- what it is for ---------------------------------------------------------------------------------------------------

demo: .venv/.installed
	$(BIN)/laconic compress --task minilm-bbc --budget "size=4x, latency=1.5x, drop=1" --seq 32 --out "$(DEMO_OUT)" --overwrite
	@echo "The report: $(DEMO_OUT)/report.html"

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# Strict: a dead link, or a public name without a docstring, stops the build.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "The site: site/index.html"

# The extra `docs`, by itself: naming it with laconic would build the kernels again.
.venv/.docs: constraints.txt | .venv/.installed
	$(PIP) mkdocs mkdocs-material 'mkdocstrings[python]'
	@touch $@

# Sanitizers have to be loaded before Python; leaks are torch's own. OpenMP's threads would hide where a fault is.
SANITIZED := build/sanitize
CXX ?= c++
sanitize: .venv/.installed
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_BUILD_TYPE=None -DLACONIC_SANITIZE=ON \
	  -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	  -Dnanobind_DIR="$$($(BIN)/python -m nanobind --cmake_dir)"
	$(BIN)/cmake --build $(SANITIZED)
	LACONIC_KERNELS="$$(ls $(SANITIZED)/_cpu*.so)" LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python -m pytest -x -q -p no:xdist tests/kernels tests/nn/test_blocks.py --ignore=tests/kernels/test_native.py

# The kernels of AArch64 on any Linux machine: Debian's g++-aarch64-linux-gnu and qemu-user. No Python, no torch: what
# they must equal is the portable kernels, which PyTorch holds to the truth. On ARM: make neon NEON_CXX=c++ NEON_RUN=
NEON := build/neon
NEON_CXX ?= aarch64-linux-gnu-g++
NEON_RUN ?= qemu-aarch64
NEON_CASES ?= 300
NEON_FLAGS := -std=c++20 -O1 -ffp-contract=off -Wall -Wextra -Ilaconic/kernels/cpu
NEON_PARTS := $(filter-out module.cpp bind_%,$(notdir $(wildcard laconic/kernels/cpu/*.cpp))) targets/portable.cpp targets/neon.cpp
neon: $(NEON)/compare
	$(NEON_RUN) $< $(NEON_CASES)

$(NEON)/compare: tests/native/compare.cpp $(addprefix $(NEON)/,$(NEON_PARTS:.cpp=.o))
	$(NEON_CXX) $(NEON_FLAGS) -static $^ -o $@

$(NEON)/%.o: laconic/kernels/cpu/%.cpp $(SOURCES)
	@command -v $(NEON_CXX) > /dev/null || { echo "make neon needs $(NEON_CXX): a compiler for AArch64, and qemu-user"; exit 1; }
	@mkdir -p $(@D)
	$(NEON_CXX) $(NEON_FLAGS) -c $< -o $@

wheel: .venv/.installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:
	rm -rf build dist site .venv/.installed .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find laconic tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
