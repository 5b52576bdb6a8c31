"""Tools in offline conversations."""

import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine import LLM, SamplingParams
from engine.errors import InvalidRequest
from models import scenes
from models.calls import function

FOLDER = Path(__file__).parents[2] / "models" / "pocket-tools"
REPORT = function("report", {"color": "string", "shape": "string", "count": "integer"})
STOP = function("stop", {})


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(FOLDER), max_model_len=512)


def test_prompts_are_those_of_transformers(llm):
    """With tools, and with a call and its result in the history."""
    arguments = {"color": "red", "shape": "circle", "count": 3}
    call = {"id": "call_0", "type": "function", "function": {"name": "report", "arguments": arguments}}
    asked = [{"role": "user", "content": "Report the picture."}]
    history = [
        *asked,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": "saved"},
    ]
    reference = AutoTokenizer.from_pretrained(FOLDER)
    params = SamplingParams(temperature=0, max_tokens=1)
    for tools in (None, [STOP, REPORT]):
        outputs = llm.chat([asked, history], params, tools=tools, use_tqdm=False)
        assert [output.prompt for output in outputs] == [
            reference.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
            for messages in (asked, history)
        ]


def test_the_call_is_in_the_text(llm):
    scene = scenes.shapes_scene(random.Random(1), (168, 168), [("red", "circle")])
    parts = [{"type": "image", "image": scene.image}, {"type": "text", "text": "Call report."}]
    params = SamplingParams(temperature=0, max_tokens=64, skip_special_tokens=False)
    (output,) = llm.chat([{"role": "user", "content": parts}], params, tools=[REPORT], use_tqdm=False)
    _, _, call = output.outputs[0].text.partition("<tool_call>")
    # Nothing holds the model to the function's name here.
    assert json.loads(call.partition("</tool_call>")[0]).keys() == {"name", "arguments"}


def test_a_message_is_continued(llm):
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "The result"}]
    params = SamplingParams(max_tokens=1)
    (output,) = llm.chat(messages, params, continue_final_message=True, use_tqdm=False)
    assert output.prompt.endswith("The result")


@pytest.mark.parametrize("tool", ["add", {"type": "function"}, {"type": "function", "function": {}}])
def test_a_tool_that_is_no_function_is_refused(llm, tool):
    with pytest.raises(InvalidRequest) as caught:
        llm.chat([{"role": "user", "content": "Hello!"}], tools=[REPORT, tool], use_tqdm=False)
    assert caught.value.param == "tools[1]"
