# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# glibc gives large arrays back to the kernel as soon as they are freed, and a third of the time goes into page faults.
export MALLOC_ARENA_MAX := 1
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 17179869184
export MALLOC_TOP_PAD_ := 268435456

.PHONY: demo verify test test-slow lint fuzz benchmark embedded study truth clean cheats

demo: $(STAMP)
	@if [ -e run ]; then echo "make demo writes into ./run, which exists: move it away first"; exit 1; fi
	$(BIN)/mdl compare --out run

# Decodes what the demo sent in fresh processes, and works every figure of it out again.
verify: $(STAMP)
	$(BIN)/mdl verify run

test: $(STAMP) lint
	$(BIN)/python -m pytest -q -n auto --dist loadscope

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

# Every cheat of the table in README.md, tried; brings that table up to date.
cheats: $(STAMP)
	$(BIN)/python tests/cheats

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A million mutated messages, on two processes; prints how each of them ended.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.fuzz_messages --count 1000000 --processes 2

# Speed and overhead of the codes, against general compressors and raw floats; writes experiments/codes_benchmark/results.json.
benchmark: $(STAMP)
	$(BIN)/python -m experiments.codes_benchmark.run

# Retrains what is shipped: about an hour for the model and a quarter of one for its SAEs, ten minutes for its transcoder, on two cores.
embedded: $(STAMP)
	$(BIN)/python -m experiments.embedded_model.train --out runs/embedded
	$(BIN)/python -m experiments.embedded_model.train_saes --model runs/embedded/embedded-python-gpt2 --out runs/embedded/saes
	$(BIN)/python -m experiments.embedded_model.train_transcoder --model runs/embedded/embedded-python-gpt2 --out runs/embedded/transcoders
	$(BIN)/python -m experiments.embedded_model.evaluate

# SAE or PCA? Trains, scores and draws everything in experiments/sae_vs_pca, and says how long that took; it can be
# interrupted. STORIES="--stories DIR" adds a model of others.
study: $(STAMP)
	$(BIN)/python -m experiments.sae_vs_pca $(STORIES)

# Does the score find the truth? Trains toy models whose parts are known, and scores the truth against its rivals on ten
# seeds each: some two hours of processor time, which can be interrupted.
truth: $(STAMP)
	$(BIN)/python -m experiments.weight_truth.run
	$(BIN)/python -m experiments.compiled_programs.run

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) run runs
