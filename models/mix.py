"""Mixes checkpoints of one training: the mean of late ones, and a share of the one that it started from.

    python -m models.mix --of STEP_440 STEP_460 ... --start OLD --out NEW

Late checkpoints of a short training differ by noise that their mean lacks; a share of the older weights
brings back what the training has unlearned.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]


def mixed(late: list[Weights], start: Weights, share: float) -> Weights:
    """The mean of ``late``, with ``share`` of ``start``; rows that ``start`` lacks have no share of it."""
    found = {}
    for name, old in start.items():
        mean = torch.stack([weights[name].float() for weights in late]).mean(0)
        known = mean[: len(old)]
        known.copy_((1 - share) * known + share * old.float())
        found[name] = mean.to(old.dtype)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--of", type=Path, nargs="+", required=True, help="late checkpoints, the last one last"
    )
    parser.add_argument("--start", type=Path, required=True, help="the checkpoint that training started from")
    parser.add_argument("--share", type=float, default=0.0, help="of the start")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    late = [load_file(folder / "model.safetensors") for folder in options.of]
    weights = mixed(late, load_file(options.start / "model.safetensors"), options.share)
    shutil.copytree(options.of[-1], options.out, dirs_exist_ok=True)
    save_file(weights, options.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
