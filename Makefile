# One obvious way to do each thing. Every target sets up .venv by itself; a stamp file says what is already installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# errors only, without the nag for a newer pip
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
SEED ?= 0
JOBS ?= 2

.PHONY: demo reproduce-fashion notebooks test test-all test-twice test-slow test-oldest test-newest soak wheel lint bench gpu docs clean

$(VENV)/.package: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing etflight into $(VENV) (a few minutes the first time: torch is large) ..."
	$(PIP) install -e .
	@touch $@

$(VENV)/.test: $(VENV)/.package
	$(PIP) install -e '.[test]'
	@touch $@

$(VENV)/.docs: $(VENV)/.package
	$(PIP) install -e '.[docs]'
	@touch $@

$(VENV)/.lint: $(VENV)/.package
	@# the pip and setuptools that Python brings have known vulnerabilities, which the audit would find
	$(PIP) install --upgrade pip setuptools -e '.[lint]'
	@touch $@

# Three arms on scikit-learn's digits: fit, test, and the results side by side.
# One thread: on 8x8 images a second one gains little, and on a busy machine the two wait for each other.
demo: export OMP_NUM_THREADS = 1
demo: $(VENV)/.package
	@echo "Three classifiers learn scikit-learn's digits, of which the rarest class has 6 images and the largest 128: cross-entropy, the same with"
	@echo "balanced classes, and a fixed frame with dot regression. Each trains for 60 epochs, 42 seconds to 8 minutes by what else the machine does."
	@for arm in ce ce_balanced etf_dr_balanced; do \
		echo; echo "=== $$arm ==="; \
		if [ -e runs/demo/$$arm/checkpoints/last.ckpt ]; then resume="--ckpt_path last"; else resume=""; fi; \
		files="-c configs/data/digits.yaml -c configs/arms/$$arm.yaml"; \
		$(BIN)/etflight fit $$files --name demo/$$arm --seed_everything $(SEED) $$resume && \
		$(BIN)/etflight test $$files --ckpt_path runs/demo/$$arm/checkpoints/last.ckpt || exit 1; \
	done
	@$(BIN)/etflight report runs/demo/ce runs/demo/ce_balanced runs/demo/etf_dr_balanced
	@echo; echo "Next, in this folder:"
	@echo "  open runs/demo/etf_dr_balanced/figures/                              # how the classes move onto the frame"
	@echo "  $(BIN)/etflight configs                                            # the sets and methods there are"
	@echo "  $(BIN)/etflight fit -c configs/data/folder.yaml -c configs/arms/ce.yaml --data.root photos # your own images: photos/train/CLASS/, photos/test/CLASS/"

# The arms of the Fashion-MNIST table, three seeds each, trained from nothing: some 25 runs of 7 to 15 minutes; give the command again after a stop.
reproduce-fashion: $(VENV)/.package
	$(BIN)/etflight study configs/studies/fashion_mnist_lt.yaml --data.download true --jobs $(JOBS)

# Runs the notebooks in place, some minutes; the tests run them on smaller sizes.
notebooks: export OMP_NUM_THREADS = 1
notebooks: $(VENV)/.test
	$(BIN)/python -m notebooks.execute

# a file at a time to each process, since its tests share what is costly to set up; in their order, by which quick ones come last
PYTEST := $(BIN)/python -m pytest -m "not slow and not benchmark" -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: $(VENV)/.test
	$(PYTEST) --ignore tests/system

# With the program as a whole: every configuration through a step, kills and faults, several processes, hostile files, notebooks.
test-all: $(VENV)/.test
	$(PYTEST)

# As .ci/run has it: the few that fail are tried once more, since a busy machine is no reason to refuse a change, and named.
test-twice: $(VENV)/.test
	$(PYTEST) --cache-clear || $(BIN)/python .ci/second_try $$?

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

# The core of the suite with the oldest versions that pyproject.toml allows, or with the newest, in an environment of its own (6 GB).
# torch stays the one that is installed: another is a download of 3 GB, as in
# make test-oldest TORCH="torch==2.11.0 torchvision==0.26.0 torchcodec==0.16.0"
test-oldest test-newest: export TORCH := $(TORCH)
test-oldest test-newest: test-%: $(VENV)/.test
	PYTHON="$(PYTHON)" JOBS=$(JOBS) .ci/versions $*

# Kills a training at random moments and compares; its tally is in docs/reliability.md.
soak: $(VENV)/.test
	$(BIN)/python -m pytest -m slow tests/system/test_soak.py -s

bench: $(VENV)/.test
	$(BIN)/python -m pytest -m benchmark -s

# What only a GPU can show, in pieces of under eight minutes; give it again after a stop. Without a GPU: make gpu DRY=--dry-run
gpu: $(VENV)/.test
	$(BIN)/python .ci/gpu $(PIECES) $(DRY)

# The wheel in an empty environment: some minutes, since torch is large.
wheel: $(VENV)/.test
	$(BIN)/python -m pytest -m slow tests/system/test_wheel.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	.ci/audit $(BIN)

# The documentation, with warnings as errors, in docs/build/html/index.html.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/build/html

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist *.egg-info
