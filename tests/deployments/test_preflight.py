"""``make serve`` reports what is in its way before anything starts."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deployments.preflight import (
    InTheWay,
    check_applications,
    check_cluster,
    check_options,
    main,
    read_config,
)
from tests.serving import ROOT, free_port


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A server that shares its port with others, as Ray Serve's do."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server


@pytest.fixture(autouse=True)
def no_other_cluster(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


def test_an_option_may_stand_beside_those_that_are_merged(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("a: {b: &b {<<: &c {x: 1}, x: 2}}\nd: {<<: *b, x: 3}\n")
    assert read_config(file) == {"a": {"b": {"x": 2}}, "d": {"x": 3}}


def test_a_number_and_a_text_of_its_digits_are_two_keys(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("a: {1: x, '1': y}\n")
    assert read_config(file) == {"a": {1: "x", "1": "y"}}


def config(folder: Path, args: dict | None = None, **http_options) -> str:
    file = folder / "serve.yaml"
    given = {"models": [{"name": "pocket", "engine": {"model": "models/pocket"}}]} | (args or {})
    application = {"name": "one", "import_path": "deployments.app:build", "args": given}
    others = {"name": "two", "route_prefix": "/two", "import_path": "elsewhere:app", "args": {"unknown": 1}}
    http = {"host": "127.0.0.1"} | http_options
    file.write_text(yaml.safe_dump({"http_options": http, "applications": [others, application]}))
    return str(file)


def test_a_free_port_and_no_cluster(tmp_path, capsys):
    assert main([config(tmp_path, port=free_port())]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("args", "fault"),
    [
        (
            {"models": [{"name": "a", "engine": {"model": "m", "max_model_length": 5}}]},
            ".models[0].engine.max_model_length: there is no such option; did you mean max_model_len?",
        ),
        ({"model": []}, ".model: there is no such option; did you mean models?"),
        (
            {"models": [{"name": "a", "engine": {"model": "m"}, "max_num_seqs": 5}]},
            ".models[0].max_num_seqs: there is no such option here, but in models[].engine.",
        ),
        ({"swap_space": 4}, ".swap_space: there is no such option."),
        ({"models": [{"engine": {"model": "m"}}]}, ".models[0].name must be given."),
        ({"models": []}, ".models: at least one model."),
        ({"ingress": {"num_replicas": 0}}, ".ingress.num_replicas: Input should be greater than 0."),
    ],
)
def test_an_option_that_cannot_be_is_named(tmp_path, capsys, args, fault):
    assert main([config(tmp_path, args, port=free_port())]) == 1
    said = capsys.readouterr().err
    assert f"make serve: applications[1].args{fault}" in said and "docs/configuration.md" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("deployment", "fault"),
    [
        ({"name": "Ingres"}, "name: there is no deployment 'Ingres'; did you mean Ingress?"),
        (
            {"name": "encoder"},
            "name: there is no deployment 'encoder'; there are Ingress, LanguageModel:pocket, ",
        ),
        (
            {"name": "Ingress", "user_config": {"max_active_request": 5}},
            "user_config: 'max_active_request' can't change while a replica runs",
        ),
        (
            {"name": "Ingress", "user_config": {"max_active_requests": -5}},
            "user_config.max_active_requests: Input should be greater than 0.",
        ),
        (
            {"name": "VisionEncoder:pocket", "user_config": {"duty_cycle": 7}},
            "user_config.duty_cycle: Input should be less than or equal to 1.",
        ),
        (
            {"name": "Ingress", "user_config": {"replay": {"patience": 5}}},
            "user_config: 'patience' can't change while a replica runs",
        ),
    ],
)
def test_what_running_replicas_could_not_take_over_is_named(deployment, fault):
    args = {"models": [{"name": "pocket", "engine": {"model": "models/pocket"}}]}
    application = {"import_path": "deployments.app:build", "args": args}
    with pytest.raises(InTheWay) as refused:
        check_applications({"applications": [{**application, "deployments": [deployment]}]})
    assert str(refused.value).startswith(f"applications[0].deployments[0].{fault}")
    fine = [
        {"name": "Ingress", "num_replicas": 3, "user_config": {"replay": {"patience_s": 60}}},
        {"name": "LanguageModel:pocket", "user_config": None},
    ]
    assert check_applications({"applications": [{**application, "deployments": fine}]})


def model(**engine) -> dict:
    return {"models": [{"name": "a", "engine": {"model": "models/pocket", **engine}}]}


def keys(*given: dict, **ingress) -> dict:
    return {"ingress": {"keys": [{"name": "a", **each} for each in given], **ingress}}


@pytest.mark.parametrize(
    ("args", "fault"),
    [
        (model(model="./models/none"), ".models[0].engine: there is no folder './models/none'"),
        (model(model="models"), ".models[0].engine: "),
        (model(tokenizer="./none"), ".models[0].engine.tokenizer: there is no folder './none'"),
        (model(chat_template="none.jinja"), ".models[0].engine.chat_template: 'none.jinja' is neither"),
        (model(max_model_len=5000), ".models[0].engine.max_model_len: max_model_len is 5000, but"),
        (keys({"env": "NO_SUCH_KEY"}), ".ingress: the key 'a' is empty"),
        (keys({"file": "/none"}), ".ingress: the key 'a' can't be read"),
        (keys({"key": "two words"}), ".ingress: the key 'a' must consist of"),
    ],
    ids=[
        "no model",
        "no checkpoint",
        "no tokenizer",
        "no template",
        "too long",
        "no variable",
        "no file",
        "no key",
    ],
)
def test_a_file_that_is_missing_is_named(tmp_path, capsys, monkeypatch, args, fault):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = config(tmp_path, args, port=free_port())
    assert main([path]) == 1
    assert capsys.readouterr().err.startswith(f"make serve: applications[1].args{fault}")
    # Another cluster's machines have files of their own.
    assert main([path, "--address", "192.0.2.1:6379"]) == 0


@pytest.mark.parametrize("value", ["five", "-1", "nan", "0"])
def test_a_variable_that_is_no_time_is_named(tmp_path, capsys, monkeypatch, value):
    monkeypatch.setenv("VLLM_VIDEO_FETCH_TIMEOUT", value)
    assert main([config(tmp_path, port=free_port())]) == 1
    assert f"VLLM_VIDEO_FETCH_TIMEOUT must be a number of seconds, not '{value}'" in capsys.readouterr().err


def test_keys_come_from_the_environment_of_the_ingress_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HERE", "a-key")
    given = keys({"env": "HERE"}, {"env": "THERE"}, env={"THERE": "another-key"})
    assert main([config(tmp_path, given, port=free_port())]) == 0


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none(tmp_path, capsys, port):
    assert main([config(tmp_path, port=port)]) == 1
    assert f"http_options.port must be a number below 65536, not {port!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            lambda given: given.update(http_option=given.pop("http_options")),
            "http_option: Ray Serve has no such",
        ),
        (lambda given: given["http_options"].update(hots="::1"), "http_options.hots: Ray Serve has no such"),
        (
            lambda given: given["http_options"].update(port="http"),
            "http_options.port: Input should be a valid",
        ),
        (lambda given: given.update(proxy_location="All"), "proxy_location: Input should be 'Disabled', "),
        (
            lambda given: given["applications"][1].update(nam="a"),
            "applications[1].nam: Ray Serve has no such",
        ),
        (
            lambda given: given["applications"][1].update(
                deployments=[{"name": "Ingress", "num_replica": 2}]
            ),
            "applications[1].deployments[0].num_replica: Ray Serve has no such",
        ),
        (
            lambda given: given["applications"][1].update(name="two"),
            'applications: Found multiple configs for application "two"',
        ),
        (
            lambda given: given["applications"][1].update(import_path="deployments.app.buidl"),
            "applications[1].import_path must be deployments.app:build or deployments.app:build_stages, not ",
        ),
        (
            lambda given: given["applications"][1].update(import_path="deployments.app.build", args={}),
            "applications[1].args.models must be given",
        ),
        (
            lambda given: given["applications"][1].update(route_prefix="vision"),
            "applications[1].route_prefix must be / or a path such as /vision",
        ),
        (
            lambda given: given["applications"][1].update(route_prefix="/a/"),
            "applications[1].route_prefix must",
        ),
        (
            lambda given: given["applications"][1].update(route_prefix="/{a}"),
            "applications[1].route_prefix must",
        ),
        (
            lambda given: given["applications"][1].update(route_prefix=""),
            "applications[1].route_prefix must",
        ),
    ],
    ids=range(13),
)
def test_options_of_ray_serve_that_it_would_ignore_or_refuse_at_length(tmp_path, capsys, change, fault):
    file = Path(config(tmp_path, port=free_port()))
    given = yaml.safe_load(file.read_text())
    change(given)
    file.write_text(yaml.safe_dump(given))
    assert main([str(file)]) == 1
    said = capsys.readouterr().err
    assert f"make serve: {fault}" in said
    assert len(said.splitlines()) == 1


def test_the_shipped_configuration_has_no_fault():
    for path in (ROOT / "serve_config.yaml", *ROOT.glob("k8s/overlays/*/serve_config.yaml")):
        given = read_config(path)
        assert check_applications(given)
        check_options(given)


def test_a_configuration_without_applications(tmp_path, capsys):
    file = tmp_path / "serve.yaml"
    file.write_text("http_options: {port: 1}")
    assert main([str(file)]) == 1 and "has no applications" in capsys.readouterr().err


def test_a_busy_port_is_named_with_the_program_that_has_it(tmp_path, listening, capsys):
    port = listening.getsockname()[1]
    assert main([config(tmp_path, port=port)]) == 1
    said = capsys.readouterr().err
    assert f"port {port} of 127.0.0.1 is in use by process {os.getpid()}" in said
    assert "http_options.port" in said and "Traceback" not in said


def test_an_address_that_this_machine_does_not_have(tmp_path, capsys):
    assert main([config(tmp_path, host="192.0.2.77", port=free_port())]) == 1
    assert "http_options.host" in capsys.readouterr().err


@pytest.mark.parametrize("by_file", [True, False])
@pytest.mark.parametrize("alive", [True, False])
def test_another_cluster(tmp_path, listening, by_file, alive):
    port = listening.getsockname()[1] if alive else free_port()
    address = f"127.0.0.1:{port}"
    environment = {"RAY_TMPDIR": str(tmp_path)}
    if by_file:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
    else:
        environment["RAY_ADDRESS"] = address
    with pytest.raises(InTheWay) as caught:
        check_cluster(None, environment)
    said = str(caught.value)
    assert address in said and "ARGS='--address local'" in said
    assert ("does not answer" in said) != alive
    assert ("ray_current_cluster" if by_file else "RAY_ADDRESS") in said
    # Whoever names a cluster has chosen.
    for chosen in ("local", address):
        check_cluster(chosen, environment)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "YAML"),
        ("- a", "mapping"),
        (None, "CONFIG="),
        (b"\xff\xfe", "UTF-8"),
        ("a: 1\nb: {c: 1, d: 2,\n  c: 3}\n", "the option c stands twice in one place"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, capsys, text, words):
    file = tmp_path / "serve.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main([str(file)]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_serve_runs_it_and_stops(tmp_path, listening):
    file = config(tmp_path, port=listening.getsockname()[1])
    command = [
        "make",
        "--silent",
        "--old-file=install",
        f"CONFIG={file}",
        f"BIN={Path(sys.executable).parent}",
    ]
    made = subprocess.run([*command, "serve"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode != 0
    assert "is in use by" in made.stderr and "Ray" not in made.stdout
