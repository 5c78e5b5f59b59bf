# Every target sets up what it needs in .venv. The first run downloads; later runs start at once.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# What the evidence is drawn from and kept in.
LORAS := tools/toybox/loras
EVIDENCE := docs/evidence
RESULTS := OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/toybox/results.py $(LORAS)

.PHONY: toybox results results-full help demo test check fix bench docs fuzz crash

help:
	@echo "make demo    merge twelve concepts offline and write demo/report.html"
	@echo "make test    run the tests"
	@echo "make check   lint, formatting, types"
	@echo "make fix     mend what the linter and the formatter can"
	@echo "make bench   the solver against the published optimiser, every method against PEFT"
	@echo "make docs    rewrite what is made from the code: docs/methods.md and the README's table"
	@echo "make fuzz    12,000 damaged files through every reader"
	@echo "make crash   kill merges, trainings and packs at random moments, look at what is left, run them again"
	@echo "make results the paper's Table 1 drawn anew on the toybox and compared with docs/results.md: under an hour of two cores"
	@echo "make results-full  that and the figures, whatever is not there yet: hours"
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
	$(BIN)/python -m benchmarks.end_to_end

docs: .venv/dev.stamp
	$(BIN)/loraclr methods --markdown .

# Draws Table 1 anew beside the committed rows, says where they disagree, and draws some pictures of every kind of row again.
results: .venv/dev.stamp
	$(RESULTS) build/results/table1.json
	$(BIN)/python tools/toybox/report.py $(EVIDENCE) docs/results.md
	$(BIN)/python tools/toybox/report.py $(EVIDENCE) docs/results.md --against build/results/table1.json
	$(RESULTS) $(EVIDENCE)/table1.json --check 64

# Only what is missing in docs/evidence is drawn; remove a file there to have it drawn anew.
results-full: .venv/dev.stamp
	$(RESULTS) $(EVIDENCE)/table1.json
	$(RESULTS) $(EVIDENCE)/scenes.json --figure scenes --seeds 1
	$(RESULTS) $(EVIDENCE)/mixture.json --figure mixture --seeds 1
	$(RESULTS) $(EVIDENCE)/counts.json --figure counts --seeds 1
	$(RESULTS) $(EVIDENCE)/margins.json --figure margins --seeds 1
	test -f $(EVIDENCE)/inputs.json || $(MAKE) -C tools/toybox sweep
	$(subst $(LORAS),build,$(RESULTS)) $(EVIDENCE)/inputs.json --figure inputs --seeds 1
	$(BIN)/python tools/toybox/report.py $(EVIDENCE) docs/results.md

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
