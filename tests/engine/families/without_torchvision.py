"""Modules of Transformers that import torchvision, of which the tests need nothing."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any
from unittest import mock


def imported(*names: str) -> list[Any]:
    """Import the modules ``names`` below ``transformers.models``, with an empty torchvision where there is
    none."""
    parts = ["torchvision", *(f"torchvision.transforms{part}" for part in ("", ".v2", ".v2.functional"))]
    stubs: dict[str, Any] = {part: ModuleType(part) for part in parts if not _installed(part)}
    if "torchvision.transforms.v2" in stubs:
        functional = stubs["torchvision.transforms.v2.functional"]
        # Of an annotation.
        functional.InterpolationMode = int
        stubs["torchvision.transforms.v2"].functional = functional
    with mock.patch.dict(sys.modules, stubs):
        return [importlib.import_module(f"transformers.models.{name}") for name in names]


def _installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True
