"""lm-evaluation-harness."""

import os
from pathlib import Path

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("lm_eval[api]==0.4.13", "transformers==5.23.0")

os.environ["HF_HUB_OFFLINE"] = "1"
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402

TOKENIZER = Path(__file__).parents[2] / "models" / cases.MODEL
# White space at its end would be counted to what follows.
PROMPT = f"<|im_start|>user\n{cases.QUESTION}<|im_end|>\n<|im_start|>assistant\nA red circle on"


@pytest.fixture(scope="module")
def model(base_url):
    return LocalCompletionsAPI(
        model=cases.MODEL,
        base_url=f"{base_url}/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(TOKENIZER),
    )


def asked(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_completions(model):
    """The likelihood of an answer is that with which the model has made it. It reads those of the tokens
    between a context and the one token that is made behind an answer, which here is the end."""
    (answer,) = model.generate_until([asked("generate_until", PROMPT, {"until": [], "max_gen_toks": 40})])
    assert answer.endswith("background.")
    options = {"max_gen_toks": 40, "logprobs": 0}
    (made,) = model.model_call([PROMPT], generate=True, gen_kwargs=options)["choices"]
    assert (made["text"], made["finish_reason"]) == (answer, "stop")
    (likelihood, greedy), (other, other_greedy) = model.loglikelihood(
        [asked("loglikelihood", PROMPT, text) for text in (answer, answer + "!")]
    )
    # Without the end, which the answer given has not.
    assert likelihood == pytest.approx(sum(made["logprobs"]["token_logprobs"][:-1]), abs=1e-3)
    assert greedy and not other_greedy and other < likelihood - 1
