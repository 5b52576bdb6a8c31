"""The laws that every family keeps, each stated once: the table of families and laws of the README.

Answers are compared with Transformers' own, or with those of a reference put together from its parts: tokens
under greedy and their log-probabilities, or the vectors of models that make embeddings.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import median

import pytest
import torch

from engine import LLM
from engine.checkpoint.folder import Checkpoint
from engine.errors import InvalidRequest
from engine.families.registry import supported_architectures
from tests.engine.families.case import CasePrompt, FamilyCase
from tests.engine.families.cases import CASES, LIKE
from tests.engine.families.embedded import as_embeddings
from tests.engine.families.made import Made
from tests.engine.tiny import picture


def single_image(model: Made, hub: Made, wide: bool) -> None:
    """One image, and another one in the same words."""
    _check_media(model, model.case.single_prompts(), wide)


def several_images(model: Made, hub: Made, wide: bool) -> None:
    """Next to each other and apart, of different sizes; each of them counts."""
    _check_media(model, model.case.several_prompts(), wide)


def video(model: Made, hub: Made, wide: bool) -> None:
    """Frames as one item, before an image; models without videos say so. Each frame counts: without ``wide``
    the first and the last one are tried."""
    if model.case.video is not None:
        _check_media(model, model.case.video_prompts(), wide)
    elif model.case.placeholder is not None:
        _check_refused(model, {"video": [picture(40, 56), picture(40, 56, 1)]}, "frames|videos")
    else:
        _check_refused(model, {"video": [picture(40, 56)]}, "no images")


def _check_media(model: Made, prompts: list[CasePrompt], wide: bool) -> None:
    """Equal words with another image have another answer, and the prefix cache keeps the two apart.

    Without ``wide`` all images of a prompt are other ones at once for a case that is like another.
    """
    if not prompts:
        _check_refused(model, {"image": [picture(40, 56)]}, "no images")
        return
    model.check(model.plain, prompts)
    at_once = model.case.name in LIKE and not wide
    pairs = [
        (other, prompt)
        for prompt in prompts
        for other in ([prompt.other()] if at_once else prompt.others(every_frame=wide))
    ]
    # Or all of this would hold if images were ignored.
    assert all(model.answer(other).differs(model.answer(prompt)) for other, prompt in pairs)
    model.check(model.plain, [other for other, _ in pairs])


def _check_refused(model: Made, data: dict, reason: str) -> None:
    llm = model.plain
    with pytest.raises(InvalidRequest, match=reason):
        model.run(llm, [{"prompt": model.case.frame.format("hello"), "multi_modal_data": data}])
    llm.check_integrity()


def batch_is_alone(model: Made, hub: Made, wide: bool) -> None:
    """A text, an image, several, and a video in one batch, and all of their logits; each by itself.

    Without ``wide`` the last prompt of each kind is asked by itself, and none of a case that is like another.
    """
    prompts = model.case.prompts()
    llm = model.llm(enable_prefix_caching=False)
    model.check_closely(llm, prompts, prompt_logprobs=1)
    some = [] if model.case.name in LIKE else model.case.one_of_each()
    for prompt in prompts if wide else some:
        model.check(llm, [prompt], prompt_logprobs=3)


def chunked_is_whole(model: Made, hub: Made, wide: bool) -> None:
    """Steps and blocks of few tokens split images between them; outputs stay the same."""
    llm = model.llm(max_num_batched_tokens=model.case.few_tokens, max_num_seqs=4, block_size=4)
    model.check(llm, model.case.prompts(), prompt_logprobs=2)


def preempted_or_cached(model: Made, hub: Made, wide: bool) -> None:
    """Blocks for two prompts, but not for their answers, so that one is interrupted and computed again; and
    all prompts twice, the second time from the cache. Without ``wide`` few tokens a step only, and a prompt
    of each kind twice."""
    prompts = model.case.prompts()
    lengths = [len(model.answer(prompt).ids) for prompt in prompts[:2]]
    blocks = sum(-(-length // 4) for length in lengths) + 2
    few = {"num_kv_blocks": blocks, "block_size": 4, "enable_prefix_caching": False}
    # With few tokens a step, prompts are interrupted as well.
    ways = [{**few, "max_num_batched_tokens": model.case.few_tokens}, few]
    for options in ways if wide else ways[:1]:
        llm = model.llm(**options)
        # A long prompt doesn't begin in the blocks that answers have not filled yet.
        if model.case.windows or min(lengths) > 200:
            _interrupt(llm)
        model.check(llm, prompts[:2] * 2, prompt_logprobs=2)
        # Vectors have no answer for which blocks could lack: those prompts wait for each other.
        assert model.case.embeds or llm.metrics()["preempted"] > 0
    llm = model.llm(block_size=4)
    some = prompts if wide else model.case.one_of_each()
    model.check(llm, some)
    model.check(llm, some, block=4)


def _interrupt(llm: LLM) -> None:
    """Preempt a request at a few steps, for models that hardly lack blocks."""
    scheduler, steps = llm._engine.core.scheduler, itertools.count()
    schedule = scheduler.schedule

    def interrupted():
        if next(steps) in (3, 8, 14, 21) and scheduler.running:
            scheduler.preempt(scheduler.running[0])
        return schedule()

    scheduler.schedule = interrupted


def embeds_are_pixels(model: Made, hub: Made, wide: bool) -> None:
    """Rows of images in place of images, item by item and all in one tensor."""
    prompts = model.case.single_prompts() + model.case.several_prompts()
    if not prompts:
        _check_refused(model, {"image": torch.zeros(1, 4, 64)}, "no images")
        return
    llm = model.plain
    # All prompts item by item, then all of them in one tensor each.
    for forms in zip(*as_embeddings(llm.config, prompts), strict=True):
        entries = [
            {"prompt": prompt.text, "multi_modal_data": {"image": embeds}}
            for prompt, embeds in zip(prompts, forms, strict=True)
        ]
        for output, prompt in zip(model.run(llm, entries), prompts, strict=True):
            model.compare(output, model.answer(prompt))
    llm.check_integrity()


def hub_layout(model: Made, hub: Made, wide: bool) -> None:
    """config.json, tensors and shards as in public checkpoints, with tied embeddings where small ones tie
    them; and what ends an answer, in this layout and in the other. Without ``wide`` a prompt of each kind."""
    llm = hub.llm()
    hub.check(llm, hub.case.prompts() if wide else hub.case.one_of_each())
    if not model.case.embeds:
        hub.check_ends(llm)
        model.check_ends(model.plain)


def bfloat16(model: Made, hub: Made, wide: bool) -> None:
    """On a CPU; see :func:`_check_bfloat16`. Without ``wide`` prompts are whole, not in chunks."""
    _check_bfloat16(model, "cpu", chunked=wide)


def bfloat16_on_gpu(model: Made, hub: Made, wide: bool) -> None:
    """Check bfloat16 with the GPU's kernels; see :func:`_check_bfloat16`."""
    _check_bfloat16(model, "cuda", chunked=True)


def _check_bfloat16(model: Made, device: str, chunked: bool) -> None:
    """Check that batched outputs, of whole prompts and of ``chunked`` ones, are near the reference's.

    Outputs with other images must exceed the same bound, or it would prove nothing.
    """
    prompts, tolerance = model.case.prompts(), model.case.tolerance
    shown = [prompt for prompt in prompts if prompt.pictures]
    ways = [{}, {"max_num_batched_tokens": model.case.few_tokens, "max_num_seqs": 4}]
    for options in ways if chunked else ways[:1]:
        llm = model.llm(device=device, dtype="bfloat16", enable_prefix_caching=False, **options)
        assert max(model.distances(llm, prompts, prompts)) < tolerance
        others = model.distances(llm, [prompt.other() for prompt in shown], shown)
        assert min(others, default=1) > tolerance
        # A single small image may change little; most change a lot.
        assert median(others or [1]) > 2 * tolerance
        llm.check_integrity()


LAWS = {
    "single image": single_image,
    "several images": several_images,
    "video": video,
    "batch = alone": batch_is_alone,
    "chunked = whole": chunked_is_whole,
    "preempted or cached": preempted_or_cached,
    "embeds = pixels": embeds_are_pixels,
    "hub layout": hub_layout,
    "bf16 on a CPU": bfloat16,
    "bf16 on a GPU": bfloat16_on_gpu,
}

#: Laws about ways to run a tower and a decoder, whatever model has them.
_OF_THE_ENGINE = ("chunked = whole", "preempted or cached", "bf16 on a CPU")
_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _marks(case: FamilyCase, law: str) -> list[pytest.MarkDecorator]:
    if "GPU" in law:
        return [pytest.mark.gpu, _NO_GPU]
    return [pytest.mark.wide] if case.name in LIKE and law in _OF_THE_ENGINE else []


CELLS = [
    pytest.param(case, law, id=f"{case.name}-{law}", marks=_marks(case, law))
    for case in CASES
    for law in LAWS
]


def test_every_architecture_has_a_row(made):
    rows = {name for case in CASES for name in Checkpoint.open(str(made(case).path)).config["architectures"]}
    assert rows == set(supported_architectures())


def test_a_case_that_is_like_another_names_one_that_all_laws_are_tested_for():
    names = {case.name for case in CASES}
    assert LIKE.keys() <= names and set(LIKE.values()) <= names - LIKE.keys()


def test_the_readme_has_all_columns():
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    assert [law for law in LAWS if f"\n| {law} | " not in readme] == []


@pytest.mark.parametrize(("case", "law"), CELLS)
def test_law(made, case, law, wide):
    LAWS[law](made(case), made(case, hub=True), wide)
