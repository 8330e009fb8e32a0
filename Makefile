PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Threads that spin while they wait take the core from those that work; offline, because nothing here needs the Hub.
ENVIRONMENT := OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test clean

demo: $(BIN)/installed
	rm -rf outputs/demo
	$(ENVIRONMENT) $(BIN)/accelerate launch recipes/whisper_lora/run.py recipes/whisper_lora/demo.yaml

# The files of tests are shared out among the cores, one thread each.
test: $(BIN)/installed
	OMP_NUM_THREADS=1 $(ENVIRONMENT) $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

$(BIN)/installed: requirements.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf .venv outputs
