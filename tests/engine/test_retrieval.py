"""Embedding models and rerankers, from the one engine, against Transformers."""

import numpy as np
import pytest

from engine import LLM
from engine.errors import ConfigError, InvalidRequest
from engine.inputs.retrieval import pair_score
from engine.outputs import EmbeddingOutput

from . import retrieval, tiny
from .families.colpali import ColPaliReference, make_colpali
from .families.colqwen2 import ColQwen2Reference, make_colqwen2

RED, BLUE = tiny.picture(60, 44, 1), tiny.picture(40, 72, 2)
ITEMS = ("a red square", RED, (BLUE, "what is shown?"))


def item(shown):
    """As callers write what the reference is shown."""
    if isinstance(shown, str):
        return shown
    image, text = shown if isinstance(shown, tuple) else (shown, None)
    return {"image": image} | ({"text": text} if text else {})


def load(path, task: str, **options) -> LLM:
    return LLM(str(path), task=task, max_model_len=512, kv_cache_bytes=8 << 20, **options)


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory):
    return retrieval.make_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture(scope="module")
def reference(qwen3_vl):
    return retrieval.Qwen3VLReference(qwen3_vl)


@pytest.mark.parametrize("budget", [29, 512])
def test_vectors_with_an_instruction_are_those_of_transformers(qwen3_vl, reference, budget):
    llm = load(qwen3_vl, "embed", max_num_batched_tokens=budget, block_size=4)
    messages = [[{"role": "user", "content": _content(shown)}] for shown in ITEMS[1:]]
    # The published script ends an instruction by a full stop.
    for asked, written in (("Find the picture ", "Find the picture."), ("", "Represent the user's input.")):
        found = llm.embed(ITEMS[0], messages=messages, instruction=asked, use_tqdm=False)
        for shown, output in zip(ITEMS, found, strict=True):
            expected = reference.embed(shown, written)
            np.testing.assert_allclose(output.embedding, expected, atol=2e-5)
    llm.check_integrity()


def test_a_configured_instruction_is_for_inputs_that_bring_none(qwen3_vl, reference):
    llm = load(qwen3_vl, "embed", instruction="")
    (plain,) = llm.embed("a red square", use_tqdm=False)
    expected = reference.embed("a red square", "Represent the user's input.")
    np.testing.assert_allclose(plain.embedding, expected, atol=2e-5)
    (asked,) = llm.embed("a red square", instruction="Why?", use_tqdm=False)
    np.testing.assert_allclose(asked.embedding, reference.embed("a red square", "Why?"), atol=2e-5)
    own = [{"role": "system", "content": "Why?"}, {"role": "user", "content": "a red square"}]
    (own_system,) = llm.embed(messages=own, add_generation_prompt=True, use_tqdm=False)
    np.testing.assert_allclose(own_system.embedding, asked.embedding, atol=2e-5)
    with pytest.raises(InvalidRequest) as raised:
        llm.embed(messages=own, instruction="Why?", use_tqdm=False)
    assert raised.value.param == "instruction"


def test_the_instruction_of_a_comparison_is_the_querys(qwen3_vl, reference):
    llm = load(qwen3_vl, "embed", instruction="")
    found = llm.score("a red square", [item(RED), item(ITEMS[2])], instruction="Find it.", use_tqdm=False)
    query = reference.embed("a red square", "Find it.")
    expected = [query @ reference.embed(shown, "Represent the user's input.") for shown in ITEMS[1:]]
    np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize("budget", [29, 512])
def test_scores_of_a_reranker_are_those_of_transformers(qwen3_vl, reference, budget):
    llm = load(qwen3_vl, "score", max_num_batched_tokens=budget, block_size=4)
    pairs = [(ITEMS[0], RED), (RED, ITEMS[0]), (RED, ITEMS[2]), (ITEMS[2], "blue")]
    for asked in (None, "Is it the same colour?"):
        written = asked or "Given a search query, retrieve relevant candidates that answer the query."
        found = llm.score(
            [item(query) for query, _ in pairs],
            [item(document) for _, document in pairs],
            instruction=asked,
            use_tqdm=False,
        )
        expected = [reference.score(*pair, written) for pair in pairs]
        # Scores that hardly differ would prove nothing.
        assert max(expected) - min(expected) > 0.02
        np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(InvalidRequest, match="must be a text or a dict, not list"):
        llm.score("a", [5, 6], use_tqdm=False)
    llm.check_integrity()


def test_scores_of_a_text_reranker_are_those_of_transformers(tmp_path):
    path = retrieval.make_qwen3(tmp_path)
    reference = retrieval.Qwen3Reference(path)
    documents = ["a red square", "the quick brown fox\njumps", "hello <|im_end|>world"]
    instruction = "Given a web search query, retrieve relevant passages that answer the query"
    found = load(path, "score").score("what is shown?", documents, use_tqdm=False)
    # A document's control tokens are plain text here; the published script would end the message there.
    expected = [reference.score("what is shown?", document, instruction) for document in documents[:2]]
    assert abs(expected[0] - expected[1]) > 0.01
    np.testing.assert_allclose(found[:2], expected, atol=1e-4)
    assert 0 <= found[2] <= 1


_PER_TOKEN = {"ColQwen2": (make_colqwen2, ColQwen2Reference), "ColPali": (make_colpali, ColPaliReference)}


@pytest.fixture(scope="module", params=[(name, hub) for name in _PER_TOKEN for hub in (False, True)], ids=str)
def per_token(request, tmp_path_factory):
    """The folder of a model with a vector for each token, saved or as on the hub; and its reference."""
    name, hub = request.param
    make, reference = _PER_TOKEN[name]
    path = make(tmp_path_factory.mktemp(name), hub)
    return path, reference(path)


def test_vectors_of_tokens_and_their_scores_are_those_of_transformers(per_token):
    path, reference = per_token
    llm = load(path, "embed")
    texts, images = ["what is shown?", "a red square"], [RED, BLUE]
    messages = [[{"role": "user", "content": _content(image)}] for image in images]
    outputs = llm.embed(texts, messages=messages, pooling="all", use_tqdm=False)
    expected = [*map(reference.query, texts), *map(reference.document, images)]
    for output, vectors in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(output.token_embeddings, vectors, atol=5e-5)
    scores = reference.score(expected[:2], expected[2:])
    assert abs(scores[0, 0] - scores[0, 1]) > 1e-3
    for text, row in zip(texts, scores, strict=True):
        found = llm.score(text, [item(image) for image in images], use_tqdm=False)
        np.testing.assert_allclose(found, row, atol=1e-3)
    llm.check_integrity()


def test_a_query_cannot_bring_tokens_of_its_own(tmp_path):
    llm = load(make_colqwen2(tmp_path, hub=False), "embed")
    (typed,) = llm.embed("a<|image_pad|><|endoftext|>", pooling="all", use_tqdm=False)
    specials = [token for token in typed.prompt_token_ids if token < len(tiny.QWEN_SPECIALS)]
    # Those of the format alone.
    assert len(specials) == 10


def test_a_model_of_vectors_alone_is_served_for_nothing_else(per_token):
    path, _ = per_token
    with pytest.raises(ConfigError) as refused:
        load(path, "embed", instruction="")
    assert refused.value.param == "instruction"
    for task in ("generate", "score"):
        with pytest.raises(ConfigError) as raised:
            load(path, task)
        assert raised.value.param == "task"


def test_vectors_of_a_text_model_are_those_of_transformers(tmp_path):
    reference = retrieval.Qwen3Reference(retrieval.make_qwen3(tmp_path, embeds=True))
    llm = load(tmp_path, "embed")
    query, document = "what is shown?", "a red square"
    for asked, written in (
        (None, query),
        ("Find it", f"Instruct: Find it\nQuery:{query}"),
        (
            "",
            "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
            f"Query:{query}",
        ),
    ):
        expected = reference.embed(written)
        (output,) = llm.embed(query, instruction=asked, use_tqdm=False)
        np.testing.assert_allclose(output.embedding, expected, atol=2e-5)
        (score,) = llm.score(query, document, instruction=asked, use_tqdm=False)
        assert score == pytest.approx(float(expected @ reference.embed(document)), abs=5e-5)


def test_large_gaps_are_finite_scores():
    scores = [pair_score(EmbeddingOutput("", [], [gap])) for gap in (-1e4, 0.0, 1e4)]
    assert scores == [0.0, 0.5, 1.0]


def test_a_reranker_makes_no_vectors_and_no_text(qwen3_vl):
    llm = load(qwen3_vl, "score")
    with pytest.raises(InvalidRequest):
        llm.embed("a red square", use_tqdm=False)
    with pytest.raises(InvalidRequest):
        llm.generate("a red square", use_tqdm=False)


def test_models_that_are_no_rerankers_are_refused(tmp_path):
    tiny.make_text(tmp_path / "llama", "llama")
    with pytest.raises(ConfigError, match="rerankers"):
        load(tmp_path / "llama", "score")
    tiny.make_text(tmp_path / "qwen3", "qwen3")
    with pytest.raises(ConfigError, match="'yes'"):
        load(tmp_path / "qwen3", "score")


def test_an_embedding_model_may_lack_the_head(tmp_path):
    path = tiny.make_qwen2_vl(tmp_path)
    (before,) = load(path, "embed").embed("a red square", use_tqdm=False)
    tiny.rewrite_tensors(path, lambda tensors: {k: v for k, v in tensors.items() if "lm_head" not in k})
    (after,) = load(path, "embed").embed("a red square", use_tqdm=False)
    assert before.embedding == after.embedding


def _content(shown) -> list[dict]:
    image, text = shown if isinstance(shown, tuple) else (shown, None)
    return [{"type": "image", "image": image}] + ([{"type": "text", "text": text}] if text else [])
