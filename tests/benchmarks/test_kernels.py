"""The kernel benchmark runs all its cases and reports those that fail."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import kernels, tiles
from benchmarks.kernels_timing import Case, Clock, Problem, Rates
from engine import kernels as package

RATES = Rates(copy=1e9, gemm=1e12, nothing=1e-6)


@pytest.fixture
def clock() -> Clock:
    return Clock(torch.device("cpu"), 0.01)


def test_every_case_runs_and_equals_its_reference(capsys, tmp_path):
    file = tmp_path / "kernels.json"
    kernels.main(["--tiny", "--seconds", "0.001", "--json", str(file)])
    results = json.loads(file.read_text())
    assert results["smoke run"] and results["rates"]["copy"] > 0
    tolerance = 0.2 if torch.cuda.is_available() else 1e-5
    for row in results["rows"]:
        assert "failed" not in row, row
        assert row["us"] > 0 and row["rate"] > 0 and row["error"] <= tolerance, row
        assert all(isinstance(time, float) for time in row["peers us"].values()) or torch.cuda.is_available()
    output = capsys.readouterr().out
    assert "smoke run" in output and "FAILED" not in output


def test_every_kernel_of_the_engine_is_measured():
    names = {path.stem for path in Path(package.__path__[0]).glob("*.py")} - {
        "__init__",
        "activation",
        # Parts of delta_prefill.
        "delta_scan",
        "delta_tiles",
        "device",
        "dispatch",
        "experts",
        "image_plan",
        # Within other kernels.
        "int4_unpack",
        "launch",
        "paged",
        "pdl",
        # Between GPUs: benchmarks.multi_gpu measures it.
        "peer_reduce",
        "recurrent_state",
        "registers",
        "ring",
        "router_config",
        "scales",
        "shares",
        "split_sums",
        "tile",
    }
    measured = {case.kernel for case in kernels.all_cases(torch.device("cpu"), tiny=True)}
    attention = {"paged_decode", "fp8_decode", "paged_prefill", "paged_mixed", "vision"}
    attention_files = {"decode_attention", "paged_attention", "prefill_attention", "vision_attention"}
    attention_files |= {"fp8_attention", "image_attention"}
    assert (names - attention_files) | attention <= measured
    assert measured == {case.kernel for case in kernels.all_cases(torch.device("cpu"), tiny=False)}


def test_tiles_are_tried_one_after_the_other(capsys, tmp_path, monkeypatch):
    used = []

    def attempt(work, clock):
        used.append({module.choose_tile("any problem") for module in patched()})
        return float(len(used))

    modules = {module for module, _ in tiles.TUNED.values()}
    chosen = {module: module.choose_tile for module in modules}

    def patched():
        return {module for module in modules if module.choose_tile is not chosen[module]}

    monkeypatch.setattr(tiles, "attempt", attempt)
    file = tmp_path / "tiles.json"
    tiles.main(["--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert {row["kernel"] for row in rows} == set(tiles.TUNED) and not patched()
    expected = []
    for row in rows:
        _, tried = tiles.TUNED[row["kernel"]]
        expected += [set(), *({tile} for tile in tried)]
    assert used == expected


def test_a_failing_case_is_a_row(clock):
    def build() -> Problem:
        raise RuntimeError("no such backend\nand more")

    row = kernels.measure(Case("broken", "1x1", build), clock, RATES)
    assert row["failed"] == "RuntimeError: no such backend"
    assert "FAILED RuntimeError: no such backend" in kernels.line(row)


def test_a_failing_peer_leaves_the_row(clock):
    x = torch.ones(8)
    problem = Problem(lambda: x + 1, lambda: (x + 1, x + 1.5), x.nbytes, peers={"none": lambda: 1 // 0})
    row = kernels.measure(Case("add", "8", lambda: problem), clock, RATES)
    assert row["error"] == 0.5
    assert row["us"] > 0 and row["rate"] * row["us"] * 1e3 == pytest.approx(x.nbytes)
    assert "none (ZeroDivisionError" in kernels.line(row)


def test_unknown_kernels_are_refused(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--only", "paged_decode,nonsense"])
    assert "no such kernels: nonsense" in capsys.readouterr().err
