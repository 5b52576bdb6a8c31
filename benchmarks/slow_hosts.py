"""Latency of images while other requests wait for a host that never answers.

    python -m benchmarks.slow_hosts [--waiting 32] [--images 30] [--rounds 3] [--json FILE]

The application runs in this process, with the small model that comes with the project. Each round measures
chats with an image of their own in the request, then chats with an image from a host that answers at once:
first alone, then while ``--waiting`` other chats wait for the dead host. The ratio of the medians is what the
dead host costs others. The error that those who wait get must name that host.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.asgi import Host, application, chat, host, image_part, png, png_url, post
from benchmarks.pictures import unique_picture

MODEL = Path(__file__).resolve().parent.parent / "models" / "pocket"
SIDE = 224


async def latency(api: Any, url: str) -> float:
    """Seconds of one chat about the image at ``url``."""
    began = time.perf_counter()
    status, content = await post(api, chat(image_part(url), max_tokens=2))
    assert status == 200, content
    return time.perf_counter() - began


async def beside(api: Any, dead: Host, count: int) -> list[asyncio.Task]:
    """Chats that wait for the dead host: all of them have reached it."""
    bodies = [chat(image_part(f"{dead.url}/{number}"), max_tokens=2) for number in range(count)]
    tasks = [asyncio.ensure_future(post(api, body)) for body in bodies]
    deadline = time.monotonic() + 60
    while len(dead.waiting) < count:
        assert time.monotonic() < deadline, f"{len(dead.waiting)} of {count} reached the dead host"
        await asyncio.sleep(0.01)
    return tasks


async def measure(waiting: int, images: int, rounds: int) -> dict[str, Any]:
    """Medians in milliseconds, alone and beside the dead host, and the error that names it."""
    fast_image = png(unique_picture(SIDE, 1 << 40))
    times: dict[str, list[float]] = {}
    async with host("127.0.0.2", None) as dead, host("127.0.0.3", fast_image) as fast:
        # Chats beside the dead host may take longer than the 5 seconds that it usually has.
        app = application(str(MODEL), [dead, fast], timeout=600.0)
        own = [png_url(unique_picture(SIDE, seed)) for seed in range(2 * images * rounds)]
        await latency(app.api, own[0])
        await latency(app.api, f"{fast.url}/warm")
        numbers = iter(range(1 << 30))

        async def chats(way: str) -> None:
            for _ in range(images):
                number = next(numbers)
                times.setdefault(f"own {way}", []).append(await latency(app.api, own[number % len(own)]))
                url = f"{fast.url}/{number}"
                times.setdefault(f"fast host {way}", []).append(await latency(app.api, url))

        for _ in range(rounds):
            await chats("alone")
            tasks = await beside(app.api, dead, waiting)
            await chats("beside")
            assert len(dead.waiting) == waiting, "some have given up: let the host's time be longer"
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await app.close()
    return {name: statistics.median(each) * 1e3 for name, each in times.items()}


async def refusal() -> str:
    """The error of a chat about an image at the dead host."""
    async with host("127.0.0.2", None) as dead:
        app = application(str(MODEL), [dead], timeout=1.0)
        status, content = await post(app.api, chat(image_part(f"{dead.url}/image.png"), max_tokens=2))
        await app.close()
    assert status == 400, content
    return json.loads(content)["error"]["message"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--waiting", type=int, default=32)
    parser.add_argument("--images", type=int, default=30, help="of each kind, in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = asyncio.run(measure(options.waiting, options.images, options.rounds))
    for kind in ("own", "fast host"):
        alone, with_others = found[f"{kind} alone"], found[f"{kind} beside"]
        found[f"{kind} ratio"] = with_others / alone
        print(
            f"{kind:9}: {alone:.1f} ms alone, {with_others:.1f} ms beside {options.waiting} chats that wait "
            f"for a dead host: {with_others / alone:.2f} times"
        )
    message = asyncio.run(refusal())
    print(f"those who wait are told: {message}")
    assert "127.0.0.2" in message
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
