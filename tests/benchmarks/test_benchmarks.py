"""The benchmarks run, on shapes small enough for a CPU, and what they print has sense."""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as all_of_them
from benchmarks import (
    autoscaling_sim,
    conversation,
    host,
    load,
    media_memory,
    memory,
    offline,
    preparation,
    serve,
    slow_hosts,
    start,
    steps,
)
from benchmarks.clients import Trace
from benchmarks.floors import StepBytes
from benchmarks.processes import process_name
from benchmarks.shapes import write_checkpoint
from engine.checkpoint.folder import Checkpoint
from engine.families.load import load_language_model
from engine.families.registry import resolve


def test_host(monkeypatch, capsys, tmp_path):
    file = tmp_path / "host.json"
    monkeypatch.setattr(sys, "argv", ["host", "--requests", "2,5", "--steps", "120", "--json", str(file)])
    host.main()
    rows = json.loads(file.read_text())
    assert [row["requests"] for row in rows] == [2, 5]
    assert all(0 < row["step us"] < 1e6 and row["text us"] > 0 for row in rows)


def test_offline(monkeypatch, capsys, tmp_path):
    file = tmp_path / "offline.json"
    arguments = ["--shape", "tiny", "--scale", "64", "--works", "w1,w2,w3,w4,w5", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["offline", *arguments])
    offline.main()
    found = json.loads(file.read_text())
    works = ["w1 req/s", "w2 out tok/s", "w3 first ms", "w4 tok/s", "w5 req/s", "first answer s"]
    assert all(found[name] > 0 for name in works)
    # Differences of two times, which a busy machine may make negative.
    assert math.isfinite(found["w3 ms/tok"]) and math.isfinite(found["w4 tok/s"])
    assert found["floor w3 ms/tok"] > 0 and found["floor w4 tok/s"] > 0


def test_offline_readings_are_of_the_format_that_they_name(tmp_path):
    def loaded(quantization):
        path = write_checkpoint("tiny", tmp_path / str(quantization))
        if quantization == "int4":
            offline.quantise_to_int4(path, 32)
        checkpoint = Checkpoint.open(str(path))
        config = resolve(checkpoint).parse(checkpoint)
        options = {"device": torch.device("cpu"), "dtype": torch.float32, "load_format": "dummy"}
        rounded = "fp8" if quantization == "fp8" else None
        return load_language_model(checkpoint, config, **options, quantization=rounded)

    decoders = {kind: loaded(kind) for kind in (None, "fp8", "int4")}
    for kind, decoder in decoders.items():
        offline.check_formats(decoder, kind)
        for other in decoders.keys() - {kind}:
            with pytest.raises(SystemExit, match=r"not in .*layers\.0\.self_attn\.qkv_proj"):
                offline.check_formats(decoder, other)
    # A number takes half a byte, a group's scale two bytes and its zero point half a byte.
    plain, packed = (StepBytes.of(tmp_path / kind).weights for kind in ("None", "int4"))
    matrices = sum(layer.weight.numel() for layer in decoders[None].modules() if hasattr(layer, "packed"))
    assert plain - packed == matrices * (2 - 0.5 - 2.5 / 32)


def test_conversation(monkeypatch, capsys, tmp_path):
    file = tmp_path / "conversation.json"
    arguments = ["conversation", "--turns", "3", "--answer", "8", "--text", "20", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", arguments)
    conversation.main()
    found = json.loads(file.read_text())
    # An image has 16 rows between two tokens. Full blocks of the turn before are cached, its answer is not.
    assert [turn["prompt"] for turn in found["turns"]] == [38, 84, 130]
    assert [turn["reusable"] for turn in found["turns"]] == [0, 45, 91]
    assert [turn["cached"] for turn in found["turns"]] == [0, 32, 80]
    assert found["reusable tokens hit"] == 112 / 136


def test_floor_of_a_step(tmp_path):
    """Of Qwen3-VL-30B-A3B: 3.0 billion parameters are read for a token, and nearly all experts for 64."""
    path = write_checkpoint("qwen3-vl-30b-a3b", tmp_path)
    moved = StepBytes.of(path)
    # Without the table of embeddings, 0.3 billion.
    assert 2.9e9 < moved.step(1, 0) / 2 < 3.1e9
    assert 0.98 < (moved.step(64, 0) - moved.weights) / moved.experts < 1
    assert moved.token == 2 * 2 * 48 * 4 * 128 and moved.states == 0
    assert StepBytes.of(path, keys=torch.float8_e4m3fn).token == moved.token // 2


def test_load(monkeypatch, capsys, tmp_path):
    file = tmp_path / "load.json"
    arguments = ["load", "--shape", "tiny", "--folder", str(tmp_path), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", arguments)
    load.main()
    found = json.loads(file.read_text())
    assert all(found[f"{kind} {way} s"] > 0 for kind in ("cold", "warm") for way in ("read", "load"))
    assert found["GB"] > 0.01 and list(tmp_path.iterdir()) == [file]


def test_steps(monkeypatch, capsys, tmp_path):
    file = tmp_path / "steps.json"
    arguments = ["steps", "--scale", "64", "--works", "guesses", "--prompt-lookup", "4", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", arguments)
    steps.main()
    found = json.loads(file.read_text())
    assert all(found[f"guesses {kind} ms/tok"] > 0 for kind in ("repeating", "random", "free"))
    assert found["guesses repeating steps/tok"] < 0.7


def test_memory(monkeypatch, capsys, tmp_path):
    file = tmp_path / "memory.json"
    monkeypatch.setattr(sys, "argv", ["memory", "--requests", "4", "--json", str(file)])
    memory.main()
    found = json.loads(file.read_text())
    assert [row["requests"] for row in found["rows"]] == list(range(1, 5))
    assert found["resident MiB grown"] == found["rows"][-1]["resident MiB"] - found["rows"][0]["resident MiB"]


def test_preparation_compares_pixels_and_counts_copies(tmp_path):
    path = str(write_checkpoint(preparation.SHAPE, tmp_path))
    files = preparation.jpegs((90, 130))
    assert len({*files}) == preparation.DIFFERENT
    assert preparation.compare(path, files[:2], "pil") == 0
    # The first images set things up.
    large = preparation.jpegs((1400, 1000))[:1]
    preparation.copies(path, large)
    assert preparation.copies(path, large) < 1.1


def test_preparation_counts_images_of_processes(tmp_path):
    path = str(write_checkpoint(preparation.SHAPE, tmp_path))
    with preparation.crew(path, 1) as workers:
        assert workers.rate("stage", (64, 48), 1, 0.1) > 0


def test_slow_hosts(monkeypatch, capsys, tmp_path):
    file = tmp_path / "hosts.json"
    arguments = ["hosts", "--waiting", "3", "--images", "2", "--rounds", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", arguments)
    slow_hosts.main()
    found = json.loads(file.read_text())
    assert found["own ratio"] == found["own beside"] / found["own alone"]
    assert "127.0.0.2 did not deliver within 1 seconds" in capsys.readouterr().out


def test_media_memory(monkeypatch, capsys, tmp_path):
    file = tmp_path / "memory.json"
    monkeypatch.setattr(sys, "argv", ["memory", "--requests", "60", "--json", str(file)])
    media_memory.main()
    found = json.loads(file.read_text())
    assert [row["requests"] for row in found["rows"]] == list(range(6, 61, 6))
    assert sum(found["ends"].values()) == 60 and found["ends"]["200"] > 0


def test_phases_of_a_start_are_read_from_what_the_server_logs():
    output = """2026-11-29 13:06:02,101\tINFO worker.py:2029 -- Started a local Ray instance.
    (LanguageModel pid=1) INFO 2026-11-29 13:06:17,601 x -- the engine started in 0.3 s (weights 0.2)
    another line of 2026-11-29 13:06:18,000"""
    (began, *first), (ended, *second) = start.marks(output)
    assert first == ["Ray runs", ""]
    assert second == ["language model: ready", "weights 0.2"]
    assert ended - began == pytest.approx(15.5)


def test_goodput_counts_answers_that_keep_both_promises():
    options = argparse.Namespace(slo_ttft=500.0, slo_itl=60.0)
    kept, late = Trace(0.0, 0.5, [0.5, 0.55, 0.6]), Trace(1.0, 0.6, [0.6, 0.6])
    slow, short = Trace(2.0, 0.1, [0.1, 0.1, 0.3]), Trace(3.0, 0.2, [0.2])
    row = serve.summary([kept, late, slow, short, Trace(0.0, error="refused")], 4.0, options)
    # From 0 to 3.2 s.
    assert [row["req/s"], row["goodput"]] == pytest.approx([4 / 3.2, 2 / 3.2])
    assert (row["failed"], row["held"]) == (1, 0.0)
    assert serve.summary([kept, short], 4.0, options)["held"] == 1.0


@pytest.mark.ray
def test_serve_against_a_running_application(served, monkeypatch, capsys, tmp_path):
    file = tmp_path / "serve.json"
    arguments = ["--base-url", served.base_url, "--model", "pocket", "--side", "112", "--tokens", "6"]
    arguments += ["--requests", "5", "--rates", "20", "--text-share", "0.4,1", "--images", "2"]
    arguments += ["--slo-ttft", "0", "--slo-itl", "60000", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["serve", *arguments])
    serve.main()
    rows = json.loads(file.read_text())
    assert [row["text"] for row in rows] == [0.4, 1.0]
    for row in rows:
        assert row["failed"] == 0 and row["req/s"] > 0
        # No answer keeps the first promise.
        assert row["goodput"] == row["held"] == 0
        assert 0 < row["ttft p50"] <= row["ttft p99"] <= row["e2e p99"]
    printed = capsys.readouterr().out
    assert "CPU us:" in printed and "LanguageModel" in printed


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("ray::ServeReplica:bench:Ingress", "Ingress"),
        ("ray::ServeReplica:bench:Ingress.perform_graceful_shutdown", "Ingress"),
        ("ray::ServeReplica:bench:LanguageModel:qwen2.5-vl-7b", "LanguageModel"),
        ("ray::ServeReplica:bench:LanguageModel:qwen2.5-vl-7b.generate", "LanguageModel"),
        ("/usr/bin/python -P -m deployments.ray_serve.engine_server 31", "Engine"),
        ("ray::ServeController.listen_for_change", "ray"),
        ("/usr/lib/ray/raylet --port 1", "ray"),
        ("/usr/sbin/haproxy -f file", "haproxy"),
        ("python -m benchmarks.serve", None),
    ],
)
def test_processes_are_named_by_what_they_do(title, name):
    assert process_name(title) == name


def test_every_benchmark_is_among_all_of_them():
    files = Path(all_of_them.__file__).parent.glob("*.py")
    runnable = {file.stem for file in files if "\ndef main(" in file.read_text()} - {"__main__"}
    assert all_of_them.BENCHMARKS.keys() == runnable


def test_the_policy_follows_a_simulated_burst_and_shrinks_again():
    hour = 3600 // autoscaling_sim.STEP
    texts, images = np.full(hour, 4), np.zeros(hour, int)
    images[hour // 4 : hour // 2] = 80
    stages = ("preprocessor", "encoder", "language_model")
    scaled = autoscaling_sim.simulate((texts, images), None, 1, slo=3.0)
    calm = autoscaling_sim.simulate((texts, np.zeros(hour, int)), None, 1, slo=3.0)
    fixed = autoscaling_sim.simulate((texts, images), dict.fromkeys(stages, 1), 1, slo=3.0)
    # Seconds of replicas are given as a share of a day.
    one = fixed["encoder replicas"]
    assert all(calm[f"{stage} replicas"] == pytest.approx(one) for stage in stages)
    assert all(one < scaled[f"{stage} replicas"] < 6 * one for stage in stages)
    assert calm["missed %"] == 0 and scaled["missed %"] < fixed["missed %"] / 2
