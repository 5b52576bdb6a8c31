"""Time to load weights from safetensors on a local disk, beside a plain read of the same files.

    python -m benchmarks.load --shape qwen2-vl-7b [--folder FOLDER] [--json FILE]

A checkpoint in the shape of a public model is written first, as Transformers saves it: 16 GB for a 7B model,
in FOLDER or where temporary files go. Both ways are timed with the files out of the page cache and in it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.offline import timed, versions
from benchmarks.shapes import SHAPES, write_checkpoint
from engine.checkpoint.folder import Checkpoint
from engine.config import EngineConfig
from engine.families.load import load_language_model, load_vision_encoder
from engine.families.registry import resolve
from engine.placement import resolve_device, resolve_dtype

_CHUNK = 16 << 20


def write_weights(folder: Path) -> None:
    """Constant weights for the configuration in ``folder``, by Transformers' own class."""
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    with torch.device("meta"):
        model = cls(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(0.01)
    model.tie_weights()
    # The configuration stays as public checkpoints have it.
    kept = (folder / "config.json").read_text()
    model.save_pretrained(folder, max_shard_size="5GB")
    (folder / "config.json").write_text(kept)


def forget(files: list[Path]) -> None:
    """Take ``files`` out of the page cache."""
    for file in files:
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(files: list[Path]) -> None:
    buffer = bytearray(_CHUNK)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def load(folder: Path) -> list[torch.nn.Module]:
    """Both halves of the model, on the device that an engine would take."""
    config = EngineConfig(model=str(folder))
    checkpoint = Checkpoint.open(config.model)
    model = resolve(checkpoint).parse(checkpoint)
    options: dict[str, Any] = {"device": resolve_device(config), "dtype": resolve_dtype(config, model)}
    halves: list[Any] = [load_language_model(checkpoint, model, **options)]
    halves.append(load_vision_encoder(checkpoint, model, **options))
    return halves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=sorted(SHAPES))
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written for a while")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"shape": options.shape, **versions()}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = write_checkpoint(options.shape, Path(name))
        write_weights(folder)
        files = sorted(folder.glob("*.safetensors"))
        results["GB"] = sum(file.stat().st_size for file in files) / 1e9
        ways: dict[str, Callable[[], Any]] = {"read": lambda: plain_read(files), "load": lambda: load(folder)}
        # What is allocated and compiled once must not count for the first of the four.
        load(folder)
        for way, work in ways.items():
            forget(files)
            results[f"cold {way} s"], _ = timed(work)
        for way, work in ways.items():
            results[f"warm {way} s"], _ = timed(work)
    for kind in ("cold", "warm"):
        results[f"{kind} load / read"] = results[f"{kind} load s"] / results[f"{kind} read s"]
    for key, value in results.items():
        print(f"{key:16} {value:10.3f}" if isinstance(value, float) else f"{key:16} {value}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
