"""Alerts fire when they should, and no panel of the board is empty, by the word of a real Prometheus."""

import asyncio
import json
import math
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import yaml

from deployments.config import AppConfig
from deployments.in_process import LocalApplication
from tests.deployments.pictures import ask, circle, square
from tests.k8s.tools import K8S, program
from tests.serving import app_args, free_port

MONITORING = K8S / "components" / "monitoring"
BOARD = json.loads((MONITORING / "board.json").read_text())
GROUPS = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]["groups"]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}

UNIT_TESTS = yaml.safe_load(Path(__file__).with_name("alerts.yaml").read_text())


@pytest.fixture
def rules(tmp_path) -> Path:
    """The rules as a file of Prometheus."""
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": GROUPS}))
    return file


def run(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)


def test_the_rules_are_well_formed(rules):
    done = run(program("promtool", "Debian's prometheus"), "check", "rules", rules)
    assert done.returncode == 0, done.stderr


def test_alerts_fire_when_they_should(rules):
    tests = rules.with_name("tests.yaml")
    tests.write_text(yaml.safe_dump(UNIT_TESTS | {"rule_files": [rules.name]}))
    done = run(program("promtool", "Debian's prometheus"), "test", "rules", tests)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_firing_and_silent():
    expected: dict[str, set[bool]] = {}
    for test in UNIT_TESTS["tests"]:
        for case in test["alert_rule_test"]:
            expected.setdefault(case["alertname"], set()).add(bool(case.get("exp_alerts")))
    assert expected == {name: {True, False} for name in ALERTS}


def test_every_alert_says_how_bad_it_is_and_what_to_do():
    for rule in ALERTS.values():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_ids_and_places_of_panels_are_apart():
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells


@pytest.fixture(scope="module")
def application() -> Iterator[str]:
    """The address of the shipped application, in this process."""
    port = free_port()
    server: uvicorn.Server | None = None

    async def serve() -> None:
        nonlocal server
        app = LocalApplication(AppConfig.model_validate(app_args()))
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
        await server.serve()
        await app.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/health").is_success)
        yield f"http://127.0.0.1:{port}"
    finally:
        if server is not None:
            server.should_exit = True
        thread.join(60)


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Return the result of ``condition``, once that is true; fails if it doesn't become so in time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := condition():
                return found
        except (httpx.HTTPError, ValueError):
            # A server that starts may answer in plain text.
            pass
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.2)


class Prometheus:
    """A running Prometheus at ``root``."""

    def __init__(self, root: str) -> None:
        self._client = httpx.Client(base_url=f"{root}/api/v1", timeout=120)

    def query(self, expression: str) -> list[float]:
        """The values of an expression now, without those that are no numbers."""
        answer = self._client.get("query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        values = [float(sample["value"][1]) for sample in answer["data"]["result"]]
        return [value for value in values if math.isfinite(value)]

    def names(self) -> set[str]:
        """Names of all series."""
        return set(self._client.get("label/__name__/values").json()["data"])


@pytest.fixture(scope="module")
def prometheus(application, tmp_path_factory) -> Iterator[Prometheus]:
    """Scrapes the application, and evaluates the rules, four times a second."""
    binary, folder = program("prometheus", "Debian's prometheus"), tmp_path_factory.mktemp("prometheus")
    (folder / "rules.yaml").write_text(
        yaml.safe_dump({"groups": [group | {"interval": "1s"} for group in GROUPS]})
    )
    target = application.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "sightline", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    arguments = [f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [binary, *arguments, f"--web.listen-address={address}"], stdout=log, stderr=log
        )
    try:
        found = Prometheus(f"http://{address}")
        wait_for(lambda: found.query("sightline_http_open_requests"))
        yield found
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def load(application, prometheus) -> None:
    """Chats about pictures, some of them for the second time, until Prometheus has seen them."""
    url = f"{application}/v1/chat/completions"
    for picture in (circle("red"), square("blue"), circle("red"), square("green")):
        body = {"model": "pocket", "messages": ask("What is in this picture?", picture), "max_tokens": 8}
        assert httpx.post(url, json=body, timeout=120).is_success
    wait_for(lambda: sum(prometheus.query('sightline_answers_total{outcome="ok"}')) >= 4)


def expressions() -> Iterator[tuple[str, str]]:
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


@pytest.mark.parametrize(("panel", "expression"), expressions())
def test_no_panel_is_empty(panel, expression, load, prometheus):
    filled = expression.replace("$__rate_interval", "5m").replace("$model", ".*").replace("$stage", ".*")
    assert "$" not in filled
    assert wait_for(lambda: prometheus.query(filled), 120), panel


def test_variables_of_the_board_have_values(load, prometheus):
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
            assert prometheus.query(f"count by ({label}) ({metric})")


def test_every_series_of_the_rules_exists(load, prometheus):
    used = {
        name
        for group in GROUPS
        for rule in group["rules"]
        for name in re.findall(r"sightline[:\w]+", rule["expr"])
    }
    assert len(used) > 15
    wait_for(lambda: used <= prometheus.names(), 120)
