"""A conversation that grows by an image a turn: what of it comes from the prefix cache, and each first token.

    python -m benchmarks.conversation --shape qwen3.5-4b [--turns 5] [--side 1024] [--text 64] [--answer 64]
        [--opening 0] [--kv-cache-dtype fp8] [--json FILE]

Every turn sends the whole conversation again with one more image and question. Of its tokens, those of the
turn before and of its answer can be reused. A turn is also timed with nothing to reuse, under a salt of its
own. Dummy weights; the answers are kept to tokens of text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.offline import Works, timed, versions
from benchmarks.pictures import unique_picture
from benchmarks.shapes import SHAPES, write_checkpoint
from engine import LLM, SamplingParams

#: Ids of text in every shape, for answers.
_TEXT_IDS = list(range(1000, 1200))


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn's figures.

    Attributes:
        prompt: tokens.
        reusable: of these, tokens that the turn before has computed.
        cached: of these, tokens from the prefix cache.
        first_ms: from the PIL image and the ids to the first token.
        cold_ms: the same with nothing in the caches.
    """

    prompt: int
    reusable: int
    cached: int
    first_ms: float
    cold_ms: float


class Conversation:
    """A conversation on one loaded model."""

    def __init__(self, llm: LLM, shape: str, *, side: int, text: int, answer: int) -> None:
        self.llm, self.side, self.text, self.answer = llm, side, text, answer
        self._ids = Works(llm, shape, 1).text_ids
        tokenizer = llm.get_tokenizer()
        self._image = tokenizer.encode(SHAPES[shape].picture, add_special_tokens=False)
        self._seeds = count()

    def run(self, turns: int, opening: int) -> list[Turn]:
        """Hold a conversation whose first turn begins with ``opening`` tokens of text more."""
        salt, first = f"conversation {next(self._seeds)}", next(self._seeds)
        ids, images, found, known = self._ids(opening) if opening else [], [], [], 0
        for turn in range(turns):
            images.append(unique_picture(self.side, 1000 * first + turn))
            ids = [*ids, *self._image, *self._ids(self.text)]
            cold, _ = self._first(ids, images, f"{salt}, turn {turn} alone")
            seconds, output = self._first(ids, images, salt)
            length = len(output.prompt_token_ids)
            found.append(Turn(length, known, output.usage.cached_tokens, seconds * 1e3, cold * 1e3))
            answer = self._generate(ids, images, salt, self.answer)
            ids = [*ids, *answer.outputs[0].token_ids]
            # The last token of an answer is not computed.
            known = length + self.answer - 1
        return found

    def _first(self, ids: list[int], images: list, salt: str) -> tuple[float, Any]:
        return timed(lambda: self._generate(ids, images, salt, 1))

    def _generate(self, ids: list[int], images: list, salt: str, tokens: int) -> Any:
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, allowed_token_ids=_TEXT_IDS
        )
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": images}, "cache_salt": salt}
        return self.llm.generate(prompt, params, use_tqdm=False)[0]


def summary(turns: list[Turn]) -> dict[str, float]:
    """The shares that the turns from the second on show together, and the second turn's beside the first."""
    later = turns[1:]
    return {
        "reusable tokens hit": sum(t.cached for t in later) / sum(t.reusable for t in later),
        "second first token / first": turns[1].first_ms / turns[0].first_ms,
        "second first token / cold": turns[1].first_ms / turns[1].cold_ms,
        "last first token / cold": turns[-1].first_ms / turns[-1].cold_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="tiny-qwen3.5", choices=sorted(SHAPES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--side", type=int, help="pixels of an image's side; 1024 on a GPU")
    parser.add_argument("--text", type=int, default=64, help="tokens of a question")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--opening", type=int, default=0, help="tokens of text before the first image")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "fp8"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    limits = {"max_num_seqs": 32, "max_num_batched_tokens": 8192} if gpu else {"max_num_seqs": 4}
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(options.shape, Path(folder))
        llm = LLM(
            str(path),
            load_format="dummy",
            max_model_len=32768,
            kv_cache_dtype=options.kv_cache_dtype,
            **limits,  # type: ignore[arg-type]
        )
        side = options.side or (1024 if gpu else SHAPES[options.shape].picture_size)
        talk = Conversation(llm, options.shape, side=side, text=options.text, answer=options.answer)
        # The first one compiles and warms what the second one measures.
        talk.run(2, options.opening)
        turns = talk.run(options.turns, options.opening)
        llm.check_integrity()
    print(versions())
    print(
        f"{'turn':>4} {'prompt':>7} {'reusable':>8} {'cached':>7} {'hit':>6} {'first ms':>9} {'cold ms':>8}"
    )
    for number, turn in enumerate(turns, 1):
        hit = f"{turn.cached / turn.reusable:6.1%}" if turn.reusable else "     -"
        print(
            f"{number:4} {turn.prompt:7} {turn.reusable:8} {turn.cached:7} {hit} "
            f"{turn.first_ms:9.1f} {turn.cold_ms:8.1f}"
        )
    shares = summary(turns)
    for name, share in shares.items():
        print(f"{name:28} {share:7.3f}")
    if options.json:
        options.json.write_text(json.dumps({"turns": [asdict(turn) for turn in turns], **shares}, indent=1))


if __name__ == "__main__":
    main()
