"""Reading of rows in pieces; the error names a file that ends too early."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.weights import reader
from engine.weights.reader import Rows, read_rows

TENSORS = {
    "matrix": torch.arange(7 * 5, dtype=torch.float32).view(7, 5),
    "kernel": torch.arange(6 * 2 * 3, dtype=torch.float64).view(6, 2, 3),
    "half": torch.arange(40, dtype=torch.float32).bfloat16().view(10, 4),
    "vector": torch.arange(9, dtype=torch.float16),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


def read(wanted: list[Rows]) -> dict[str, torch.Tensor]:
    """All pieces of each tensor, joined; each piece is copied before the next is requested."""
    found: dict[str, list[torch.Tensor]] = {}
    expected = {rows.name: rows.first for rows in wanted}
    for piece, values in read_rows(wanted, pinned=False):
        assert piece.first == expected[piece.name] and len(values) == piece.count
        expected[piece.name] += piece.count
        found.setdefault(piece.name, []).append(values.clone())
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("chunk", [1, 50, 10**6])
def test_whole_tensors_in_pieces_of_any_size(checkpoint, monkeypatch, chunk):
    monkeypatch.setattr(reader, "_CHUNK", chunk)
    found = read([Rows.of(name, info, 0, info.shape[0]) for name, info in checkpoint.tensors.items()])
    assert found.keys() == TENSORS.keys() - {"empty"}
    assert all(torch.equal(values, TENSORS[name]) for name, values in found.items())


@pytest.mark.parametrize("chunk", [1, 50, 10**6])
def test_some_rows(checkpoint, monkeypatch, chunk):
    monkeypatch.setattr(reader, "_CHUNK", chunk)
    spans = {"matrix": (2, 6), "kernel": (5, 6), "half": (0, 3), "vector": (4, 9)}
    found = read([Rows.of(name, checkpoint.tensors[name], *span) for name, span in spans.items()])
    for name, (first, end) in spans.items():
        assert torch.equal(found[name], TENSORS[name][first:end])


def test_a_file_that_ends_too_early_is_named(checkpoint):
    rows = Rows.of("matrix", checkpoint.tensors["matrix"], 0, 7)
    beyond = dataclasses.replace(rows, offset=rows.file.stat().st_size - 8)
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read: it ends within .* matrix"):
        read([beyond])


def test_stopping_early_closes_files_and_threads(checkpoint):
    open_files = Path("/proc/self/fd")
    before = len(list(open_files.iterdir()))
    rows = [Rows.of(name, info, 0, info.shape[0]) for name, info in checkpoint.tensors.items()]
    stream = read_rows(rows, pinned=False)
    next(stream)
    stream.close()
    assert len(list(open_files.iterdir())) == before
