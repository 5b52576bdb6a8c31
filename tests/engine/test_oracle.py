"""Random schedules on a real tiny model: whatever happens around a request, its tokens are its own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.frontend import Frontend, PreparedPrompt
from engine.loading import LoadedEngine, load_engine
from tests.wide import examples

from . import tiny

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEXTS = ["hello world", "describe this image in detail please", "a red square on a blue background 0 1 2 3 4"]
ROOM = 80


class Oracle:
    """One tiny model; engines of any settings over it; and the tokens of each prompt alone."""

    def __init__(self, folder) -> None:
        self.path = str(tiny.make_qwen2_vl(folder, seed=9))
        self.alone = LLM(self.path, max_model_len=ROOM, max_num_seqs=4, enable_prefix_caching=False)
        self.front = Frontend.load(EngineConfig(model=self.path, max_model_len=ROOM))
        self.pictures = [
            tiny.picture(w, h, seed) for seed, (w, h) in enumerate([(24, 24), (24, 24), (40, 16)])
        ]
        self._wanted: dict[tuple, list[int]] = {}
        self._prepared: dict[tuple, tuple[PreparedPrompt, list]] = {}

    def entry(self, key: tuple) -> dict:
        text, pictures = key
        images: list[Image.Image] = [self.pictures[i] for i in pictures]
        return {
            "prompt": TEXTS[text] + IMAGE * len(images) + "what",
            "multi_modal_data": {"image": images},
        }

    def wanted(self, key: tuple, tokens: int) -> list[int]:
        if key not in self._wanted:
            params = SamplingParams(temperature=0.0, max_tokens=16)
            (output,) = self.alone.generate(self.entry(key), params, use_tqdm=False)
            self._wanted[key] = output.outputs[0].token_ids
        return self._wanted[key][:tokens]

    def prepared(self, key: tuple) -> tuple[PreparedPrompt, list]:
        if key not in self._prepared:
            prompt = self.front.from_prompt(self.entry(key))
            rows = self.alone._encoder.encode(prompt.media) if prompt.media else []
            self._prepared[key] = prompt, rows
        return self._prepared[key]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("oracle"))


REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.integers(0, 2),
            "pictures": st.lists(st.integers(0, 2), max_size=2),
            "tokens": st.integers(3, 16),
            "arrives": st.integers(0, 6),
            "aborted": st.one_of(st.none(), st.integers(1, 15)),
            "priority": st.integers(-1, 1),
        }
    ),
    min_size=3,
    max_size=9,
)
#: Settings that change how a schedule runs. Drawn from a few, since each takes a moment to load.
ENGINES = [
    {"block_size": 4, "num_kv_blocks": 22, "max_num_batched_tokens": 19, "max_num_seqs": 4, "run_ahead": 1},
    {"block_size": 2, "num_kv_blocks": 42, "max_num_batched_tokens": 7, "max_num_seqs": 3, "run_ahead": 3},
    {"block_size": 8, "num_kv_blocks": 12, "max_num_batched_tokens": 64, "max_num_seqs": 6, "run_ahead": 0},
    {
        "block_size": 4,
        "num_kv_blocks": 22,
        "max_num_batched_tokens": 33,
        "max_encoder_tokens": 20,
        "enable_prefix_caching": False,
    },
]


@pytest.fixture(scope="module")
def engines(oracle) -> list[LoadedEngine]:
    return [load_engine(EngineConfig(model=oracle.path, max_model_len=ROOM, **kind)) for kind in ENGINES]


def run_schedule(oracle: Oracle, engine: LoadedEngine, requests: list[dict]) -> None:
    """Run ``requests`` on ``engine``; every token must be the one that its request has alone."""
    groups, given_tokens, ended = {}, {}, set()
    for step in range(400):
        for index, spec in enumerate(requests):
            if spec["arrives"] == step:
                prompt, rows = oracle.prepared((spec["text"], tuple(spec["pictures"])))
                params = SamplingParams(temperature=0.0, max_tokens=spec["tokens"])
                group = engine.requests.generation(str(index), prompt.inputs, params, rows, spec["priority"])
                groups[index], given_tokens[index] = group.requests[0], []
                engine.core.add(group.requests[0])
            if spec["aborted"] is not None and step == spec["arrives"] + spec["aborted"]:
                engine.core.abort(groups[index])
        for events in engine.core.step():
            for row, request in enumerate(events.requests):
                if request is not None:
                    index = int(request.id.split("/")[0])
                    given_tokens[index].append(int(events.tokens[row]))
                    if row in events.finished:
                        ended.add(index)
        if step > 30 and not engine.core.has_work:
            break
    assert not engine.core.has_work
    engine.core.check_integrity()
    for index, spec in enumerate(requests):
        wanted = oracle.wanted((spec["text"], tuple(spec["pictures"])), spec["tokens"])
        if spec["aborted"] is None:
            assert given_tokens[index] == wanted and index in ended
        else:
            assert given_tokens[index] == wanted[: len(given_tokens[index])]


def test_tokens_are_those_of_the_request_alone(oracle, engines, wide):
    @examples(200, wide)
    @given(requests=REQUESTS, kind=st.integers(0, len(ENGINES) - 1))
    def run(requests, kind):
        run_schedule(oracle, engines[kind], requests)

    run()
    # The above proves little unless requests were interrupted, prefixes shared and prompts split.
    stats = [engine.core.scheduler.stats for engine in engines]
    assert sum(s.preempted for s in stats) > (20 if wide else 5)
    assert sum(s.cached_tokens for s in stats) > (1000 if wide else 250)
    assert stats[-1].cached_tokens == 0


def test_the_pictures_matter(oracle):
    """Two images of equal size give other tokens, or a mix-up of them would go unseen."""
    assert oracle.wanted((0, (0,)), 12) != oracle.wanted((0, (1,)), 12)
    assert np.asarray(oracle.pictures[0]).shape == np.asarray(oracle.pictures[1]).shape
