"""Measures a served model's tool calls about held-out scenes, over HTTP, where it is free to call or not.

python -m models.eval_calls --base-url http://127.0.0.1:8000/v1 --model pocket
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from models import calls, questions, scenes
from models import samples as data
from models.eval_pocket import data_url

REPORT = {"color": "string", "shape": "string", "count": "integer"}
TASKS = ("report", "chosen", "answered", "plain", "JSON")
_SEED = 1 << 41


@dataclass(slots=True)
class Question:
    """A question with tools.

    Attributes:
        messages, tools: in OpenAI's form; ``response_format`` too, None where none is sent.
        is_right: of the answer's message, as a mapping.
    """

    messages: list[calls.Message]
    tools: list[calls.Message]
    is_right: Callable[[Mapping[str, Any]], bool]
    response_format: calls.Message | None = None


def evaluation_set(task: str, count: int) -> list[Question]:
    """``count`` questions; the same for every call, and never drawn in training.

    Args:
        task: ``report`` offers one tool that takes colour, shape and count, and asks for it; ``chosen``
            offers others too; ``answered`` goes on behind the tool's result; ``plain`` asks what needs no
            tool, of any kind; ``JSON`` wants the same facts by ``response_format``.
    """
    make = {"report": _report, "chosen": _chosen, "answered": _answered, "plain": _plain, "JSON": _json}[task]
    return [make(random.Random(_SEED + 1000 * TASKS.index(task) + index)) for index in range(count)]


def _scene(rng: random.Random) -> tuple[scenes.Scene, calls.Values]:
    """One to six things of one colour and shape, of any pair: one in twelve was never seen in training."""
    scene = scenes.shapes_scene(rng, scenes.random_size(rng), calls.uniform_pairs(rng, None))
    thing = scene.things[0]
    return scene, {"color": thing.color, "shape": thing.shape, "count": len(scene.things)}


def _asked(scene: scenes.Scene, text: str) -> calls.Message:
    image = {"type": "image_url", "image_url": {"url": data_url(scene.image)}}
    return {"role": "user", "content": [image, {"type": "text", "text": text}]}


def _wording(rng: random.Random) -> str:
    return calls.wordings(rng, "report", "report", list(REPORT), None)


def _is_call(arguments: calls.Values) -> Callable[[Mapping[str, Any]], bool]:
    def is_right(message: Mapping[str, Any]) -> bool:
        found = [call["function"] for call in message.get("tool_calls") or ()]
        return [(call["name"], _object(call["arguments"])) for call in found] == [("report", arguments)]

    return is_right


def _object(text: str) -> Any:
    """JSON's content; None if the text was cut."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _report(rng: random.Random) -> Question:
    scene, facts = _scene(rng)
    return Question([_asked(scene, _wording(rng))], [calls.function("report", REPORT)], _is_call(facts))


def _chosen(rng: random.Random) -> Question:
    scene, facts = _scene(rng)
    other = calls.function("save_caption", {"caption": "string"})
    tools = [calls.function("report", REPORT), *rng.sample([other, *calls.other_tools(rng, 3)], 2)]
    rng.shuffle(tools)
    return Question([_asked(scene, _wording(rng))], tools, _is_call(facts))


def _answered(rng: random.Random) -> Question:
    scene, facts = _scene(rng)
    message = calls.said(("report", facts))
    message["tool_calls"][0]["function"]["arguments"] = json.dumps(facts)
    result = {"role": "tool", "tool_call_id": "call_0", "content": rng.choice(calls.TAKEN)}
    wanted = questions.Turn("caption", "", "", questions.letters(questions.caption(scene)))
    messages = [_asked(scene, _wording(rng)), message, result]
    return Question(messages, [calls.function("report", REPORT)], _says(wanted))


def _plain(rng: random.Random) -> Question:
    task = rng.choice(data.EVALUATION_TASKS[:9])
    scene, turn = data.make_scene(rng, task, scenes.random_size(rng), held_out=None)
    tools = [calls.function("report", REPORT), *calls.other_tools(rng, rng.randint(0, 2))]
    return Question([_asked(scene, turn.question)], tools, _says(turn))


def _says(turn: questions.Turn) -> Callable[[Mapping[str, Any]], bool]:
    def is_right(message: Mapping[str, Any]) -> bool:
        return not message.get("tool_calls") and questions.is_correct(turn, message.get("content") or "")

    return is_right


def _json(rng: random.Random) -> Question:
    scene, facts = _scene(rng)
    schema = calls.function("", REPORT)["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "facts", "schema": schema}}
    text = rng.choice(["Describe the picture.", "What do you see?", "Give color, shape and count as JSON."])

    def is_right(message: Mapping[str, Any]) -> bool:
        return _object(message.get("content") or "") == facts

    return Question([_asked(scene, text)], [], is_right, form)


Ask = Callable[[list[Question]], list[Mapping[str, Any]]]


def evaluate(ask: Ask, count: int, tasks: tuple[str, ...] = TASKS) -> dict[str, float]:
    """Share of right answers by task; prints a line per task, with one of the wrong answers."""
    scores = {}
    for task in tasks:
        asked = evaluation_set(task, count)
        given = list(zip(asked, ask(asked), strict=True))
        wrong = [message for question, message in given if not question.is_right(message)]
        scores[task] = 1 - len(wrong) / count
        print(f"{task:14} {scores[task]:6.1%}{f'   {wrong[0]}' if wrong else ''}", flush=True)
    return scores


class ServedAsk:
    """Asks a server that speaks OpenAI's chat completions, ``concurrency`` requests at a time."""

    def __init__(self, base_url: str, model: str, concurrency: int) -> None:
        from openai import OpenAI

        self.client = OpenAI(base_url=base_url, api_key="none")
        self.model, self.concurrency = model, concurrency

    def __call__(self, asked: list[Question]) -> list[Mapping[str, Any]]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._one, asked))

    def _one(self, question: Question) -> Mapping[str, Any]:
        options: dict[str, Any] = {"tools": question.tools} if question.tools else {}
        if question.response_format is not None:
            options["response_format"] = question.response_format
        completion = self.client.chat.completions.create(
            model=self.model, messages=question.messages, max_tokens=96, temperature=0, **options
        )
        return completion.choices[0].message.model_dump(exclude_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--count", type=int, default=200, help="questions per task")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    options = parser.parse_args()
    evaluate(
        ServedAsk(options.base_url, options.model, options.concurrency), options.count, tuple(options.tasks)
    )


if __name__ == "__main__":
    main()
