"""Media of requests are refused beyond the limits, and their amounts given back however a request ends."""

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from deployments.api import create_api
from deployments.charges import MediaCharges
from deployments.config import AppConfig, IngressConfig, ReplayConfig
from deployments.pipeline import Pipeline
from deployments.stages import OpenFile, RowsLost, StageLost, Stages
from engine.errors import Unavailable
from engine.media.ledger import Ledger, MediaLimits
from engine.media.source import MediaSource
from engine.preparation import PagedFile
from engine.prompt import KeptFiles
from tests.deployments.asgi import AppTransport
from tests.deployments.pictures import circle, data_url, square
from tests.deployments.routers.test_videos import RED, data
from tests.serving import app_args, wait_until

pytestmark = pytest.mark.usefixtures("idle_afterwards")

KEYS = [{"name": "one", "key": "first"}, {"name": "two", "key": "second"}]
LARGE = data_url(circle("red", (640, 480)))


class Lossy:
    """A preprocessor or encoder stage whose calls die, hang or fail by chance."""

    def __init__(self, stage, rng: random.Random) -> None:
        self._stage, self._rng = stage, rng

    async def _call(self, name: str, *args):
        drawn = self._rng.random()
        if drawn < 0.1:
            raise StageLost("planted")
        if drawn < 0.15:
            raise Unavailable("planted")
        if drawn < 0.2:
            await asyncio.sleep(60)
        result = await getattr(self._stage, name)(*args)
        if drawn > 0.9:
            raise RowsLost("planted") if name == "encode" else StageLost("planted")
        return result

    async def prepare(self, *args):
        return await self._call("prepare", *args)

    async def encode(self, *args):
        return await self._call("encode", *args)


def served(running, *, limits=None, timeout_s=None, wrap=lambda stage: stage, **ingress):
    """A client of an application with keys and limits, and its ledger."""
    spec, local = AppConfig.model_validate(app_args()).models[0], running.pocket.stages
    stages = Stages(local.language_model, wrap(local.preprocessor), wrap(local.encoder))
    replay = ReplayConfig(max_losses=2, pause_s=0.001)
    pipeline = Pipeline(spec, stages, ThreadPoolExecutor(2), replay, timeout_s)
    media = MediaLimits.model_validate(limits or {})
    api = create_api(IngressConfig(keys=KEYS, **ingress), {"pocket": pipeline}, media=media)
    http = httpx.AsyncClient(transport=AppTransport(api), base_url="http://test", timeout=120)
    return http, api.state.ledger


def image(url: str = LARGE) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def body(*parts: dict, **fields) -> dict:
    content = [*parts, {"type": "text", "text": "What color is the circle?"}]
    messages = [{"role": "user", "content": content}]
    return {"model": "pocket", "messages": messages, "temperature": 0, "max_tokens": 6} | fields


def key(name: str = "first") -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


async def test_a_request_holds_what_its_media_take_until_it_ends(running):
    http, ledger = served(running)
    url = data_url(circle("red"))
    frames = [data_url(square("blue"))] * 4
    asked = body(image(url), {"type": "video", "video": frames}, stream=True, max_tokens=200, ignore_eos=True)
    async with http.stream("POST", "/v1/chat/completions", json=asked, headers=key()) as response:
        assert response.status_code == 200
        held = ledger.held("one")
        assert ledger.held("two")["items"] == 0
        plain = body(image(url), {"type": "video", "video": frames}, include_timings=True)
        usage = (await http.post("/v1/chat/completions", json=plain, headers=key("second"))).json()["usage"]
        assert held["tokens"] == sum(item["tokens"] for item in usage["media"])
        assert (held["items"], held["frames"], held["pixels"]) == (2, 4, 5 * 200 * 160)
        assert held["bytes"] == sum(len(text) // 4 * 3 for text in [url, *frames])
        assert ledger.held("two")["items"] == 0
    await wait_until(lambda: ledger.is_empty)


def test_pages_are_charged_once_and_the_first_is_the_file_s_own_item():
    ledger = Ledger()
    account = ledger.account("one")
    charges = MediaCharges(account)
    file = MediaSource(0, "messages[0].content[0].file", "document", url="https://host/file.pdf")
    pages = tuple(MediaSource(index, file.where) for index in range(3))
    charges.sources([file], {})
    for _ in range(2):
        # They are opened again if a preprocessor is lost.
        charges.pages([OpenFile(PagedFile(pages), KeptFiles([b""], "", 0))])
    assert ledger.held("one")["items"] == 3
    account.close()
    assert ledger.is_empty


PIXELS = 640 * 480


@pytest.mark.parametrize(
    ("limits", "parts", "status", "where"),
    [
        ({"per_request": {"items": 1}}, 2, 413, 1),
        ({"per_request": {"bytes": 100}}, 1, 413, 0),
        ({"per_request": {"pixels": 2 * PIXELS - 1}}, 2, 413, 1),
        ({"per_request": {"tokens": 1}}, 1, 413, 0),
        ({"per_key": {"items": 1}}, 2, 413, 1),
        ({"in_all": {"pixels": PIXELS - 1}}, 1, 413, 0),
    ],
)
async def test_a_request_beyond_a_limit_is_refused_by_its_field(running, limits, parts, status, where):
    http, ledger = served(running, limits=limits)
    asked = body(*[image()] * parts)
    refused = await http.post("/v1/chat/completions", json=asked, headers=key())
    assert refused.status_code == status
    assert refused.json()["error"]["param"] == f"messages[0].content[{where}].image_url.url"
    assert ledger.is_empty
    text = await http.post("/v1/chat/completions", json=body(), headers=key())
    assert text.status_code == 200


@pytest.mark.parametrize("limits", [{"per_key": {"pixels": PIXELS}}, {"in_all": {"pixels": PIXELS}}])
async def test_open_requests_leave_no_room_for_another(running, limits):
    http, ledger = served(running, limits=limits)
    asked = body(image(), stream=True, max_tokens=400, ignore_eos=True)
    async with http.stream("POST", "/v1/chat/completions", json=asked, headers=key()) as response:
        assert response.status_code == 200
        refused = await http.post("/v1/chat/completions", json=body(image()), headers=key())
        assert refused.status_code == 429 and refused.headers["retry-after"]
        assert refused.json()["error"]["param"] == "messages[0].content[0].image_url.url"
        other = await http.post("/v1/chat/completions", json=body(image()), headers=key("second"))
        assert other.status_code == (200 if "per_key" in limits else 429)
    await wait_until(lambda: ledger.is_empty)
    assert (await http.post("/v1/chat/completions", json=body(image()), headers=key())).status_code == 200


async def test_a_response_in_the_background_holds_its_media_to_its_end(running):
    http, ledger = served(running)
    asked = {"model": "pocket", "background": True, "temperature": 0, "max_output_tokens": 12}
    content = [{"type": "input_image", "image_url": LARGE}, {"type": "input_text", "text": "What is it?"}]
    made = await http.post(
        "/v1/responses", json=asked | {"input": [{"role": "user", "content": content}]}, headers=key()
    )
    assert made.json()["status"] in ("queued", "in_progress")
    assert ledger.held("one")["items"] == 1
    await wait_until(lambda: ledger.is_empty)
    found = await http.get(f"/v1/responses/{made.json()['id']}", headers=key())
    assert found.json()["status"] == "completed"


async def test_after_any_mix_of_ends_the_ledgers_are_empty(running):
    """Answers, refusals, clients that leave at any time, deadlines, and stages that die, all at a time."""
    rng = random.Random(0)
    limits = {"per_key": {"pixels": 6 * PIXELS}, "in_all": {"items": 14, "tokens": 4000}}
    http, ledger = served(running, limits=limits, timeout_s=3.0, wrap=lambda stage: Lossy(stage, rng))
    parts = [
        image(),
        image(data_url(square("blue"))),
        image("data:image/png;base64,AAAA"),
        image(f"{running.site}/nothing.png"),
        image(LARGE) | {"uuid": "large"},
        {"type": "image_url", "uuid": "large"},
        {"type": "video", "video": [data_url(circle("green"))] * 3},
        {"type": "video_url", "video_url": {"url": data(RED)}},
    ]
    planned = random.Random(1)
    statuses: list[int | str] = []

    async def request(asked: dict, path: str, name: str, patience: float, leaves: bool) -> None:
        try:
            async with (
                asyncio.timeout(patience),
                http.stream("POST", path, json=asked, headers=key(name)) as response,
            ):
                statuses.append(response.status_code)
                async for _ in response.aiter_lines():
                    if leaves:
                        break
        except TimeoutError:
            statuses.append("gone")

    def draw() -> tuple[dict, str, str, float, bool]:
        chosen = planned.choices(parts, k=planned.randint(1, 3))
        asked = body(*chosen, stream=planned.random() < 0.5) | {"max_tokens": planned.choice([1, 20, 2000])}
        path = planned.choice(["/v1/chat/completions"] * 3 + ["/tokenize"])
        patience = planned.choice([0.01, 0.1, 0.5, 60])
        return asked, path, planned.choice(["first", "second"]), patience, planned.random() < 0.2

    for _ in range(4):
        await asyncio.gather(*(request(*draw()) for _ in range(24)))
    await wait_until(lambda: ledger.is_empty and running.pocket.preprocessor.ledger.is_empty)
    # Which of the further ends came depends on how fast the machine is.
    assert 413 in statuses and len({*statuses}) > 2, statuses
