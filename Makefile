# Every target sets up what it needs in .venv. The first run downloads; later runs start at once.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: toybox help demo test check fix bench docs fuzz crash

help:
	@echo "make demo    merge twelve concepts offline and write demo/report.html"
	@echo "make test    run the tests"
	@echo "make check   lint, formatting, types"
	@echo "make fix     mend what the linter and the formatter can"
	@echo "make bench   the solver against the published optimiser, every method against PEFT"
	@echo "make docs    rewrite what is made from the code: docs/methods.md and the README's table"
	@echo "make fuzz    12,000 damaged files through every reader"
	@echo "make crash   kill merges and trainings at random moments, look at what is left, run them again"
	@echo "make toybox  train the toybox's adapters anew and measure them: needs a trained base in build/, and hours"

demo: .venv/diffusion.stamp
	$(BIN)/loraclr demo

test: .venv/dev.stamp
	$(BIN)/python -m pytest -q

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev.stamp
	$(BIN)/python -m benchmarks.solver
	$(BIN)/python -m benchmarks.methods

docs: .venv/dev.stamp
	$(BIN)/loraclr methods --markdown .

toybox: .venv/dev.stamp
	$(MAKE) -C tools/toybox

fuzz: .venv/dev.stamp
	$(BIN)/python tests/fuzzing.py 12000

crash: .venv/dev.stamp
	$(BIN)/python -W ignore tests/crashing.py 200

# torch goes first and alone: resolved together with the rest, pip may choose a build that brings gigabytes of CUDA packages.
.venv/torch.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $$(grep '^torch==' constraints.txt)
	touch $@

.venv/%.stamp: pyproject.toml constraints.txt .venv/torch.stamp
	$(PIP) --editable '.[$*]'
	touch $@
