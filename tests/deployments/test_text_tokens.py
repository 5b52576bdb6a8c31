"""Log-probabilities of a response beside thoughts and calls: one result, however an answer is cut."""

from itertools import combinations, pairwise

import pytest

from deployments.answers import AnswerReader
from deployments.responses import ResponseBuilder
from deployments.resumption import EvenCuts
from deployments.text_tokens import TextTokens, TokenByToken
from deployments.tools import read_tools
from engine.outputs import OutputDelta, TokenLogprob, Usage
from tests.deployments.test_tools import HERMES, TOOLS, Spelled

CALL = ["<tool_call>", '\n{"name": "report", "arg', 'uments": {"color": "red"}}', "\n</tool_call>"]


@pytest.mark.parametrize("evenly", [False, True])
@pytest.mark.parametrize(
    ("tokens", "texts"),
    [
        (["Look", ": ", "\n", *CALL], [["Look", ": "]]),
        ([*CALL, "Hi", " you"], [["Hi", " you"]]),
        (["Oh", *CALL, "\nHi", " <", "b"], [["Oh"], ["\nHi", " <", "b"]]),
        (["<think>", "hm", "</think>", "\n\n", "Look", *CALL], [["\n\n", "Look"]]),
        (["<think>", "hm</think>\nLook", " here"], [[" here"]]),
        ([*CALL[:2], f"{CALL[2]}{CALL[3]}Hi", " you"], [[f"{CALL[2]}{CALL[3]}Hi", " you"]]),
        (["<thi", "nk>", "</think>", "Look"], [["Look"]]),
        (["a ", "<", "tool", ">", " b"], [["a ", "<", "tool", ">", " b"]]),
    ],
)
def test_tokens_of_a_text_are_the_same_however_an_answer_is_cut(tokens, texts, evenly):
    rows = [{number: TokenLogprob(-1.0, 1, text, text.encode())} for number, text in enumerate(tokens)]
    use = read_tools(TOOLS, None, None)

    def found(bounds: list[int]) -> list[list[str]]:
        reader = AnswerReader(lambda: HERMES.parser(use, ""), Spelled(dict(enumerate(tokens))))
        builder = ResponseBuilder({"id": "r", "output": [], "tools": [], "usage": None})
        single, of_text, cuts = TokenByToken(), TextTokens(), EvenCuts()
        for start, end in pairwise(bounds):
            ids, reason = list(range(start, end)), "stop" if end == len(tokens) else None
            delta = OutputDelta(0, "".join(tokens[start:end]), ids, rows[start:end], finish_reason=reason)
            for piece in single.cut(delta):
                read = reader.read(piece)
                here = [rows[token][token].decoded_token for token, _ in of_text.add(read)]
                list(builder.add(cuts.cut(read) if evenly else read, here))
        list(builder.finish(read.finish_reason, Usage(), 0))
        return [
            item["content"][0]["logprobs"] for item in builder.response["output"] if item["type"] == "message"
        ]

    inner = range(1, len(tokens))
    for size in range(len(tokens)):
        for cuts in combinations(inner, size):
            assert found([0, *cuts, len(tokens)]) == texts, cuts


def test_text_that_comes_before_its_token_waits_for_it():
    single = TokenByToken()
    rows = [
        {number: TokenLogprob(-1.0, 1, text, text.encode())} for number, text in enumerate(["ab", "cd", "!"])
    ]
    first = list(single.cut(OutputDelta(0, "abc", [0], rows[:1])))
    last = list(single.cut(OutputDelta(0, "d!", [1, 2], rows[1:], finish_reason="stop")))
    assert [(each.text, each.token_ids, each.finish_reason) for each in first + last] == [
        ("ab", [0], None),
        ("cd", [1], None),
        ("!", [2], "stop"),
    ]
