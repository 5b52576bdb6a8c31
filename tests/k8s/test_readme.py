"""k8s/README.md tells the truth."""

import math
import re
from collections.abc import Iterator

import pytest
import yaml
from PIL import Image
from ray.serve.schema import ServeDeploySchema

from benchmarks.shapes import write_checkpoint
from deployments.config import AppConfig
from deployments.stage_config import EncoderConfig, LanguageModelConfig
from engine.config import EngineConfig
from engine.model_parts import load_media_processor
from tests.k8s import checks
from tests.k8s.shapes import measure
from tests.k8s.tools import K8S, OVERLAYS, documents, rayservice
from tests.serving import ROOT

README = (K8S / "README.md").read_text()
#: Without line breaks.
SAID = " ".join(README.split())


def table(first: str) -> Iterator[dict[str, str]]:
    """The rows of the table whose first column has this title."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    titles = [cell.strip() for cell in lines[start].strip("|").split("|")]
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        yield dict(zip(titles, (cell.strip() for cell in line.strip("|").split("|")), strict=True))


def test_every_link_and_folder_is_there():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert len(links) > 8 and all((K8S / link).exists() for link in links)
    assert all(f"`{name}`" in README for name in OVERLAYS)
    assert all(f"`{path.name}`" in README for path in (K8S / "components").iterdir())


def test_every_alert_is_explained():
    rules = yaml.safe_load((K8S / "components" / "monitoring" / "rules.yaml").read_text())["spec"]["groups"]
    alerts = {rule["alert"] for group in rules for rule in group["rules"] if "alert" in rule}
    assert set(re.findall(r"`(Sightline\w+)`", README)) == alerts


def test_the_demo_fits_into_the_machine_that_the_page_asks_for():
    config = checks.cluster(rayservice(documents("cpu-demo")))
    pods = [config["headGroupSpec"], *config["workerGroupSpecs"]]
    assert all(group["replicas"] == 1 for group in config["workerGroupSpecs"])
    requests = [checks.container(group["template"])["resources"]["requests"] for group in pods]
    assert "A node with two cores and 7 GiB is enough." in SAID
    # The control plane of kind requests 0.95 cores and 0.3 GiB; the operator 0.1 cores and 0.5 GiB.
    assert sum(checks.number(each["memory"]) for each in requests) <= (7 - 0.3 - 0.5) * 2**30
    assert sum(checks.number(each["cpu"]) for each in requests) <= 2 - 0.95 - 0.1
    assert sum(checks.number(each["ephemeral-storage"]) for each in requests) <= 6 << 30


def test_every_target_of_make_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^ *|`)make ([a-z][\w-]*)", README, re.MULTILINE))
    assert {"image", "test", "test-k8s"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


@pytest.mark.parametrize("row", table("model"), ids=lambda row: f"{row['model']}, {row['GPUs']}")
def test_sizes_follow_from_what_the_engine_builds(row, tmp_path):
    name, _, precision = row["model"].partition(", ")
    size = measure(name, tmp_path, fp8=precision == "`quantization: fp8`")
    assert row["language model, GB"] == f"{size.language / 1e9:.1f}"
    assert row["vision part, GB"] == f"{size.vision / 1e9:.1f}"
    shape = (row["attention layers"], row["KV heads"], row["head size"])
    assert tuple(map(int, shape)) == (size.layers, size.kv_heads, size.head_dim)
    assert int(row["KV, KiB a token"]) * 1024 == size.token == 2 * math.prod(map(int, shape)) * 2
    config = EngineConfig(model=name)
    count, memory = map(int, re.findall(r"\d+", row["GPUs"]))
    assert config.gpu_memory_utilization == 0.9
    free = 0.9e9 * count * memory - size.language - 2e9 * count
    if size.states:
        assert f"{size.states >> 20} MiB for each of `max_num_seqs` requests ({config.max_num_seqs})" in SAID
        free = 0.75 * (free - (config.max_num_seqs + 1) * size.states)
    thousands = free / size.token / 1e3
    digits = 10 ** (len(str(int(thousands))) - 2)
    assert f"{round(thousands / digits) * digits} thousand" == row["tokens of KV"]


def test_a_picture_takes_the_tokens_that_the_page_says(tmp_path):
    folder = write_checkpoint("qwen2-vl-7b", tmp_path)
    processor = load_media_processor(EngineConfig(model=str(folder)))
    assert processor is not None
    item = processor.prepare(Image.new("RGB", (1024, 1024))).item
    assert f"{item.num_tokens} for 1024 × 1024" in SAID


def test_an_encoder_remembers_what_the_page_says():
    assert f"`cache_bytes` ({EncoderConfig().cache_bytes >> 20} MiB)" in SAID


def test_the_head_and_the_times_are_those_of_the_manifests():
    service = yaml.safe_load((K8S / "base" / "rayservice.yaml").read_text())["spec"]
    head = service["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]
    (row,) = (row for row in table("part") if row["part"] == "head")
    assert row["size"] == f"{head['requests']['cpu']} CPUs, {head['limits']['memory'].replace('Gi', ' GiB')}"
    values = dict(
        line.split("=")
        for line in (K8S / "base" / "env.properties").read_text().splitlines()
        if line[0] != "#"
    )
    group = yaml.safe_load((K8S / "groups" / "cpu" / "group.yaml").read_text())
    (spec,) = group["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert (
        f"drain {values['RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S']} < "
        f"grace {spec['template']['spec']['terminationGracePeriodSeconds']} < "
        f"HAProxy's hard stop {values['RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S']} ≤ "
        f"deletion of the old cluster {service['rayClusterDeletionDelaySeconds']}"
    ) in SAID


def test_the_deployment_in_the_example_has_the_name_that_the_application_gives():
    (block,) = (
        block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "deployments:" in block
    )
    (application,) = yaml.safe_load(block)["applications"]
    preprocessor, language_model = application["deployments"]
    args = yaml.safe_load((K8S / "overlays" / "one-gpu" / "serve_config.yaml").read_text())["applications"][
        0
    ]["args"]
    (model,) = AppConfig.model_validate(args).models
    assert preprocessor["name"] == f"Preprocessor:{model.slug}"
    assert language_model["name"] == f"LanguageModel:{model.slug}"
    # The same as from `args`.
    found = language_model["autoscaling_config"]
    wanted = LanguageModelConfig(autoscaling={"min_replicas": 2, "max_replicas": 6}).options()[
        "autoscaling_config"
    ]
    assert found | {"policy": None} == wanted | {"policy": None}
    found, wanted = found["policy"], wanted["policy"]
    assert found["policy_function"] == wanted["policy_function"]
    assert found["policy_kwargs"]["targets"] == wanted["policy_kwargs"]["targets"]
    ServeDeploySchema.model_validate(yaml.safe_load(block))
