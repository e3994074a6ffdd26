# `make help` lists what there is. Python and pip are enough; everything is installed into .venv.
PYTHON ?= python3
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
CHAPTER ?=
SEEDS ?= 20
NOTEBOOKS = $(shell find book -name '*.ipynb' -not -name ledger.ipynb -not -path '*/.ipynb_checkpoints/*' | sort)
CHOSEN = $(if $(CHAPTER),$(filter %/$(CHAPTER).ipynb,$(NOTEBOOKS)),$(NOTEBOOKS))
VENV := .venv
BIN := $(VENV)/bin
HTML := _build/html/index.html
# What a chapter's own tests are: those that use its module.
TESTS = $(shell grep -lE 'helpers(\.| import .*\b)$(CHAPTER)\b' tests/test_*.py)

COMMA := ,
EXTRAS_book := book
EXTRAS_lab := lab,pretrained
EXTRAS_test := book,test,pretrained
EXTRAS_bench := bench

.DEFAULT_GOAL := help
.PHONY: help book html page test devices browser look lint lab execute ledger data reseed bench pages-bench constraints clean
.DELETE_ON_ERROR:

# Bytecode is kept, whatever the shell says: else each of some forty processes would compile torch and SymPy again.
unexport PYTHONDONTWRITEBYTECODE

# What is stored in the notebooks was computed like this: one thread, so that sums have one order, and one seed.
test execute ledger: export BOOK_DEVICE := cpu
test execute ledger: export BOOK_SEED := 0
test execute ledger: export TQDM_DISABLE := 1
test execute ledger: export OMP_NUM_THREADS := 1
test execute ledger: export OPENBLAS_NUM_THREADS := 1
test execute ledger: export MKL_NUM_THREADS := 1
test execute ledger: export VECLIB_MAXIMUM_THREADS := 1
EXECUTE := $(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level=WARN \
  --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.extra_arguments=--IPKernelApp.log_level=ERROR

help:  ## list the targets
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "make %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

book: html  ## build the HTML from the notebooks' stored outputs
	@echo "The book is built. Open $(HTML) in a browser."

html: $(VENV)/.installed-book
	$(BIN)/jupyter-book build . -W -n --keep-going --all

page: $(VENV)/.installed-book  # builds only what has changed
	$(BIN)/jupyter-book build . -W -n --keep-going

test: $(VENV)/.installed-test lint  ## check everything that CI checks, or what CHAPTER=minibatch_loss consists of
	@test -n "$(CHOSEN)" || { echo "no notebook is called $(CHAPTER).ipynb" >&2; exit 1; }
	PYTHONPATH=$(CURDIR)/tests/no_network $(BIN)/pytest -n $(JOBS) --no-loadscope-reorder --nbval --nbval-current-env \
	  $(if $(CHAPTER),$(CHOSEN) $(TESTS) tests/test_book.py,book tests --ignore tests/any_device --ignore tests/browser)
	$(MAKE) --jobs $(JOBS) devices $(if $(CHAPTER),page,html)  # one process each
	$(MAKE) look

devices: $(VENV)/.installed-test
	$(BIN)/pytest tests/any_device  # adds a device to its process

browser: html  ## build the book and look at every page in an installed Chromium
	$(MAKE) look

look: $(VENV)/.installed-test
	$(BIN)/pytest -n $(JOBS) -rs tests/browser $(if $(CHAPTER),-k $(CHAPTER))

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: $(VENV)/.installed-lab  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab book

execute: $(VENV)/.installed-test  ## run all notebooks, or CHAPTER=minibatch_loss, and store their outputs
	@test -n "$(CHOSEN)" || { echo "no notebook is called $(CHAPTER).ipynb" >&2; exit 1; }
	@printf '%s\n' $(CHOSEN) | xargs -n 1 -P $(JOBS) $(EXECUTE)
	@$(MAKE) ledger

ledger: $(VENV)/.installed-test
	$(EXECUTE) book/ledger.ipynb

data: $(VENV)/.installed-test  ## train again what is too long for a chapter, and store the results
	$(BIN)/python -m helpers.data.minibatch_loss
	$(BIN)/python -m helpers.data.initialization
	$(BIN)/python -m helpers.data.gradient_noise
	$(BIN)/python -m helpers.data.normalization
	$(BIN)/python -m helpers.data.dropout

reseed: $(VENV)/.installed-test  ## check every claim under SEEDS=20 fresh seeds, or SEED=7; on Dask: SCHEDULER=tcp://host:8786
	$(BIN)/python -m helpers.lab.reseed --seeds $(SEEDS) --jobs $(JOBS) $(if $(SEED),--seed $(SEED)) \
	  $(if $(SCHEDULER),--scheduler $(SCHEDULER)) $(NOTEBOOKS)

bench: $(VENV)/.installed-bench  ## time the helpers beside Opacus, BackPACK, bare random numbers and plain loops
	$(BIN)/python -m benchmarks

pages-bench: html $(VENV)/.installed-test  ## time the pages on a desktop and an emulated phone
	$(BIN)/python -m tests.browser.times

constraints: $(VENV)/.created  ## renew constraints.txt; torch stays until its line there is edited
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	grep '^torch==' constraints.txt > $(VENV)/torch.txt
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade --quiet \
	  --no-header --no-annotate --no-emit-index-url --constraint $(VENV)/torch.txt --output-file constraints.txt

clean:  ## remove what was built, but keep .venv
	rm -rf _build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt \
	  --no-build-isolation --editable '.[$(EXTRAS_$*)]'
	@$(BIN)/python -c 'import matplotlib.pyplot'  # builds its font cache, which else is reported inside a notebook
	@touch $(patsubst %,$(VENV)/.installed-%,$(subst $(COMMA), ,$(EXTRAS_$*)))

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null 2>&1 || \
	  { echo "Python 3.11 or newer is needed, but '$(PYTHON)' was not found: try make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, but this is $$($(PYTHON) --version 2>&1): try make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv module is needed: on Debian and Ubuntu, install the package python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
