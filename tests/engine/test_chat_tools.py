"""Tools in offline conversations."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine import LLM, SamplingParams
from engine.errors import InvalidRequest
from models.calls import function

FOLDER = Path(__file__).parents[2] / "models" / "pocket-tools"
ADD = function("add", {"a": "integer", "b": "integer"})
STOP = function("stop", {})


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(FOLDER), max_model_len=512)


def test_prompts_are_those_of_transformers_and_the_model_calls(llm):
    messages = [{"role": "user", "content": "Add 3 and 4."}]
    params = SamplingParams(temperature=0, max_tokens=48, skip_special_tokens=False)
    outputs = llm.chat([messages, messages], params, tools=[STOP, ADD], use_tqdm=False)
    reference = AutoTokenizer.from_pretrained(FOLDER)
    wanted = reference.apply_chat_template(
        messages, tools=[STOP, ADD], tokenize=False, add_generation_prompt=True
    )
    without = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert [output.prompt for output in outputs] == [wanted, wanted] and wanted != without
    _, _, call = outputs[0].outputs[0].text.partition("<tool_call>")
    assert json.loads(call.partition("</tool_call>")[0])["name"] == "add"


def test_a_call_and_its_result_in_the_history(llm):
    call = {"id": "call_0", "type": "function", "function": {"name": "add", "arguments": '{"a": 3, "b": 4}'}}
    messages = [
        {"role": "user", "content": "Add 3 and 4."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": "7"},
    ]
    (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=24), tools=[ADD], use_tqdm=False)
    assert "7" in output.outputs[0].text


def test_a_message_is_continued(llm):
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "The result"}]
    params = SamplingParams(max_tokens=1)
    (output,) = llm.chat(messages, params, continue_final_message=True, use_tqdm=False)
    assert output.prompt.endswith("The result")


@pytest.mark.parametrize("tool", ["add", {"type": "function"}, {"type": "function", "function": {}}])
def test_a_tool_that_is_no_function_is_refused(llm, tool):
    with pytest.raises(InvalidRequest) as caught:
        llm.chat([{"role": "user", "content": "Hello!"}], tools=[ADD, tool], use_tqdm=False)
    assert caught.value.param == "tools[1]"
