"""A start says in the log where its time went."""

import re

from engine import LLM
from engine.startup import StartTimes
from tests.engine import tiny


def test_phases_are_added_up_in_order():
    now = [5.0]
    times = StartTimes(lambda: now[0])
    for name, seconds in (("weights", 2.0), ("graphs", 1.5), ("weights", 0.25)):
        with times.phase(name):
            now[0] += seconds
        now[0] += 1.0
    assert str(times) == "6.8 s (weights 2.2, graphs 1.5)"


def test_engine_and_encoder_log_their_phases(tmp_path, caplog):
    path = tiny.make_qwen2_vl(tmp_path)
    with caplog.at_level("INFO", "engine"):
        LLM(str(path), max_model_len=64)
    lines = [record.getMessage() for record in caplog.records]
    seconds = r"\d+\.\d"
    phases = ("device", "weights", "KV cache", "kernels", "rest of the tokenizer")
    wanted = ", ".join(f"{name} {seconds}" for name in phases)
    assert any(re.fullmatch(rf"the engine started in {seconds} s \({wanted}\)", line) for line in lines)
    wanted = f"device {seconds}, weights {seconds}"
    assert any(re.fullmatch(rf"the encoder started in {seconds} s \({wanted}\)", line) for line in lines)
