# Two commands do all of their own set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready

.PHONY: demo test lint clean

demo: $(READY)
	$(PY) -m decoder

test: lint
	$(PY) -m pytest -n auto --dist loadfile

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy -p moesd_kernels -p decoder -p bench -p training

# torch goes in first, so that setup.py finds it and builds the C++ extension ahead of time
# (--no-build-isolation: the build must see this torch, not one of its own).
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/cpu/* csrc/cuda/*)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt setuptools torch==2.13.0 ninja
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info moesd_kernels/*.so
