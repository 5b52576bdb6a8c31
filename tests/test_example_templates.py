"""The chat templates among the examples, on models of the kind they are for."""

import pytest

from engine import LLM, SamplingParams
from engine.errors import InvalidRequest
from tests.engine.families.phi3_v_reference import make_phi3_v
from tests.engine.tiny import make_llava, picture
from tests.serving import ROOT


def test_vlm2vec(tmp_path):
    make_phi3_v(tmp_path)
    rewritten = LLM(
        str(tmp_path),
        task="embed",
        max_model_len=160,
        chat_template=str(ROOT / "examples" / "template_vlm2vec.jinja"),
    )
    image = picture(44, 44, 1)
    for text in ("Represent the given image.", "Represent the given image with a question."):
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        (by_messages,) = rewritten.embed(messages=[{"role": "user", "content": content}], use_tqdm=False)
        prompt = {"prompt": f"<|image_1|> {text}", "multi_modal_data": {"image": image}}
        (by_prompt,) = rewritten.embed(prompt, use_tqdm=False)
        assert by_messages.prompt_token_ids == by_prompt.prompt_token_ids
        assert by_messages.embedding == pytest.approx(by_prompt.embedding, abs=1e-5)


def test_llava(tmp_path):
    make_llava(tmp_path)
    for name in ("chat_template.jinja", "chat_template.json"):
        (tmp_path / name).unlink(missing_ok=True)
    params = SamplingParams(temperature=0.0, max_tokens=3)
    content = [
        {"type": "image", "image": picture(40, 30)},
        {"type": "text", "text": "What is the content of this image?"},
    ]
    messages = [{"role": "user", "content": content}]
    without = LLM(str(tmp_path), max_model_len=200)
    with pytest.raises(InvalidRequest, match="has no chat template"):
        without.chat(messages, params, use_tqdm=False)
    # Before anything is fetched, which would be forbidden here.
    inside = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}
    with pytest.raises(InvalidRequest, match="has no chat template"):
        without.chat([{"role": "user", "content": [inside]}], params, use_tqdm=False)
    template = str(ROOT / "examples" / "template_llava.jinja")
    (output,) = without.chat(messages, params, use_tqdm=False, chat_template=template)
    assert output.prompt == "USER: <image>\nWhat is the content of this image? ASSISTANT:"
    (same,) = LLM(str(tmp_path), max_model_len=200, chat_template=template).chat(
        messages, params, use_tqdm=False
    )
    assert same.outputs[0].token_ids == output.outputs[0].token_ids
