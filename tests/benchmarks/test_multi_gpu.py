"""The benchmark on several GPUs runs on CPUs, reports what it measured, and survives a part that fails."""

import json
import sys
import time
from multiprocessing import Pipe

import pytest

from benchmarks import multi_gpu
from benchmarks.multi_gpu_layouts import Outcome, Replicas, layouts, search
from benchmarks.multi_gpu_processes import Settings
from benchmarks.multi_gpu_ranks import Job, waves
from benchmarks.multi_gpu_replicas import Result, Shown

pytestmark = pytest.mark.processes


def rows_of(monkeypatch, tmp_path, *arguments):
    file = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["multi_gpu", "--gpus", "2", "--json", str(file), *arguments])
    multi_gpu.main()
    return {(row["part"], row["case"]): row for row in json.loads(file.read_text())}


def test_all_parts_on_two_ranks(monkeypatch, capsys, tmp_path):
    rows = rows_of(monkeypatch, tmp_path, "--seconds", "6000")
    assert rows["all_reduce", "2 ranks, 8 KiB"]["engine us"] > 0
    step = rows["all_reduce", "2 ranks, engine: decode step of qwen2-vl-7b, batch 1"]
    assert (step["all-reduces"], step["KiB each"]) == (2 * 28 + 1, 7.0)
    two = rows["tensor_parallel", "tiny, 2 ranks, tokens"]
    # Another model's tokens would be far less likely: with random weights all differ.
    assert two["tokens"] == 32 and two["read same"] >= 28 and two["worst gap"] < 0.01
    speed = rows["tensor_parallel", "tiny, 2 ranks, speed"]
    assert all(speed[f"x {name}"] > 0 for name in ("w1 req/s", "w2 out tok/s"))
    for layout in ("2 whole", "1 + 1", "2 shared"):
        row = rows["layouts", f"tiny, {layout}, 2 images"]
        assert row["goodput req/s"] or row["fails at"]
    assert capsys.readouterr().out.count("tiny, 1 + 1, 2 images") == 2


def test_one_gpu_of_four_gets_every_fourth_request():
    ours, theirs = Pipe()
    replicas = Replicas([(None, ours)], layouts(1, of=4)[0], Shown(1, 4))
    theirs.send(Result([0.1], [0.01], finished=True))
    outcome = replicas.at(40.0, 20.0)
    assert (outcome.rate, outcome.held, outcome.ttft) == (40.0, True, 0.1)
    due = theirs.recv().due
    # Of 800 arrivals in 20 s; they vary by a few percent.
    assert len(due) == 200 and 17 < due[-1] - due[0] < 23
    theirs.send(Result([0.1] * 8, [0.01], finished=True, ended=time.perf_counter() + 2.3))
    assert replicas.at_once(8) == pytest.approx(4 * 8 / 2.0, rel=0.1)


def test_models_run_together_where_their_ranks_have_gpus():
    jobs = [Job(shape, size, shape == "a") for shape in "ab" for size in (1, 2, 4)]
    found = [[f"{job.shape}{job.size}" for job in wave] for wave in waves(jobs, 4)]
    assert found == [["a1", "a2"], ["a4"], ["b1", "b2"], ["b4"]]
    assert [len(wave) for wave in waves(jobs, 8)] == [3, 3] and len(waves(jobs, 1)) == 6


def test_a_failed_rate_is_followed_by_one_request_that_waits_for_what_is_left():
    ours, theirs = Pipe()
    replicas = Replicas([(None, None), (None, ours)], layouts(2)[1], Shown(1, 4))
    theirs.send(Result([3.0], [0.01], finished=False))
    theirs.send(Result([0.1], [0.01], finished=True))
    assert not replicas.at(40.0, 1.0).held
    assert (len(theirs.recv().due), len(theirs.recv().due)) == (40, 1)


def test_a_part_that_takes_too_long_is_ended_and_named(monkeypatch, capfd):
    rows = multi_gpu.run_part("layouts", Settings(2, False, 0.2), 0.2)
    assert rows == [{"part": "layouts", "case": "failed", "error": "took more than 0 s"}]


def test_the_search_encloses_the_highest_rate_that_holds():
    tried = []

    def at(rate):
        tried.append(rate)
        return Outcome(rate, rate <= 37.0, 0.0, 0.0)

    for first in (5.0, 37.0, 300.0):
        tried.clear()
        best, fails = search(at, first, time.monotonic() + 60, 0.0, 30)
        assert best.rate <= 37.0 < fails.rate < 1.06 * best.rate and len(tried) < 12
    tried.clear()
    best, fails = search(at, 300.0, time.monotonic() - 1, 0.0, 30)
    assert best is None and fails.rate == 300.0 and tried == [300.0]


def test_layouts_use_every_gpu_once_for_each_kind():
    names = {gpus: [layout.name for layout in layouts(gpus)] for gpus in (2, 4)}
    assert names == {
        2: ["2 whole", "1 + 1", "2 shared"],
        4: ["4 whole", "1 + 3", "2 + 2", "4 shared"],
    }
    for layout in layouts(4)[1:3]:
        assert sorted(layout.encoders + layout.language_models) == [0, 1, 2, 3]
    assert [layout.replicas for layout in layouts(4)] == [4, 3, 2, 4]
    assert [(layout.name, layout.language_models, layout.replicas) for layout in layouts(1, of=4)] == [
        ("4 whole", [0], 4),
        ("4 shared", [0], 4),
    ]
