"""The Helm chart gives the objects of the overlays, and its values change what they say."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s import checks
from tests.k8s.tools import K8S, OVERLAYS, documents, helm, rayservice, rendered


@pytest.fixture(scope="module")
def chart(tmp_path_factory) -> Path:
    """The chart that ``make chart`` makes."""
    folder = tmp_path_factory.mktemp("helm") / "chart"
    shutil.copytree(K8S / "helm", folder)
    (folder / "overlays").mkdir()
    for overlay in OVERLAYS:
        (folder / "overlays" / f"{overlay}.yaml").write_text(rendered(K8S / "overlays" / overlay))
    return folder


def template(chart: Path, values: dict[str, Any], namespace: str = "sightline") -> list[dict[str, Any]]:
    """The chart's objects with these values."""
    file = chart.parent / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    command = [helm(), "template", "sightline", chart, "--namespace", namespace, "--values", file]
    done = subprocess.run([*map(str, command), "--kube-version", "1.34"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def in_order(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(found, key=lambda d: (d["kind"], d["metadata"]["name"]))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_without_values_the_objects_are_the_overlays(chart, overlay):
    found = template(chart, {"overlay": overlay, "namespace": {"create": True}})
    assert in_order(found) == in_order(documents(overlay))


def test_values_reach_the_objects(chart):
    config = yaml.safe_load(rayservice(documents("one-gpu"))["spec"]["serveConfigV2"])
    config["applications"][0]["args"]["ingress"]["num_replicas"] = 3
    values = {
        "overlay": "one-gpu",
        "image": "registry.example.com/sightline:1.0",
        "serveConfig": yaml.safe_dump(config),
        "env": {"NCCL_DEBUG": "WARN"},
        "groups": {"gpu": {"maxReplicas": 4, "template": {"spec": {"nodeSelector": {"disk": "fast"}}}}},
    }
    found = template(chart, values, namespace="models")
    service = rayservice(found)
    (group,) = checks.groups(service)
    assert (group["minReplicas"], group["maxReplicas"]) == (1, 4)
    assert group["template"]["spec"]["nodeSelector"] == {"disk": "fast"}
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] == 660
    assert checks.environment(found, group["template"])["NCCL_DEBUG"] == "WARN"
    images = {checks.container(pod)["image"] for _, pod in checks.pods(service)}
    assert images == {"registry.example.com/sightline:1.0"}
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == config
    assert {d["metadata"]["namespace"] for d in found} == {"models"}
    assert checks.reference_faults(found) == []
    # Another environment is another name, so that the operator starts new pods.
    other = template(chart, values | {"env": {"NCCL_DEBUG": "INFO"}}, namespace="models")
    name = {d["metadata"]["name"] for d in other} - {d["metadata"]["name"] for d in found}
    assert len(name) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"overlay": "two-gpus"}, "there is no overlay two-gpus"),
        ({"groups": {"gpus": {"maxReplicas": 2}}}, "has no group gpus; it has gpu"),
        ({"groups": {"gpu": {"maxReplica": 2}}}, "maxReplica"),
        ({"groups": {"gpu": {"maxReplicas": "2"}}}, "maxReplicas"),
        ({"serveconfig": "applications: []"}, "serveconfig"),
        ({"serveConfig": "serve_config.yaml"}, "give it by --set-file"),
        ({"image": "registry.example.com/sightline"}, "image"),
        ({"env": {"NCCL": {"DEBUG": "WARN"}}}, "NCCL"),
    ],
)
def test_a_wrong_value_is_named(chart, values, message):
    with pytest.raises(AssertionError, match=message):
        template(chart, {"overlay": "one-gpu"} | values)


def test_the_image_is_that_of_our_own_containers(chart):
    """Whatever its name was when the chart was made."""
    folder = chart.with_name("renamed")
    shutil.copytree(chart, folder)
    overlay = folder / "overlays" / "cluster.yaml"
    overlay.write_text(overlay.read_text().replace("image: sightline:dev", "image: registry/ours:1"))

    def images(**values: str) -> dict[str, set[str]]:
        found = template(folder, {"overlay": "cluster"} | values)
        templates = [pod for _, pod in checks.pods(rayservice(found))]
        ours = {checks.container(pod)["image"] for pod in templates}
        others = {
            document["kind"]: {checks.container(document["spec"]["template"])["image"]}
            for document in found
            if "template" in document.get("spec", {})
        }
        return others | {"RayService": ours}

    before, after = images(), images(image="registry/ours:2")
    assert before["RayService"] == before["Job"] == {"registry/ours:1"}
    assert after["RayService"] == after["Job"] == {"registry/ours:2"}
    assert before["StatefulSet"] == after["StatefulSet"] == {"redis:8.2-bookworm"}


def test_the_versions_agree():
    from tests.serving import ROOT

    chart = yaml.safe_load((K8S / "helm" / "Chart.yaml").read_text())
    assert f'version = "{chart["appVersion"]}"' in (ROOT / "pyproject.toml").read_text()
