# Each target sets up .venv itself, and only when something has changed. `make help` explains them.

PYTHON ?= python3
JOBS ?= 5
BIN := .venv/bin
# Tests and bench start hundreds of Python processes; without caching each would compile every module.
CACHING := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python
RUN_READY := .venv/.ready-run
DEV_READY := .venv/.ready-dev

.DEFAULT_GOAL := help
.PHONY: help run test test-ollama test-vllm test-local-services simulate lint format bench demo-models lock clean

help: ## explain the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-19s %s\n", $$1, $$2}'

run: $(RUN_READY) ## set up and serve at http://127.0.0.1:8787
	@$(BIN)/gunicorn --config gunicorn.conf.py

test: $(DEV_READY) browser docker ## set up and run every test, JOBS=5 files at a time
	@$(CACHING) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-ollama: $(DEV_READY) ## the Ollama tests with a real Ollama: OLLAMA=/path/to/ollama OLLAMA_TEST_MODEL=name
	@OLLAMA_TEST_BINARY="$(OLLAMA)" $(BIN)/python -m pytest tests/engines/test_ollama_server.py tests/engines/test_fake_ollama.py $(ARGS)

test-vllm: $(DEV_READY) docker ## the vLLM tests with a real vLLM: its CPU build in .venv-vllm (4 GB), in real containers
	@PYTHON="$(PYTHON)" tools/ensure_vllm.sh
	@$(BIN)/python -m pytest tests/vllm_real --timeout 1200 $(ARGS)

test-local-services: $(DEV_READY) ## the image and vision servers with tiny models, on torch's CPU build in .venv-local-services (1.3 GB)
	@PYTHON="$(PYTHON)" tools/ensure_local_services.sh
	@$(CACHING) -m pytest tests/local_services -n 2 --dist loadscope $(ARGS)

simulate: $(DEV_READY) ## random operations on the in-memory heart (switcher, router, relay): STEPS=1000000 SEED=1
	@$(CACHING) -m tests.heart.simulate $(or $(STEPS),100000) $(or $(SEED),1)

lint: $(DEV_READY) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(DEV_READY) ## format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(DEV_READY) ## measure the hot paths into bench/results.md, and print it; ARGS=--short only tries everything
	@$(CACHING) -m bench $(ARGS)

.PHONY: fuzz
fuzz: $(DEV_READY) ## fuzz the GGUF header reader: SECONDS=600
	@$(CACHING) -m bench.fuzz_gguf $(or $(SECONDS),600)

.PHONY: soak
soak: $(DEV_READY) ## soak test: concurrent clients and faults on one real console: OPERATIONS=1000 SEED=7
	@$(CACHING) -m tests.soak $(or $(OPERATIONS),1000) $(or $(SEED),7)

demo-models: ## train the demo models (minutes; torch in its own .venv-train)
	@test -d .venv-train || $(PYTHON) -m venv .venv-train
	@.venv-train/bin/pip install --quiet --requirement tools/requirements.txt
	@.venv-train/bin/python tools/train_demo_models.py

lock: $(DEV_READY) ## pin the requirements of requirements*.in
	@$(BIN)/pip install --quiet pip-tools
	@$(BIN)/pip-compile --quiet --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --upgrade requirements.in
	@$(BIN)/pip-compile --quiet --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --upgrade requirements-dev.in

clean: ## remove the environment and caches (the state folder stays)
	@rm -rf .venv .venv-train .venv-vllm .venv-local-services .mypy_cache .ruff_cache .pytest_cache .hypothesis

.PHONY: browser docker
browser:
	@tools/ensure_chromium.sh

docker:
	@tools/ensure_docker.sh

$(RUN_READY): requirements.txt
	@test -d .venv || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

$(DEV_READY): requirements-dev.txt $(RUN_READY)
	@$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	@touch $@
