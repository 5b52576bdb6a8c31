"""Pins of clients, and skipping where they are not installed."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

#: A folder with Node packages; set by ``python -m tests.clients.run``.
NODE_FOLDER = "SIGHTLINE_NODE_FOLDER"


def needs(*pins: str) -> None:
    """Skip the module unless the pinned packages are installed, each in the pinned major version.

    Args:
        pins: ``NAME==VERSION``, as pip takes them. The runner reads them from the source.
    """
    for pin in pins:
        name, _, wanted = pin.partition("==")
        try:
            found = version(name.partition("[")[0])
        except PackageNotFoundError:
            pytest.skip(f"needs {pin}", allow_module_level=True)
        if found.split(".")[0] != wanted.split(".")[0]:
            pytest.skip(f"needs {pin}, found {found}", allow_module_level=True)


def needs_node(*pins: str) -> Path:
    """Skip the module unless the pinned Node packages are installed; returns the folder that has them.

    Args:
        pins: ``NAME@VERSION``, as npm takes them.
    """
    folder = Path(os.environ.get(NODE_FOLDER, "."))
    for pin in pins:
        name = pin[: pin.rindex("@")]
        if not (folder / "node_modules" / name).is_dir():
            pytest.skip(f"needs {pin} for Node.js", allow_module_level=True)
    return folder
