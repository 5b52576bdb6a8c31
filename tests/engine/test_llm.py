"""``LLM`` as users call it: its options, all that a prompt may be, and where images may come from."""

import base64
import gc
import io
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pypdfium2
import pytest
import torch
from PIL import Image

from engine import LLM, SamplingParams, offline
from engine.checkpoint.folder import Checkpoint
from engine.collector import Collector
from engine.config import EngineConfig
from engine.distributed.group import SingleProcessGroup
from engine.errors import (
    CheckpointError,
    ConfigError,
    InvalidRequest,
    MediaError,
    MediaForbidden,
    MediaTooLarge,
)
from engine.executor import rank
from engine.families.registry import resolve
from engine.frontend import Frontend
from engine.graphs import CudaCapture
from engine.sampling_params import StructuredSpec
from engine.startup import StartTimes
from engine.weights import loader
from tests.engine import tiny
from tests.engine.media.pdfs import page, pdf
from tests.serving import serve_files

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tiny.make_qwen2_vl(tmp_path_factory.mktemp("llm"), seed=8)


@pytest.fixture(scope="module")
def llm(path) -> LLM:
    return LLM(str(path), max_model_len=256, limit_mm_per_prompt={"image": 2})


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with ``a.png`` in it."""
    folder = tmp_path_factory.mktemp("files")
    tiny.picture(60, 44, 1).save(folder / "a.png")
    return folder


@pytest.fixture
def site(files) -> Iterator[str]:
    """The address of a server of those files."""
    with serve_files(files) as address:
        yield address


def generated(llm: LLM, prompts) -> list[list[int]]:
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    llm.check_integrity()
    return [output.outputs[0].token_ids for output in outputs]


def about(image, text: str = IMAGE + "what?") -> dict:
    return {"prompt": text, "multi_modal_data": {"image": image}}


def asked(url: str) -> list[dict]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    return [{"role": "user", "content": content}]


def test_every_way_to_give_a_prompt(llm):
    one, two = tiny.picture(60, 44, 1), tiny.picture(24, 40, 2)
    encode = llm.get_tokenizer().encode
    both = f"{IMAGE} and {IMAGE}"
    prompts = [
        "hello world",
        {"prompt": "hello world"},
        {"prompt_token_ids": encode("hello world")},
        {"prompt_token_ids": np.array(encode("hello world"))},
        encode("hello world"),
        np.array(encode("hello world")),
        about(one),
        about([one]),
        about(np.array(one)),
        {"prompt_token_ids": encode(IMAGE + "what?"), "multi_modal_data": {"image": one}},
        about([one, two], both),
        about([two, one], both),
    ]
    together = generated(llm, prompts)
    assert together == [tokens for prompt in prompts for tokens in generated(llm, prompt)]
    assert together[0] == together[1] == together[2] == together[3] == together[4] == together[5]
    assert together[6] == together[7] == together[8] == together[9]
    assert len({tuple(tokens) for tokens in together}) == 4
    assert llm.generate([], use_tqdm=False) == []
    assert generated(llm, encode("hello world")) == together[:1]
    assert generated(llm, np.array(encode("hello world"))) == together[:1]


def test_every_way_to_show_a_picture_in_a_message(llm):
    picture = tiny.picture(60, 44, 1)
    file = io.BytesIO()
    picture.save(file, "PNG")
    found = []
    for shown in (
        {"type": "image", "image": picture},
        {"type": "image_pil", "image_pil": picture},
        {"type": "image", "image": np.array(picture)},
        {"type": "image", "image": file.getvalue()},
    ):
        message = {"role": "user", "content": [shown, "what?"]}
        found.append(llm.chat([message], GREEDY, use_tqdm=False)[0].outputs[0].token_ids)
    assert found == found[:1] * 4
    blank = {"role": "user", "content": [{"type": "image", "image": np.zeros((44, 60), np.uint8)}, "what?"]}
    assert llm.chat([blank], GREEDY, use_tqdm=False)[0].outputs[0].token_ids != found[0]


@pytest.mark.parametrize("given", [{"role": "user", "content": "a"}, "a", None, 3], ids=repr)
def test_what_is_no_conversation(llm, given):
    with pytest.raises(InvalidRequest, match="must be a list of messages, or of such lists") as refused:
        llm.chat(given, use_tqdm=False)
    assert refused.value.param == "messages"


@pytest.mark.parametrize("given", [{"max_tokens": 3}, [None], "greedy"], ids=repr)
def test_what_are_no_sampling_params(llm, given):
    with pytest.raises(InvalidRequest, match="must be SamplingParams, or a list") as refused:
        llm.generate("a", given, use_tqdm=False)
    assert refused.value.param == "sampling_params"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (3, "not int"),
        ([3, "a"], "not int"),
        ([[3, "a"]], "not list"),
        ({"prompt": "a", "mm_processor_kwargs": [1]}, "mm_processor_kwargs must be an object"),
        pytest.param(
            about(tiny.picture(24, 24)) | {"mm_processor_kwargs": {"num_crops": 4}},
            "mm_processor_kwargs.num_crops",
            # An image's own text has its address, which differs between workers.
            id="an option that the processor lacks",
        ),
        ({"prompt_token_ids": ["a"]}, "list of integers"),
        ({"prompt_token_ids": [1.5]}, "list of integers"),
        ({"prompt_token_ids": [320]}, "320 is outside of the vocabulary"),
        ({"prompt": 3}, "needs a text"),
        ({"text": "a"}, "no entry 'text'"),
        ({"prompt": "a", "cache_salt": 7}, "cache_salt must be a string"),
        ({"prompt": "a", "cache_salt": "\ud800"}, "cache_salt must be a string"),
        (about(3), r"multi_modal_data\.image\[0\] must be a PIL image, not int"),
        ({"prompt": "a", "multi_modal_data": {"audio": []}}, "no entry 'audio'"),
        ({"prompt": "a", "multi_modal_data": "a.png"}, "multi_modal_data must be a dict, not str"),
        (about(np.zeros((4, 4, 4, 3), np.uint8)), r"shape \(4, 4, 4, 3\) is no image"),
        (about(np.zeros((3, 5, 5), np.uint8)), r"shape \(3, 5, 5\) is no image"),
        (about(np.zeros((4, 4, 3), np.float32)), "pixels are uint8"),
        (about({"image_embeds": torch.zeros(4, 8)}), "beside image_embeds.$"),
        (about(np.zeros((4, 8), np.int32)), "must be of floating-point numbers"),
        (about({"image_embeds": torch.zeros(1, 4, 8, device="meta")}), "on the device meta"),
        (b"ab", "not bytes"),
        ([True, False], "not bool"),
        (about([]), "image placeholders in the prompt is 1, but the number of images given is 0"),
    ],
    ids=str,
)
def test_what_is_no_prompt(llm, prompt, words):
    with pytest.raises(InvalidRequest, match=words):
        generated(llm, prompt)
    llm.check_integrity()


def test_variables_of_the_template_have_names(llm):
    with pytest.raises(InvalidRequest) as refused:
        llm.chat([{"role": "user", "content": "a"}], GREEDY, use_tqdm=False, chat_template_kwargs=["a"])
    assert refused.value.param == "chat_template_kwargs"


def test_options_of_the_processor_come_with_a_prompt_or_a_chat(llm):
    picture, options = tiny.picture(90, 90), {"max_pixels": 1024}
    (small,) = llm.generate(about(picture) | {"mm_processor_kwargs": options}, GREEDY, use_tqdm=False)
    (large,) = llm.generate(about(picture), GREEDY, use_tqdm=False)
    rows = [
        output.prompt_token_ids.count(tiny.QWEN_SPECIALS.index("<|image_pad|>")) for output in (small, large)
    ]
    # 1024 pixels are 16 rows of 8 by 8.
    assert rows[0] == 16 < rows[1]
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}]
    (chat,) = llm.chat(messages, GREEDY, use_tqdm=False, mm_processor_kwargs=options)
    assert chat.prompt_token_ids.count(tiny.QWEN_SPECIALS.index("<|image_pad|>")) == 16


def test_what_an_output_says(llm):
    (output,) = llm.generate("hello world", GREEDY, use_tqdm=False)
    (completion,) = output.outputs
    assert output.prompt == "hello world"
    assert output.prompt_token_ids == llm.get_tokenizer().encode("hello world")
    assert completion.text == llm.get_tokenizer().decode(completion.token_ids)
    assert completion.finish_reason == "length" and len(completion.token_ids) == 6
    assert [next(iter(row)) for row in completion.logprobs] == completion.token_ids
    assert completion.cumulative_logprob == pytest.approx(
        sum(row[token].logprob for row, token in zip(completion.logprobs, completion.token_ids, strict=True))
    )


def test_a_limit_on_media_is_named_and_the_others_stay(path, llm):
    picture = tiny.picture(24, 24)
    with pytest.raises(MediaTooLarge, match="3 images, but limit_mm_per_prompt allows 2"):
        generated(llm, about([picture] * 3, IMAGE * 3))
    assert llm.config.limit_mm_per_prompt == {"image": 2, "video": 1}
    videos = {"prompt": "a", "multi_modal_data": {"video": [[picture] * 2] * 2}}
    with pytest.raises(MediaTooLarge, match="2 videos, but limit_mm_per_prompt allows 1"):
        generated(llm, videos)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_model_length": 5}, r"max_model_length: there is no such option; did you mean max_model_len\?"),
        ({"swap_spaces": 4}, "swap_spaces: there is no such option$"),
        ({"swap_space": 4}, "swap_space: there is no such option; what is preempted is computed again$"),
        (
            {"quantization": "awq_marlin"},
            "quantization: .* states itself that it is awq_marlin; leave this out",
        ),
        ({"prompt_lookup": 4}, "prompt_lookup: there is no such option here, but in speculation"),
        ({"speculation": {"prompt_lookups": 4}}, r"speculation\.prompt_lookups: .* mean prompt_lookup\?"),
        ({"fetch": {"allow_https": True}}, r"fetch\.allow_https: .*did you mean allow_http\?"),
        ({"task": "embeddings"}, "task: .*'embed'"),
        ({"max_model_len": 0}, "max_model_len: .*greater than 0"),
        ({"max_model_len": 4096}, "max_model_len is 4096, but the model was made for 1024"),
        ({"dtype": "int8"}, "dtype: .*'bfloat16'"),
        ({"dtype": torch.int8}, "dtype: .*'bfloat16'"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization: .*less than or equal to 1"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size is 3.*over 1, 2, 4 ranks"),
        ({"limit_mm_per_prompt": {"audio": 1}}, r"^limit_mm_per_prompt\.audio: "),
        ({"mm_processor_kwargs": {"num_crops": 4}}, "mm_processor_kwargs.*num_crops"),
        ({"chat_template": "/nowhere.jinja"}, "neither a file nor the text"),
        ({"block_size": 12}, "block_size: .*power of two"),
        ({"fetch": {"timeout": -1}}, "timeout: .*greater than 0"),
        ({"max_num_seqs": True}, "max_num_seqs: .*true and false"),
        ({"num_kv_blocks": 10**12}, "num_kv_blocks: .*less than"),
        ({"num_kv_blocks": 2**31 - 1}, "num_kv_blocks is 2147483647, which takes .* MiB, but there are"),
        ({"kv_cache_bytes": 10}, "10 bytes are left .*raise kv_cache_bytes, or lower block_size"),
        (
            {"kv_cache_bytes": 1 << 60, "max_num_seqs": 65536, "max_num_batched_tokens": 65537},
            "kv_cache_bytes is",
        ),
    ],
    ids=str,
)
def test_bad_options_are_named(path, options, words):
    with pytest.raises(ConfigError, match=words):
        LLM(str(path), **options)


def test_options_and_values_under_vllms_names():
    given = {"limit_mm_per_prompt": {"image": {"count": 3, "width": 512}, "video": 0}}
    found = EngineConfig(model="a", kv_cache_dtype="fp8_e4m3", load_format="safetensors", **given)
    assert (found.kv_cache_dtype, found.load_format) == ("fp8", "auto")
    assert found.limit_mm_per_prompt == {"image": 3, "video": 0}
    # What is offered is not said to be missing.
    assert not EngineConfig.ELSEWHERE.keys() & EngineConfig.model_fields.keys()


def test_kv_blocks_stay_within_the_limit_of_a_container(path, tmp_path, monkeypatch):
    limit, unlimited = tmp_path / "memory.limit_in_bytes", tmp_path / "memory.max"
    unlimited.write_text("max\n")
    monkeypatch.setattr(rank, "_MEMORY_LIMITS", (tmp_path / "none", unlimited, limit))
    options = {"max_model_len": 64, "kv_cache_bytes": 2 << 20, "max_num_seqs": 64}
    LLM(str(path), **options)
    limit.write_text(f"{1 << 20}\n")
    with pytest.raises(ConfigError, match=r"kv_cache_bytes is 2097152, .* but there are 1 MiB") as caught:
        LLM(str(path), **options)
    assert caught.value.param == "kv_cache_bytes"


@pytest.mark.parametrize(
    ("options", "field"), [({}, "gpu_memory_utilization"), ({"num_kv_blocks": 9}, "num_kv_blocks")]
)
def test_a_gpu_that_lacks_memory_for_kv_blocks_names_the_option(path, monkeypatch, options, field):
    checkpoint = Checkpoint.open(str(path))
    config = EngineConfig(model=str(path), dtype="bfloat16", device="cpu", **options)
    model = resolve(checkpoint).parse(checkpoint)
    loaded = rank.ModelRank.load(config, checkpoint, model, SingleProcessGroup(), StartTimes())
    loaded.decoder = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    for name, found in {"memory_reserved": 0, "memory_allocated": 0, "mem_get_info": (4096, 1 << 30)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    with pytest.raises(ConfigError, match=f"^{field} is ") as caught:
        loaded.check_blocks(9)
    assert caught.value.param == field


def test_options_that_are_understood(path, caplog):
    with caplog.at_level(logging.WARNING):
        llm = LLM(
            model=Path(path),
            trust_remote_code=True,
            dtype=torch.bfloat16,
            gpu_memory_utilization=0.5,
            tensor_parallel_size=1,
            mm_processor_kwargs={"max_pixels": 1024},
            max_model_len=64,
        )
    assert "trust_remote_code is ignored" in caplog.text
    assert llm.config.dtype == "bfloat16" and llm.max_model_len == 64
    (output,) = llm.generate(about(tiny.picture(90, 90)), GREEDY, use_tqdm=False)
    # 1024 pixels are 16 rows of 8 by 8.
    assert output.prompt_token_ids.count(tiny.QWEN_SPECIALS.index("<|image_pad|>")) == 16
    assert [LLM(str(path), dtype=name).config.dtype for name in ("half", "float")] == ["float16", "float32"]


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "visual.blocks.1.norm2.bias"])
def test_a_missing_tensor_is_named_before_any_is_read(tmp_path, monkeypatch, name):
    tiny.make_qwen2_vl(tmp_path)
    tiny.rewrite_tensors(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != name})
    monkeypatch.setattr(loader, "read_rows", lambda *_, **__: pytest.fail("read data"))
    with pytest.raises(CheckpointError, match=name.split(".", 1)[1].replace(".", r"\.")):
        LLM(str(tmp_path))


def test_the_seed_decides_where_requests_bring_none(path):
    def sampled(seed: int) -> list[int]:
        llm = LLM(str(path), max_model_len=64, seed=seed)
        (output,) = llm.generate("hello", SamplingParams(temperature=1.0, max_tokens=16), use_tqdm=False)
        return output.outputs[0].token_ids

    assert sampled(1) == sampled(1) != sampled(2)


def test_one_picture_of_several_prompts_is_read_once(llm, tmp_path):
    """It is opened, but not read yet; and prompts are prepared by several threads."""
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    for _ in range(3):
        with Image.open(tmp_path / "a.jpg") as picture:
            tokens = generated(llm, [about(picture)] * 8)
        assert all(each == tokens[0] for each in tokens)


class Watched(dict):
    """A prompt that notes who begins and who ends reading it."""

    def __init__(self, prompt, began: list[str], ended: list[str], seconds: float = 0.0) -> None:
        super().__init__(prompt=prompt)
        self.began, self.ended, self.seconds = began, ended, seconds

    def get(self, key, default=None):
        if key == "multi_modal_data":
            self.began.append(threading.current_thread().name)
            time.sleep(self.seconds)
            self.ended.append(threading.current_thread().name)
        return super().get(key, default)


def test_who_prepares(llm):
    """Threads prepare many prompts, the caller a lone one; an error leaves no thread at work."""
    began, ended = [], []
    generated(llm, Watched("what?", began, ended))
    assert began == [threading.current_thread().name]
    began.clear()
    generated(llm, [Watched("what?", began, ended)] * 3)
    assert len(began) == 3 and all(name.startswith("prepare") for name in began)
    began.clear()
    ended.clear()
    with pytest.raises(InvalidRequest):
        generated(llm, [Watched(5, began, ended), *[Watched("what?", began, ended, 0.2)] * 40])
    assert len(began) == len(ended)
    llm.check_integrity()


def test_nothing_is_computed_beyond_a_stop_string(llm):
    free = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    (whole,) = llm.generate("hello world", free, use_tqdm=False)
    text = whole.outputs[0].text
    stop = next(text[i : i + 3] for i in range(4, 20) if text.find(text[i : i + 3]) == i)
    before = llm.metrics()
    (output,) = llm.generate(
        "hello world", replace(free, stop=[stop], include_stop_str_in_output=True), use_tqdm=False
    )
    after = llm.metrics()
    assert output.outputs[0].finish_reason == "stop" and output.outputs[0].text.endswith(stop)
    made = len(output.outputs[0].token_ids)
    assert made < 40
    # Steps that were enqueued before the end was known have computed one token each.
    assert after["output_tokens"] - before["output_tokens"] <= made + llm.config.run_ahead + 1
    llm.check_integrity()


def test_an_interrupted_call_computes_nothing_more(llm, monkeypatch):
    prompts, tokens = ["hello world", "what?"], 100
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    core, before, steps = llm._engine.core, llm.metrics()["output_tokens"], []
    step = core.step

    def interrupted():
        steps.append(core.has_work)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts, params, use_tqdm=False)
    monkeypatch.undo()
    llm.check_integrity()
    # What was enqueued ends; the other steps of both answers never come.
    assert llm.metrics()["output_tokens"] - before <= 2 * (5 + llm.config.run_ahead)
    assert expected == [
        output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)
    ]


def test_a_call_interrupted_before_a_request_is_queued_leaves_none_behind(llm, monkeypatch):
    core, added = llm._engine.core, []
    add = core.add

    def interrupted(request):
        if len(added) == 1:
            raise KeyboardInterrupt
        added.append(request)
        add(request)

    monkeypatch.setattr(core, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["hello world", "what?", "who?"], GREEDY, use_tqdm=False)
    monkeypatch.undo()
    assert added[0].finished
    llm.check_integrity()


def test_embeddings_of_waiting_prompts_stay_within_the_budget(path, llm, monkeypatch):
    """Each image has nine rows, and each step computes about one prompt."""
    prompts = [about(tiny.picture(24, 24, seed)) for seed in range(24)]
    small = LLM(str(path), max_model_len=64, max_encoder_tokens=40, max_num_batched_tokens=16)
    scheduler, held = small._engine.core.scheduler, []
    step = small._engine.core.step

    def noted(more=0):
        held.append(scheduler.ledger.num_held)
        return step(more)

    monkeypatch.setattr(small._engine.core, "step", noted)
    assert generated(small, prompts) == generated(llm, prompts)
    assert 9 < max(held) <= 40
    # What doesn't fit at all is refused; what only fits alone is not.
    assert generated(small, [about([tiny.picture(48, 48)])] * 2)
    with pytest.raises(InvalidRequest, match="45 visual tokens, but max_encoder_tokens is 40"):
        generated(small, [prompts[0], about(tiny.picture(72, 40))])


def test_images_of_earlier_prompts_are_not_encoded_again(path, monkeypatch):
    """A growing conversation, alone and in a batch; a prompt of another tenant."""
    pictures = [tiny.picture(60, 44, number) for number in range(3)]
    model, encoded = LLM(str(path), max_model_len=256), []
    encode = model._encoder._encoder.encode

    def counted(media):
        encoded.append(len(media))
        return encode(media)

    monkeypatch.setattr(model._encoder._encoder, "encode", counted)

    def prompt(images, salt=""):
        data = {"image": [pictures[index] for index in images]}
        return {"prompt": IMAGE * len(images) + "which", "multi_modal_data": data, "cache_salt": salt}

    def answer(*prompts):
        encoded.clear()
        return [output.outputs[0] for output in model.generate(list(prompts), GREEDY, use_tqdm=False)]

    alone = [answer(prompt(images, "alone"))[0] for images in ([0], [0, 1], [2, 0])]
    assert answer(prompt([0]))[0].token_ids == alone[0].token_ids and sum(encoded) == 1
    assert answer(prompt([0, 1]))[0].token_ids == alone[1].token_ids and sum(encoded) == 1
    # In one batch: two of the three are known, and an image that two prompts show is encoded once.
    batch = answer(prompt([2, 0]), prompt([0, 1]), prompt([2, 0]))
    assert [each.token_ids for each in batch] == [alone[index].token_ids for index in (2, 1, 2)]
    assert sum(encoded) == 1
    assert answer(prompt([0, 1], "another"))[0].token_ids == alone[1].token_ids and sum(encoded) == 2
    for one, other in zip(answer(prompt([2, 0]))[0].logprobs, alone[2].logprobs, strict=True):
        assert {token: each.logprob for token, each in one.items()} == pytest.approx(
            {token: each.logprob for token, each in other.items()}, abs=1e-4
        )
    model.check_integrity()


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_waits_for_all_captures_of_graphs(monkeypatch, collects):
    """Models in two threads may capture at the same time. The device is made up."""
    for name in ("CUDAGraph", "Stream", "current_stream", "graph_pool_handle", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    begun, goes_on, seen = threading.Event(), threading.Event(), []

    def first():
        begun.set()
        goes_on.wait(30)

    def second():
        goes_on.set()
        thread.join(30)
        seen.append((thread.is_alive(), gc.isenabled()))

    thread, before = threading.Thread(target=CudaCapture("cuda"), args=(first,)), gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        thread.start()
        assert begun.wait(30)
        CudaCapture("cuda")(second)
        assert seen == [(False, False)] * 2
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


def test_the_collector_looks_at_what_a_call_makes_only(thawed, llm, monkeypatch):
    frozen = []
    # Other calls have seen frozen objects.
    monkeypatch.setattr(offline, "COLLECTOR", Collector())
    step = llm._engine.core.step
    monkeypatch.setattr(llm._engine.core, "step", lambda: frozen.append(gc.get_freeze_count()) or step())
    generated(llm, "what?")
    assert min(frozen) > 1000 and gc.get_freeze_count() == 0
    # A call in another thread, of another model, may begin in the midst of one and end after it.
    for _ in range(2):
        other = offline.COLLECTOR.young_garbage_only()
        with offline.COLLECTOR.young_garbage_only():
            other.__enter__()
        assert gc.get_freeze_count() > 1000
        other.__exit__(None, None, None)
        assert gc.get_freeze_count() == 0
    # What was frozen before stays so, and is counted once: that takes as long as a traversal.
    gc.freeze()
    counted = []
    monkeypatch.setattr(llm._engine.core, "step", step)
    with monkeypatch.context() as patch:
        count = gc.get_freeze_count
        patch.setattr(gc, "get_freeze_count", lambda: counted.append(count()) or counted[-1])
        generated(llm, "what?")
        generated(llm, "what?")
    assert gc.get_freeze_count() > 1000 and len(counted) == 1


def test_a_lone_prompt_s_media_are_encoded_before_they_are_named(path, llm):
    front = Frontend.load(EngineConfig(model=str(path)))
    image, video = tiny.picture(24, 24, 1), [tiny.picture(24, 24, 2)] * 2
    placeholder = IMAGE.replace("image", "video")
    prompt = {
        "prompt": f"{placeholder}{IMAGE}{IMAGE}",
        "multi_modal_data": {"image": [image] * 2, "video": video},
    }
    begun, encoded = [], []

    class Noting:
        def begin(self, media):
            assert not encoded
            begun.append(media)

        def finish(self, media, inputs, name):
            encoded.extend(media)
            assert inputs.token_ids and [span.item for span in inputs.spans] == [one.item for one in media]
            return [len(media) * 10 + index for index in range(len(media))], [name(one) for one in media]

    ahead, apart = front.from_prompt(prompt, Noting()), front.from_prompt(prompt)
    assert [media.item.hash for media in encoded] == ["", "", ""]
    # The prompt shows the video first; the sources name images first.
    assert len(begun) == 1 and begun[0] is encoded[0]
    assert [media.item.kind for media in encoded] == ["video", "image", "image"]
    assert ahead.inputs == apart.inputs and not ahead.media
    assert ahead.embeddings == [30, 31, 32]
    assert [media.item for media in apart.media] == [span.item for span in apart.inputs.spans]
    assert generated(llm, prompt)[0] == generated(llm, [prompt, prompt])[1]


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        (f"{IMAGE}{IMAGE} what?", {}, "placeholders"),
        (f"{IMAGE} " + "what " * 300, {}, "maximum context length"),
        (f"{IMAGE} what?", {"max_tokens": 10_000}, "max_tokens"),
        (f"{IMAGE} what?", {"allowed_token_ids": [10**6]}, "vocabulary"),
        (f"{IMAGE} what?", {"structured": StructuredSpec(kind="regex", text="(")}, "."),
    ],
)
@pytest.mark.parametrize(("count", "early_rows", "encoded"), [(1, 1024, 2), (1, 0, 0), (2, 1024, 0)])
def test_what_cannot_be_served_costs_at_most_an_early_small_image(
    llm, prompt, params, words, count, early_rows, encoded, monkeypatch
):
    """A prompt that is refused is refused before its images are encoded, alone or as one of several. The last
    image of a lone one is encoded meanwhile, if it is small."""
    monkeypatch.setattr(offline, "_EARLY_ROWS", early_rows)
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 4, **params})
    before = llm._encoder.metrics()["items"]
    with pytest.raises(InvalidRequest, match=words):
        llm.generate([about(tiny.picture(24, 24), prompt)] * count, params, use_tqdm=False)
    with pytest.raises(InvalidRequest, match="embed"):
        llm.embed([about(tiny.picture(24, 24))] * count, use_tqdm=False)
    assert llm._encoder.metrics()["items"] - before == encoded
    llm.check_integrity()


def test_pictures_are_turned_as_their_file_says(llm):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    tiny.picture(64, 40, 3).save(buffer, "PNG", exif=exif)
    with Image.open(buffer) as opened:
        turned = opened.transpose(Image.Transpose.ROTATE_270)
        upright, copied, lying = generated(llm, [about(opened), about(turned), about(opened.copy())])
    assert upright == copied != lying
    (by_bytes,) = generated(llm, about(buffer.getvalue()))
    assert by_bytes == upright


def test_pictures_that_cannot_be_read(llm, files):
    data = (files / "a.png").read_bytes()
    cut = Image.open(io.BytesIO(data[: len(data) // 2]))
    closed = Image.open(io.BytesIO(data))
    closed.close()
    for picture in (
        cut,
        closed,
        Image.new("I", (9, 9), -1),
        Image.new("RGB", (0, 9)),
        Image.new("L", (9, 0)),
    ):
        with pytest.raises(MediaError) as caught:
            generated(llm, [about(tiny.picture(24, 24)), about(picture)])
        assert caught.value.param == "multi_modal_data.image[0]"
        with pytest.raises(MediaError) as caught:
            llm.chat([{"role": "user", "content": [{"type": "image", "image": picture}]}], use_tqdm=False)
        assert caught.value.param == "messages[0].content[0].image"
        llm.check_integrity()


def test_pictures_of_messages_by_url(path, llm, files, site):
    def chatted(llm: LLM, messages) -> list[list[int]]:
        try:
            outputs = llm.chat(messages, GREEDY, use_tqdm=False)
        finally:
            llm.check_integrity()
            assert "media-fetch" not in {thread.name for thread in threading.enumerate()}
        return [output.outputs[0].token_ids for output in outputs]

    picture = Image.open(files / "a.png")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]
    wanted = chatted(llm, [{"role": "user", "content": parts}])
    inline = "data:image/png;base64," + base64.b64encode((files / "a.png").read_bytes()).decode()
    assert chatted(llm, asked(inline)) == wanted
    for url in (f"{site}/a.png", f"file://{files}/a.png"):
        with pytest.raises(MediaForbidden) as caught:
            chatted(llm, asked(url))
        assert caught.value.param == "messages[0].content[0].image_url.url"
    allowed = LLM(
        str(path),
        max_model_len=256,
        allowed_local_media_path=str(files),
        fetch={"allow_private": ["127.0.0.0/8"], "allowed_ports": [int(site.rpartition(":")[2])]},
    )
    urls = [f"{site}/a.png", f"file://{files}/a.png", inline]
    assert chatted(allowed, [asked(url) for url in urls]) == wanted * 3
    with pytest.raises(MediaError, match="404"):
        chatted(allowed, asked(f"{site}/missing.png"))
    with pytest.raises(MediaForbidden, match="outside"):
        chatted(allowed, asked(f"file://{path}/config.json"))


def test_chat_templates_come_from_where_they_are_given(tmp_path):
    model = tiny.make_text(tmp_path / "model", "llama")
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    messages = [{"role": "user", "content": "hello"}]

    def prompt(llm: LLM, **options) -> str:
        (output,) = llm.chat(messages, SamplingParams(max_tokens=1), use_tqdm=False, **options)
        return output.prompt

    without = LLM(str(model), max_model_len=64)
    with pytest.raises(InvalidRequest, match=r"no chat template\. Set chat_template"):
        prompt(without)
    assert prompt(without, chat_template=str(file)) == "[user]hello"
    assert prompt(without, chat_template="{{ messages[0].content }}!") == "hello!"
    assert prompt(LLM(str(model), max_model_len=64, chat_template=str(file))) == "[user]hello"
    (model / "chat_template.jinja").write_text("own: {{ messages[0].content }}")
    assert prompt(LLM(str(model), max_model_len=64)) == "own: hello"
    assert prompt(LLM(str(model), max_model_len=64, chat_template=str(file))) == "[user]hello"


def test_the_progress_bar_tells_rates(llm, capsys):
    llm.generate([about(tiny.picture(24, 24)), "hello"], GREEDY)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "images/s" in shown and "tokens/s" in shown
    llm.generate("hello", GREEDY)
    shown = capsys.readouterr().err
    assert "images/s" not in shown and "tokens/s" in shown
    llm.generate("hello", GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_names_of_the_hub(path, tmp_path):
    """A model comes from a cache as downloads fill it; a tokenizer from a place without a model."""
    commit = "0" * 40
    cached = tmp_path / "hub" / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / commit).symlink_to(path)
    alone = tmp_path / "tokenizer"
    alone.mkdir()
    for file in path.glob("*token*"):
        (alone / file.name).write_bytes(file.read_bytes())
    code = f"""
from engine import LLM, SamplingParams
from engine.errors import CheckpointError
greedy = SamplingParams(temperature=0, max_tokens=4)
for options in ({{}}, {{"tokenizer": "owner/name"}}, {{"tokenizer": {str(alone)!r}}}):
    llm = LLM("owner/name", max_model_len=64, **options)
    print(llm.generate("hello", greedy, use_tqdm=False)[0].outputs[0].token_ids)
try:
    LLM("owner/other")
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    *answers, refusal = done.stdout.splitlines()
    params = SamplingParams(temperature=0, max_tokens=4)
    (wanted,) = LLM(str(path), max_model_len=64).generate("hello", params, use_tqdm=False)
    assert answers == [str(wanted.outputs[0].token_ids)] * 3
    assert "no folder 'owner/other'" in refusal


def test_a_document_is_its_pages(llm):
    data = pdf([page("one", (1, 0, 0), (70, 70)), page("two", (0, 0, 1), (80, 64)), page("three")])
    with pypdfium2.PdfDocument(data) as document:
        pages = [document[number].render(scale=1).to_pil().convert("RGB") for number in (1, 0)]
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])

    def chat(*parts) -> list:
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]
        (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
        llm.check_integrity()
        return [output.prompt_token_ids, output.outputs[0].token_ids]

    expected = chat(*({"type": "image", "image": image} for image in pages))
    asked = {"pages": "2,1", "dpi": 72}
    assert chat({"type": "document", "document": data, **asked}) == expected
    address = "data:application/pdf;base64," + base64.b64encode(data).decode()
    assert chat({"type": "file", "file": {"file_data": address, **asked}}) == expected
    assert chat({"type": "image", "image": file.getvalue(), "pages": "all"}) == expected
    assert chat({"type": "image", "image": file.getvalue()}) == chat({"type": "image", "image": pages[0]})
    texts = ({"type": "image", "image": pages[0]}, "two", {"type": "image", "image": pages[1]}, "one")
    assert chat({"type": "document", "document": data, "text": True, **asked}) == chat(*texts)
    with pytest.raises(MediaTooLarge, match="3 images, pages included, but limit_mm_per_prompt allows 2"):
        chat({"type": "document", "document": data})
    with pytest.raises(InvalidRequest, match="not for PIL images") as error:
        chat({"type": "image", "image": pages[0], "pages": "1"})
    assert error.value.param == "messages[0].content[0].pages"
