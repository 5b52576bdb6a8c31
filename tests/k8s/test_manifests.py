"""Every overlay renders, and the API server, the operator, Ray and Sightline accept all of its objects."""

import os
import re

import pytest
import yaml

from deployments.app import build
from tests.k8s import checks
from tests.k8s.policies import policy_faults
from tests.k8s.serving_checks import app_config, config_faults, same_application
from tests.k8s.tools import K8S, OVERLAYS, crd_schema, documents, rayservice, rendered, with_components
from tests.serving import app_args


@pytest.fixture(params=OVERLAYS)
def found(request) -> list[dict]:
    return documents(request.param)


def test_the_operators_schema_knows_every_field(found):
    assert checks.schema_faults(rayservice(found), crd_schema()) == []


def test_kubernetes_knows_every_field(found):
    pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    assert checks.builtin_faults(found) == []


def test_the_operator_accepts_it(found):
    assert checks.operator_faults(rayservice(found)) == []


def test_nothing_in_it_loses_requests(found):
    assert checks.loss_faults(found) == []


def test_every_name_leads_somewhere(found):
    assert checks.reference_faults(found) == []


def test_the_serve_config_runs_on_these_pods(found):
    assert config_faults(found) == []


def test_pods_reach_what_they_need_and_nothing_else(found):
    assert policy_faults(found) == []


def test_the_demo_serves_what_make_serve_serves():
    service = rayservice(documents("cpu-demo"))
    assert same_application(service, app_args())
    build(app_config(service))


@pytest.mark.parametrize(
    ("component", "overlay"),
    [
        ("incremental-upgrade", "cluster"),
        ("model-image", "one-gpu"),
        ("network-policy", "cpu-demo"),
        ("network-policy", "one-gpu"),
        ("priority", "one-gpu"),
    ],
)
def test_components_that_no_overlay_has_can_be_added(component, overlay, tmp_path):
    found = with_components(overlay, [component], tmp_path)
    assert found != documents(overlay)
    assert checks.operator_faults(rayservice(found)) == []
    # A policy for a Redis that isn't there does no harm.
    harmless = ("namespace", "NetworkPolicy sightline-redis selects no pod")
    assert [
        fault for fault in checks.reference_faults(found) if not any(each in fault for each in harmless)
    ] == []
    assert config_faults(found) == []
    assert policy_faults(found) == []
    # Last: it skips the test where the schema is absent.
    assert checks.schema_faults(rayservice(found), crd_schema()) == []


def test_the_readmes_overlay_merges_by_name(tmp_path):
    """A group's size, one more variable, a node selector."""
    blocks = re.findall(r"```yaml\n(.*?)```", (K8S / "README.md").read_text(), re.DOTALL)
    (mine,) = (yaml.safe_load(block) for block in blocks if "kind: Kustomization" in block)
    mine["resources"] = [
        os.path.relpath(K8S / "overlays" / "mine" / path, tmp_path) for path in mine["resources"]
    ]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(mine))
    (group,) = checks.groups(rayservice(list(yaml.safe_load_all(rendered(tmp_path)))))
    assert (group["minReplicas"], group["maxReplicas"]) == (1, 3)
    names = {variable["name"] for variable in checks.container(group["template"])["env"]}
    assert names == {"HF_TOKEN", "SIGHTLINE_KEY", "NCCL_DEBUG"}
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] == 660
    assert "nvidia.com/gpu.product" in group["template"]["spec"]["nodeSelector"]


def test_pods_of_every_group_share_all_but_their_size():
    templates = [dict(checks.pods(rayservice(documents(overlay)))) for overlay in OVERLAYS]
    shared = [
        {
            key: value
            for key, value in template["spec"].items()
            if key not in ("containers", "tolerations", "priorityClassName", "volumes")
        }
        for pods in templates
        for name, template in pods.items()
        if name != "head"
    ]
    assert all(each == shared[0] for each in shared)
