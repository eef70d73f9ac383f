# Two commands: `make demo` and `make test`. Both need Python 3.11, make, and the package index; no GPU.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
BIN := $(VENV)/bin

.PHONY: install demo test test-all lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
		|| { echo "maxreel needs Python 3.11 or 3.12; run: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[offline,rapidocr,sample,gpu,dev]'
	touch $@

demo: install
	$(BIN)/maxreel sample $(DEMO)/corpus
	$(BIN)/maxreel index $(DEMO)/corpus/manifest.jsonl --store $(DEMO)/store --set max_failure_rate=0.2
	$(BIN)/maxreel failures --store $(DEMO)/store
	$(BIN)/maxreel build-index --store $(DEMO)/store
	$(BIN)/maxreel evaluate --store $(DEMO)/store \
		--queries $(DEMO)/corpus/queries.jsonl --qrels $(DEMO)/corpus/qrels.txt --out $(DEMO)/evaluation
	$(BIN)/maxreel report $(DEMO)/evaluation
	$(BIN)/maxreel search "sounds of marine mammals" -k 1 --explain -q --store $(DEMO)/store
	$(BIN)/maxreel search "shoes at half price" -k 1 --explain -q --store $(DEMO)/store
	$(BIN)/maxreel search "a cat" -k 1 --explain -q --store $(DEMO)/store

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q

test-all: lint
	$(BIN)/python -m pytest -q --slow

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
