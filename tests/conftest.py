"""What every test shares."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.serving import Served, app_args, free_port, serve_files

# Read by Triton when a kernel is decorated, so it must be set before any kernel file is imported. Tensors on
# a CPU go to the torch references all the same; only the tests of kernels call the Triton code on them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Ray reads these when its processes start.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Served]:
    """``serve_config.yaml``'s application on a port of its own, with a second model that makes embeddings,
    and a site of pictures that it may fetch from."""
    import ray
    from ray import serve

    from deployments.app import build
    from deployments.config import AppConfig

    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=256 << 20, log_to_driver=False)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = app_args()
    vectors = {
        "model": "models/pocket-embed",
        "task": "embed",
        "max_model_len": 512,
        "kv_cache_bytes": 16 << 20,
    }
    args["models"].append({"name": "tests/vectors", "engine": vectors})
    pictures = tmp_path_factory.mktemp("pictures")
    # An address of its own: the machine's usual ones stay forbidden.
    with serve_files(pictures, "127.0.0.2") as site:
        ports = [80, int(site.rpartition(":")[2])]
        args["fetch"] = {"allow_private": ["127.0.0.2/32"], "allowed_ports": ports}
        serve.run(build(AppConfig.model_validate(args)), name="sightline", route_prefix="/")
        yield Served(f"http://127.0.0.1:{port}", pictures, site)
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def client(served: Served):
    from openai import OpenAI

    return OpenAI(base_url=served.base_url, api_key="none", max_retries=0)


@pytest.fixture
def idle_afterwards(served: Served) -> Iterator[None]:
    """After the test nothing of its requests is left in the engine."""
    yield
    served.wait_until_idle()
