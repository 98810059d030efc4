# make demo      twenty clients fine-tune a real encoder; three methods side by side
# make test      the kernel and the guards, about a minute
# make test-all  all tests of one machine      make test-slow  real models and a browser, an hour
# make test-lowest       the tests with the lowest versions of every package (brings torch for GPUs)
# make test-processors   the tests that arithmetic decides, as other processors and with two threads
# make check     formatting, lint, types
# make demo TASK=chat   with a small chat model; TASK=preference   preference tuning of it (DPO)
# make test-flower   federations of real processes and what befalls them, about 20 minutes
# make soak-flower   twenty rounds in which sites, SuperLink and coordinator are killed
# make test-faults   kills, full disks and power cuts at every file operation, about 20 minutes
# make soak          1,000 rounds of 100 clients with faults and kills, about 6 minutes
# make reliability   both, and their figures into docs/reliability.md
# make test-mutants   each validation is taken out in turn, and a test must fail
# make fuzz TARGET=rows SECONDS=600   gives a reader (tests/fuzz) as many inputs as fit
# make results   the studies of docs/results.md, hours; it can be stopped and goes on; STUDY=e1 for one
# make docs      the pages as a site in build/site, links checked; make docs-serve shows it
# make locked    installs by hashes (requirements.lock); make supply   SBOM, and a wheel built twice
# make bench     measurements beside other programs, about 40 minutes; docs/performance.md
# make check-gpu right results, speed and memory on this machine's GPU, 8 minutes; REHEARSE=1 on a CPU
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2

.PHONY: lock locked supply install demo test test-wide test-lowest test-processors test-all test-slow \
  test-flower soak-flower test-faults soak reliability test-mutants fuzz check results docs docs-serve bench \
  check-gpu build clean

install: $(VENV)/installed

# torch goes first and by version: a range would take a build with gigabytes of CUDA libraries
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,flower]'
	touch $@

demo: install
	$(BIN)/rolora demo --task $(or $(TASK),classification)

test: install
	$(PYTEST)

test-wide: install
	$(PYTEST) -m "wide and not slow and not flower and not faults" -rs

LOWEST := .venv-lowest

test-lowest: $(LOWEST)/installed
	$(subst $(BIN),$(LOWEST)/bin,$(PYTEST)) -rs

$(LOWEST)/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[dev,flower]'
	touch $@

# what a processor can change: products, sums and random draws
ARITHMETIC := $(addprefix tests/test_,segments.py bank.py dropout.py packing.py reduce.py)

test-processors: install
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) $(ARITHMETIC)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX512_CORE $(PYTEST) $(ARITHMETIC)
	ATEN_CPU_CAPABILITY=default OMP_WAIT_POLICY=PASSIVE $(subst THREADS=1,THREADS=2,$(PYTEST)) -n 0 $(ARITHMETIC)

test-all: test test-wide

test-slow: install
	$(PYTEST) -m "(slow or browser) and not faults" -rs

test-flower: install
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -m "flower and not soak" -rs

soak-flower: install
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -m soak -rs -s

# processes are forked, so everything is on one thread and in one process of pytest
FAULTS := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -rs -s

test-faults: install
	$(FAULTS) -m "faults and not slow" $(RECORD)

soak: install
	$(FAULTS) -m "faults and slow" $(RECORD)

reliability: RECORD := --record
reliability: test-faults soak
	$(BIN)/python docs/make_reliability.py

test-mutants: install
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m tests.mutants $(NAMES)

# atheris is for Linux, and no part of an installation
FUZZ := .venv-fuzz

fuzz: $(FUZZ)/installed
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	  $(FUZZ)/bin/python -m tests.fuzz $(or $(TARGET),rows) --seconds $(or $(SECONDS),60)

$(FUZZ)/installed: pyproject.toml constraints.txt tests/fuzz/requirements.txt
	$(PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(FUZZ)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,flower]'
	$(FUZZ)/bin/python -m pip install --quiet --requirement tests/fuzz/requirements.txt
	touch $@

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

results: install
	$(BIN)/rolora fetch mnist trec minilm snippets
	OMP_NUM_THREADS=1 $(BIN)/python experiments/run_studies.py $(STUDY)
	$(BIN)/python docs/make_results.py

# the other programs get an environment of their own: Flower's versions do not go with ours
PEERS := .venv-bench

bench: install $(PEERS)/installed
	$(BIN)/python -m benchmarks --peers $(PEERS)/bin/python $(BENCH)
	$(BIN)/python docs/make_performance.py

# on a machine with a GPU: CHECK_PYTHON names an environment with a CUDA build of torch; REHEARSE=1
# tries the check itself on a CPU
check-gpu:
	PYTHONPATH=src $(or $(CHECK_PYTHON),$(BIN)/python) -m benchmarks.check_gpu $(if $(REHEARSE),--rehearse)

$(PEERS)/installed: benchmarks/constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet "$$(grep '^torch==' $<)"
	$(PEERS)/bin/python -m pip install --quiet --requirement $<
	touch $@

# mkdocs and what it needs, beside everything else, so that a notebook's kernel finds rolora
$(VENV)/documenting: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/documenting
	$(BIN)/python -m mkdocs --quiet build --strict

docs-serve: $(VENV)/documenting
	$(BIN)/python -m mkdocs serve

build: install
	$(BIN)/python -m build --outdir dist

# every file by its hash, and nothing that is not listed; torch goes by version alone, since its
# builds for CPUs and GPUs share one
locked:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	touch $(VENV)/installed

SUPPLY := .venv-supply

# the packages that go with torch's builds for GPUs are left out with it
lock:
	$(PYTHON) -m venv $(SUPPLY)
	$(SUPPLY)/bin/python -m pip install --quiet uv
	$(SUPPLY)/bin/uv pip compile --quiet --no-header --no-annotate --generate-hashes \
	  --python-version 3.11 --python-platform x86_64-unknown-linux-gnu \
	  --constraint constraints.txt --extra flower --extra dev pyproject.toml \
	  | awk '/^[a-z0-9]/ { keep = $$1 !~ /^(torch==|triton|nvidia-|cuda-)/ } keep' > requirements.lock
	$(SUPPLY)/bin/uv pip compile --quiet --no-header --no-annotate --resolution lowest-direct \
	  --python-version 3.11 --python-platform x86_64-unknown-linux-gnu \
	  --extra flower --extra dev pyproject.toml | grep -v '^nvidia-' > constraints-lowest.txt

# what an installation consists of (CycloneDX), and whether a wheel is the same bytes each time
supply: install
	$(PYTHON) -m venv $(SUPPLY)
	$(SUPPLY)/bin/python -m pip install --quiet cyclonedx-bom
	mkdir -p dist
	$(SUPPLY)/bin/cyclonedx-py environment --output-reproducible --output-file dist/sbom.json $(BIN)/python
	for turn in 1 2; do $(BIN)/python -m build --quiet --wheel --no-isolation --outdir build/$$turn; done
	cmp build/1/*.whl build/2/*.whl

clean:
	rm -rf $(VENV) $(PEERS) $(FUZZ) $(LOWEST) build dist .mypy_cache .pytest_cache .ruff_cache
