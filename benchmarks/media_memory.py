"""Memory over many requests with media of all kinds, a third of which are cancelled.

    python -m benchmarks.media_memory [--requests 10000] [--at-a-time 16] [--json FILE]

The application runs in this process with a tiny model. Requests bring images in themselves or by address,
name earlier ones by their ``uuid``, bring lists of frames, damaged files, addresses that don't exist, or text
alone. Two of five clients leave within 30 milliseconds, most of them before their answer. After every tenth
of the requests the ledgers of media must be empty, and resident memory and the bytes of kept files are
printed. The first tenths fill caches and pools; what counts is the growth from the middle on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.asgi import application, chat, host, image_part, png, png_url, post
from benchmarks.memory import resident_mib
from benchmarks.pictures import unique_picture
from benchmarks.shapes import write_checkpoint

SIDE = 56


class Mix:
    """Draws requests, no two of whose images are alike.

    Args:
        site: the address of a host that answers with an image.
        rng: draws them.
    """

    def __init__(self, site: str, rng: random.Random) -> None:
        self._site = site
        self._rng = rng
        self._count = 0

    def body(self) -> dict[str, Any]:
        """The next request's body."""
        rng = self._rng
        self._count += 1
        parts = [self._part() for _ in range(rng.choice((0, 1, 1, 1, 2)))]
        text = {"type": "text", "text": f"number {self._count}"}
        return chat(*parts, text, max_tokens=rng.randint(1, 4), stream=rng.random() < 0.5, ignore_eos=True)

    def _part(self) -> dict[str, Any]:
        rng, own = self._rng, unique_picture(SIDE + self._rng.randrange(64), self._rng.randrange(1 << 40))
        kind = rng.randrange(10)
        if kind < 4:
            return image_part(png_url(own))
        if kind == 4:
            return image_part(png_url(own), f"image {self._count}")
        if kind == 5:
            return image_part(None, f"image {max(0, self._count - rng.randrange(200))}")
        if kind == 6:
            return image_part(f"{self._site}/{self._count}.png")
        if kind == 7:
            return image_part("http://127.0.0.9:80/nothing.png")
        if kind == 8:
            return image_part("data:image/png;base64," + png_url(own)[40:200])
        frames = [png_url(own.rotate(90 * turn)) for turn in range(rng.randint(1, 4))]
        return {"type": "video", "video": frames}


async def run(model: str, count: int, at_a_time: int) -> tuple[list[dict[str, float]], Counter]:
    """Memory after each tenth of ``count`` requests, and how requests ended."""
    rows: list[dict[str, float]] = []
    ends: Counter = Counter()
    rng = random.Random(0)
    async with host("127.0.0.3", png(unique_picture(SIDE, 1 << 41))) as site:
        app = application(model, [site], load_format="dummy")
        (local,), mix, places = app.models.values(), Mix(site.url, rng), asyncio.Semaphore(at_a_time)
        preprocessor = local.preprocessor
        assert preprocessor is not None
        ledgers = app.api.state.ledger, preprocessor.ledger
        references = app.api.state.pipelines["model"].references

        async def request() -> None:
            async with places:
                patience = rng.random() * 0.03 if rng.random() < 0.4 else None
                status, _ = await post(app.api, mix.body(), patience=patience)
                ends["cancelled" if status is None else str(status)] += 1

        for tenth in range(1, 11):
            await asyncio.gather(*(request() for _ in range(count * tenth // 10 - sum(ends.values()))))
            deadline = time.monotonic() + 60
            while not (all(ledger.is_empty for ledger in ledgers) and local.language_model.is_idle()):
                assert time.monotonic() < deadline, f"open: {[ledger.held() for ledger in ledgers]}"
                await asyncio.sleep(0.01)
            row = {"requests": sum(ends.values()), "resident MiB": resident_mib()}
            rows.append(row | {"kept MiB": references.held_bytes / (1 << 20)})
            print("  ".join(f"{name} {value:.1f}" for name, value in rows[-1].items()), flush=True)
        await app.close()
    return rows, ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--at-a-time", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint("tiny", Path(folder))
        rows, ends = asyncio.run(run(str(model), options.requests, options.at_a_time))
    # By half of the requests every cache is full.
    grown = rows[-1]["resident MiB"] - rows[4]["resident MiB"]
    print(f"ends: {dict(ends)}")
    print(
        f"resident memory grew by {grown:.1f} MiB over the last {rows[-1]['requests'] - rows[4]['requests']}"
    )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "ends": ends, "grown MiB": grown}, indent=1))


if __name__ == "__main__":
    main()
