"""Every endpoint passes ``cache_salt`` on, with each of its prompts."""

import pytest

from deployments.pipeline import Pipeline
from tests.deployments.pictures import ask, circle

pytestmark = pytest.mark.usefixtures("idle_afterwards")

MESSAGES = ask("What color is the circle?", circle("red"))
IMAGE = {"content": MESSAGES[0]["content"][:1]}
#: Endpoints with the fields of a body, and the number of its prompts.
BODIES = [
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1}, 1),
    ("/v1/completions", {"prompt": ["Hello", "red"], "max_tokens": 1}, 2),
    ("/v1/completions", {"prompt": [[5, 6], [7]], "max_tokens": 1}, 2),
    ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}, 1),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 1}, 1),
    ("/v1/embeddings", {"input": ["a red circle", "hello"]}, 2),
    ("/v1/embeddings", {"input": [[5, 6], [7]]}, 2),
    ("/v1/embeddings", {"messages": MESSAGES}, 1),
    ("/pooling", {"input": "hello"}, 1),
    ("/v1/score", {"text_1": "a red circle", "text_2": ["hello", IMAGE]}, 3),
    ("/v1/rerank", {"query": "a red circle", "documents": ["hello", IMAGE]}, 3),
]
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")


def noted_salts(monkeypatch) -> list[tuple[str, str]]:
    """The salts of all prompts from now on: for their media, and of the prompt itself."""
    found, prepare = [], Pipeline.prepare

    async def noted(self, *args, salt="", **options):
        prompt = await prepare(self, *args, salt=salt, **options)
        found.append((salt, prompt.inputs.cache_salt))
        return prompt

    monkeypatch.setattr(Pipeline, "prepare", noted)
    return found


@pytest.mark.parametrize(("path", "fields", "prompts"), BODIES)
async def test_a_salt_goes_with_every_prompt_and_its_media(http, monkeypatch, path, fields, prompts):
    found = noted_salts(monkeypatch)
    model = "pocket" if path in GENERATING else "tests/vectors"
    answer = await http.post(path, json={"model": model, "cache_salt": "tenant", **fields})
    assert answer.status_code == 200, answer.text
    assert found == [("tenant", "tenant")] * prompts
