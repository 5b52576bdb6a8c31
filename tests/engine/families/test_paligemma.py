"""Prompts of PaliGemma: their form, and what is refused."""

from __future__ import annotations

import pytest
import transformers

from engine import LLM
from engine.config import EngineConfig
from engine.errors import CheckpointError, InvalidRequest
from engine.inputs.messages import parse_messages
from engine.model_parts import load_prompt_builder
from tests.engine.families.opened import media_processor
from tests.engine.families.paligemma import ROWS, SIDE, make_paligemma, paligemma_tokenizer
from tests.engine.tiny import picture, rewrite_json


@pytest.mark.parametrize("images", [1, 2])
def test_a_chat_is_the_prompt_of_transformers(tmp_path, images):
    path = make_paligemma(tmp_path, False)
    shown = [picture(40, 30, seed) for seed in range(images)]
    processor = transformers.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor.image_seq_length = ROWS
    theirs = transformers.PaliGemmaProcessor(processor, paligemma_tokenizer())
    # It asks the tokenizer for no ``<bos>``, which a tokenizer of its own class heeds.
    theirs.tokenizer.backend_tokenizer.post_processor = None
    expected = theirs(images=[shown], text=["<image>" * images + "caption en"])["input_ids"][0]
    content = [{"type": "text", "text": "caption en"}, *({"type": "image", "image": each} for each in shown)]
    parsed, sources = parse_messages([{"role": "user", "content": content}])
    ours = media_processor(path)
    items = [ours.prepare(source.image).item for source in sources]
    builder = load_prompt_builder(EngineConfig(model=str(path)))
    assert builder.from_messages(parsed, items).token_ids == expected
    parsed, _ = parse_messages([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(InvalidRequest, match="one message of a user"):
        builder.from_messages(parsed, [])


def test_a_prompt_beyond_the_window_is_refused(tmp_path):
    path = make_paligemma(tmp_path, False, "gemma2")
    llm = LLM(str(path), enforce_eager=True)
    for length, fits in ((192, True), (193, False)):
        prompt = {"prompt_token_ids": [5] * length}
        if fits:
            llm.generate([prompt], use_tqdm=False)
        else:
            with pytest.raises(InvalidRequest, match="193 tokens, which is longer than its window of 192"):
                llm.generate([prompt], use_tqdm=False)
    llm.check_integrity()


def test_another_number_of_rows_is_refused(tmp_path):
    path = make_paligemma(tmp_path, False)
    rewrite_json(path / "preprocessor_config.json", {"image_seq_length": 4})
    with pytest.raises(CheckpointError, match="image_seq_length 4 differs from the model's 9 rows"):
        media_processor(path)
