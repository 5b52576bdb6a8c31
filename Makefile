# Every target sets up what it needs: `make serve` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CONFIG ?= serve_config.yaml

.PHONY: install serve test test-wide chaos lint test-k8s test-clients bench exactness image chart clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and by its pin: a range would bring the newest build with all its CUDA packages.
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,k8s]"
	touch $@

serve: install
	@$(BIN)/python -m deployments.preflight $(CONFIG) $(ARGS)
	RAY_USAGE_STATS_ENABLED=0 RAY_SERVE_HAPROXY_BINARY_PATH="$(abspath $(BIN))/sightline-haproxy" \
	  RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="$${RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S:-1}" \
	  RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS="$${RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS:-1}" \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/serve run $(ARGS) $(CONFIG)

# Workers share the tests. Tests that start processes run one after another in one worker, and mostly wait: of three
# workers two keep two cores busy. WORKERS=0: all in one process. Compiled modules are kept, whatever the environment
# says: tests start some hundred processes, and each would compile all modules again.
WORKERS ?= 3
test: install
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder $(ARGS)

# With the tables of tests whole of which "make test" runs a part: see tests/wide.py.
test-wide: override ARGS += --wide
test-wide: test

# The pods of k8s/overlays/cpu-demo, as processes of this machine with networks of their own; needs root.
PODS ?= tests/k8s
test-k8s: install
	SIGHTLINE_PODS=1 $(BIN)/python -m pytest $(PODS) $(ARGS)

# Other projects' clients, each installed in an environment of its own, against a served pocket-tools; writes
# docs/clients.md. CLIENTS="openai_3 litellm" runs some of them.
test-clients: install
	$(BIN)/python -m tests.clients.run $(CLIENTS) $(ARGS)

# Kills processes of a server of its own while it answers, one every CHAOS_PERIOD seconds: each request must be
# answered, and rightly. Then the tests of ends behind HAProxy too, and of the loss of one of two ingresses.
SECONDS_OF_CHAOS ?= 600
CHAOS ?= tests/chaos tests/deployments/ray_serve/test_ends.py tests/deployments/ray_serve/test_ingress_loss.py
chaos: install
	CHAOS_SECONDS=$(SECONDS_OF_CHAOS) $(BIN)/python -m pytest -s $(CHAOS) $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.dead_code

bench: install
	$(BIN)/python -m benchmarks $(ARGS)

# Draws N checkpoints of each family, each with EACH prompts, and compares the engine with Transformers.
# More prompts a checkpoint cost less each.
N    ?= 20
SEED ?= 0
JOBS ?= 1
EACH ?= 4
exactness: install
	$(BIN)/python -m tests.engine.families.drawn -n $(N) --seed $(SEED) --jobs $(JOBS) --each $(EACH) $(if $(FAMILY),--family $(FAMILY)) $(ARGS)

# The image of k8s/. On a GPU cluster: make image IMAGE=registry.example.com/sightline:0.1.0 DEVICE=cuda
IMAGE  ?= sightline:dev
DEVICE ?= cpu
image:
	docker build --file k8s/image/Dockerfile --build-arg DEVICE=$(DEVICE) $(if $(WARM_MODELS),--build-arg WARM_MODELS="$(WARM_MODELS)") --tag $(IMAGE) $(ARGS) .

# The Helm chart of k8s/helm, with every overlay in it: build/chart.
KUBECTL ?= $(if $(wildcard $(BIN)/kubectl),$(BIN)/kubectl,kubectl)
chart:
	rm -rf build/chart && mkdir -p build && cp -r k8s/helm build/chart && mkdir build/chart/overlays
	for overlay in k8s/overlays/*; do $(KUBECTL) kustomize "$$overlay" > "build/chart/overlays/$${overlay##*/}.yaml" || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info
