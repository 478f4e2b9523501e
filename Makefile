# make demo: everything from nothing.  make chat-demo: then a chat.  make test: install and test.  make ui: the MLflow UI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo chat-demo test test-slow coverage chaos check format bench bench-data ui cluster-files lock docs clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; give a newer one: make setup PYTHON=python3.12"; exit 1; }
	@echo "installing the pinned versions of constraints.txt into $(VENV) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $(INSTALLED)

demo: setup
	@$(BIN)/python jobs/demo.py --config configs/demo.yaml

# after make demo: its model is fine-tuned on conversations, then answers once
chat-demo: setup
	@$(BIN)/python jobs/demo.py --chat

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

# the normal suite with lines counted, in jobs and ranks that it starts too (CONTRIBUTING.md says what is missed)
coverage: setup
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[coverage]'
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -m "not slow"
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --sort=cover

# make chaos CHAOS_KILLS=33 CHAOS_SEED=2026: kills over training on four workers, some 20 minutes; docs/reliability.md
chaos: setup
	$(BIN)/python -m pytest --log-cli-level=INFO tests/training/test_training_chaos.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

CORPUS ?= ../shared/corpus
GPT2 ?= ../shared/gpt2

# make bench SECTIONS="encode texts": the tokenizer against its peers, some minutes
bench: setup
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[benchmark]'
	@$(BIN)/python benchmarks/bpe.py $(SECTIONS) --corpus $(CORPUS) --vocab $(GPT2)/vocab.json --merges $(GPT2)/merges.txt

# make bench-data PEER=PATH_TO_PYTHON_WITH_DATATROVE: the data pipeline against one bare core, plain tasks and datatrove
bench-data: setup
	@$(BIN)/python benchmarks/data_pipeline.py $(SECTIONS) --corpus $(CORPUS) --vocab $(GPT2)/vocab.json --merges $(GPT2)/merges.txt $(if $(PEER),--peer_python $(PEER))

# the pages of docs/ as a site in build/docs; a warning, such as a link that leads nowhere, is an error
docs: setup
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@$(BIN)/python -m sphinx -W --keep-going -E -q -b html docs build/docs
	@echo "build/docs/index.html"

ui: setup
	@$(BIN)/python -m pipeline.tracking.mlflow_ui

# what `ray up` copies to every node: the token of the cluster, and the environment of its jobs (docs/cluster.md)
cluster-files:
	@umask 077; mkdir -p $(HOME)/.ray; touch $(HOME)/.gpt-2.5.env; chmod 600 $(HOME)/.gpt-2.5.env
	@find $(HOME)/.ray/auth_token -perm /077 -delete 2> /dev/null || true  # others could read it: it is no secret any more
	@umask 077; test -s $(HOME)/.ray/auth_token || RAY_AUTH_MODE=token $(BIN)/ray get-auth-token --generate > /dev/null
	@chmod 600 $(HOME)/.ray/auth_token
	@echo "~/.ray/auth_token is there; write GPT25_HOME=gs://BUCKET/FOLDER and your tokens into ~/.gpt-2.5.env"

# deploy/requirements.lock: what the nodes of a cluster install, by version and hash
lock: setup
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lock]'
	@mkdir -p build
	@for version in 3.11 3.12; do \
	  $(BIN)/uv pip compile --quiet --python-version $$version --python-platform x86_64-manylinux_2_28 --only-binary :all: \
	    --generate-hashes --no-header --no-annotate --no-emit-index-url --constraint constraints.txt \
	    --extra gcp --extra s3 --extra languages pyproject.toml --output-file build/lock-$$version || exit 1; \
	done
	@cmp build/lock-3.11 build/lock-3.12  # one file does for both
	@sed -n '/^#/p' deploy/requirements.lock > build/lock-head
	@cat build/lock-head build/lock-3.11 > deploy/requirements.lock

clean:
	rm -rf data/demo data/demo-stories.jsonl runs/demo data/demo-chat data/demo-chats.jsonl runs/demo-chat build *.egg-info .ruff_cache .mypy_cache .hypothesis
