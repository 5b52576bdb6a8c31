"""What every test shares."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.serving import Served, free_port, serve_files, tested_args

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
    pictures = tmp_path_factory.mktemp("pictures")
    with serve_files(pictures, "127.0.0.2") as site:
        config = AppConfig.model_validate(tested_args(site))
        serve.run(build(config), name="sightline", route_prefix="/")
        yield Served(f"http://127.0.0.1:{port}", pictures, site)
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def ray_client(served: Served):
    from openai import OpenAI

    return OpenAI(base_url=served.base_url, api_key="none", max_retries=0)


@pytest.fixture
def ray_idle_afterwards(served: Served) -> Iterator[None]:
    """After the test nothing of its requests is left in the engine."""
    yield
    served.wait_until_idle()
