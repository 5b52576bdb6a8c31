"""The longest context of public checkpoints with rotary scaling, and of what their cards say to add."""

import pytest

from engine.families.parsing.decoder import parse_decoder

YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("kind", "positions", "rope", "context"),
    [
        # Vicuna-7B-v1.5-16k, and a linear factor that shortens nothing.
        ("llama", 4096, {"type": "linear", "factor": 4.0}, 16384),
        ("llama", 4096, {"type": "linear", "factor": 1.0}, 4096),
        ("llama", 4096, {"type": "dynamic", "factor": 2.5}, 10240),
        # Qwen2.5, Qwen3 and Qwen2.5-VL as their cards say.
        ("qwen2", 32768, {"type": "yarn", **YARN}, 131072),
        ("qwen3", 40960, {"rope_type": "yarn", **YARN}, 131072),
        ("qwen2_vl", 128000, {"type": "yarn", **YARN, "mrope_section": [16, 24, 24]}, 131072),
        # Files that state the length after scaling.
        ("qwen2", 131072, {"type": "yarn", **YARN}, 131072),
        (
            "llama",
            131072,
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4},
            131072,
        ),
        ("phi3", 131072, {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}, 131072),
    ],
)
def test_longest_context(kind, positions, rope, context):
    config = parse_decoder({"max_position_embeddings": positions, "rope_scaling": rope}, kind)
    assert config.max_position == context


def test_a_window_is_compared_with_the_stretched_context():
    raw = {"max_position_embeddings": 4096, "sliding_window": 4096, "num_hidden_layers": 2}
    assert parse_decoder(raw, "mistral").windows == ()
    stretched = {**raw, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert parse_decoder(stretched, "mistral").windows == (4096, 4096)


def test_queries_grow_by_the_stated_context_or_by_the_longest_one():
    growing = {"rope_type": "yarn", "factor": 4.0, "llama_4_scaling_beta": 0.1}
    raw = {"max_position_embeddings": 512, "rope_parameters": growing}
    assert parse_decoder(raw, "ministral3").rope.query_growth == (0.1, 512)
    growing["original_max_position_embeddings"] = 128
    assert parse_decoder(raw, "ministral3").rope.query_growth == (0.1, 128)


def test_a_window_of_null_is_none():
    """Mistral-7B-Instruct-v0.2 and Nemo state null; the default of an absent field is 4096."""
    assert parse_decoder({"sliding_window": None}, "mistral").windows == ()
    assert parse_decoder({}, "mistral").windows == (4096,) * 32
