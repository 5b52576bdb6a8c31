"""Measures a served model's accuracy on questions about held-out scenes, task by task.

python -m models.eval_pocket --base-url http://127.0.0.1:8000/v1 --model pocket
"""

from __future__ import annotations

import argparse
import base64
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from models import questions
from models import samples as data

Ask = Callable[[list[data.Sample]], list[str]]


def evaluate(ask: Ask, count: int, tasks: tuple[str, ...] = data.EVALUATION_TASKS) -> dict[str, float]:
    """Share of right answers by task; prints a line per task, with one of the wrong answers.

    Args:
        ask: answers each sample's first question.
        count: questions per task; 0 asks nothing.
    """
    scores = {}
    for task in tasks if count else ():
        samples = data.evaluation_set(task, count)
        given = ask(samples)
        wrong = [
            (sample.turns[0], answer)
            for sample, answer in zip(samples, given, strict=True)
            if not questions.is_correct(sample.turns[0], answer)
        ]
        scores[task] = 1 - len(wrong) / count
        note = f"   {wrong[0][0].answer!r}: {wrong[0][1]!r}" if wrong else ""
        print(f"{task:14} {scores[task]:6.1%}{note}", flush=True)
    return scores


def messages(sample: data.Sample) -> list[dict[str, Any]]:
    """The sample's first question as OpenAI messages; images as PNG data URLs, before the question."""
    pictures = [
        {"type": "image_url", "image_url": {"url": data_url(image)}}
        for image, turn in zip(sample.images, sample.shown_at, strict=True)
        if turn == 0
    ]
    question = {"type": "text", "text": sample.turns[0].question}
    return [{"role": "user", "content": [*pictures, question]}]


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class ServedAsk:
    """Asks a server that speaks OpenAI's chat completions, ``concurrency`` requests at a time."""

    def __init__(self, base_url: str, model: str, concurrency: int) -> None:
        # Training uses this module too, and needs no client.
        from openai import OpenAI

        self.client = OpenAI(base_url=base_url, api_key="none")
        self.model, self.concurrency = model, concurrency

    def __call__(self, samples: list[data.Sample]) -> list[str]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._one, samples))

    def _one(self, sample: data.Sample) -> str:
        completion = self.client.chat.completions.create(
            model=self.model, messages=messages(sample), max_tokens=48, temperature=0
        )
        return completion.choices[0].message.content or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--count", type=int, default=100, help="questions per task")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--tasks", nargs="+", choices=data.EVALUATION_TASKS, default=data.EVALUATION_TASKS)
    options = parser.parse_args()
    ask = ServedAsk(options.base_url, options.model, options.concurrency)
    evaluate(ask, options.count, tuple(options.tasks))


if __name__ == "__main__":
    main()
