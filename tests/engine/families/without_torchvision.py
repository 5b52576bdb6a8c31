"""Modules of Transformers that import torchvision, of which the tests need nothing."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend


def imported(*names: str) -> list[Any]:
    """Import the modules ``names`` below ``transformers.models``, with an empty torchvision where there is
    none."""
    ends = ("", ".functional", ".v2", ".v2.functional")
    parts = ["torchvision", *(f"torchvision.transforms{end}" for end in ends)]
    stubs: dict[str, Any] = {part: ModuleType(part) for part in parts if not _installed(part)}
    if "torchvision.transforms.v2" in stubs:
        functional = stubs["torchvision.transforms.v2.functional"]
        # Of an annotation.
        functional.InterpolationMode = int
        stubs["torchvision.transforms.v2"].functional = functional
    if "torchvision.transforms.functional" in stubs:
        functional = stubs["torchvision.transforms.functional"]
        functional.to_pil_image = lambda pixels: Image.fromarray(pixels.permute(1, 2, 0).numpy())
        functional.pil_to_tensor = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1)
    with mock.patch.dict(sys.modules, stubs):
        return [importlib.import_module(f"transformers.models.{name}") for name in names]


def _installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


class WithoutTorchvision(TorchvisionBackend):
    """Transformers' backend, but images are resized by Pillow and normalised in two steps, each rounded."""

    def process_image(self, image: Image.Image, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Releases before 5.23 do this by torchvision.
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()

    def resize(self, image: torch.Tensor, size: Any, resample: Any = None, **kwargs: Any) -> torch.Tensor:
        filter_ = Image.Resampling(int(resample))
        batch = image if image.dim() == 4 else image[None]
        images = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in batch]
        made = [np.asarray(one.resize((size.width, size.height), filter_)) for one in images]
        found = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)
        return found if image.dim() == 4 else found[0]

    def rescale_and_normalize(
        self, images: torch.Tensor, do_rescale, rescale_factor, do_normalize, image_mean, image_std
    ) -> torch.Tensor:
        made = (images.double() * rescale_factor if do_rescale else images).float()
        if do_normalize:
            mean, std = (torch.tensor(list(v))[:, None, None] for v in (image_mean, image_std))
            made = (made - mean) / std
        return made
