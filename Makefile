# Every target sets up what it needs in .venv. The first run downloads; later runs start at once.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# What the evidence is drawn from and kept in.
LORAS := tools/toybox/loras
EVIDENCE := docs/evidence
RESULTS := OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/toybox/results.py $(LORAS)
# Of the table.
SEEDS := 2
REPORT := $(BIN)/python tools/toybox/report.py $(EVIDENCE) docs/results.md
TRAIN := $(MAKE) -C tools/toybox BASE=$(abspath src/loraclr/toybox/data/base) SPLITS=test

.PHONY: toybox results results-full study help demo test check fix bench docs fuzz crash

help:
	@echo "make demo    merge twelve concepts offline and write demo/report.html"
	@echo "make test    run the tests"
	@echo "make check   lint, formatting, types"
	@echo "make fix     mend what the linter and the formatter can"
	@echo "make bench   the solver against the published optimiser, every method against PEFT"
	@echo "make docs    rewrite what is made from the code: docs/methods.md and the README's table"
	@echo "make fuzz    12,000 damaged files through the readers of adapters, checkpoints, packs, pictures and studies"
	@echo "make crash   kill merges, conversions, trainings, pictures and packs at random moments, look at what is left, run them again"
	@echo "make results the core of the paper's Table 1 drawn anew on the toybox and compared with docs/results.md: under an hour of two cores"
	@echo "make results-full  the whole table and the figures, whatever is not there yet: hours"
	@echo "make study   an example of the user study, with the pictures of results-full, on http://127.0.0.1:8765/"
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

# Draws Table 1's core rows anew, merges included, beside the committed ones, says where they disagree, and draws some pictures of others again.
results: .venv/dev.stamp
	rm -rf build/again
	$(RESULTS) build/again/table1.json core --work build/again --seeds $(SEEDS)
	$(REPORT)
	$(REPORT) --against build/again/table1.json
	$(RESULTS) $(EVIDENCE)/table1.json --check 64 --work build/again

# Only what is missing in docs/evidence, or was made of other files or settings, is drawn. The last two figures train their adapters first.
results-full: .venv/dev.stamp
	$(RESULTS) $(EVIDENCE)/table1.json --seeds $(SEEDS)
	$(REPORT)
	for figure in scenes mixture counts margins; do \
	  $(RESULTS) $(EVIDENCE)/$$figure.json --figure $$figure --seeds 1 && $(REPORT) || exit 1; done
	test -f $(EVIDENCE)/inputs.json || { $(TRAIN) sweep && $(subst $(LORAS),build,$(RESULTS)) $(EVIDENCE)/inputs.json --figure inputs --seeds 1; }
	test -f $(EVIDENCE)/beyond.json || { $(TRAIN) bulk && $(subst $(LORAS),build/adapters,$(RESULTS)) $(EVIDENCE)/beyond.json --figure beyond --seeds 1; }
	$(REPORT)
	$(BIN)/python tools/toybox/sheets.py build/results docs/figures

# The study of the paper's Table 2 with our own pictures. Nobody has answered it.
study: .venv/dev.stamp
	test -d build/study || $(BIN)/python tools/toybox/example_study.py build/study
	$(BIN)/loraclr study serve build/study

toybox: .venv/dev.stamp
	$(MAKE) -C tools/toybox

fuzz: .venv/dev.stamp
	$(BIN)/python -W ignore tests/fuzzing.py 12000

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
