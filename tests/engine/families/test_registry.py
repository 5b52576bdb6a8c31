from __future__ import annotations

import json
import subprocess
import sys

import pytest

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.registry import family_named, resolve, supported_architectures
from tests.engine.families.lines import code_lines


def checkpoint(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(str(tmp_path))


@pytest.mark.parametrize("architecture", supported_architectures())
def test_each_family_serves_what_it_says(tmp_path, architecture):
    family = resolve(checkpoint(tmp_path, {"architectures": [architecture]}))
    assert architecture in family.architectures
    assert family_named(family.name) is family


@pytest.mark.parametrize("config", [{"architectures": ["T5ForConditionalGeneration"]}, {}], ids=str)
def test_unknown_architectures_are_refused_with_the_supported(tmp_path, config):
    with pytest.raises(CheckpointError) as error:
        resolve(checkpoint(tmp_path, config))
    assert all(name in error.value.message for name in supported_architectures())


def test_families_need_no_torch():
    """Processes that only prepare images or render prompts don't load it."""
    code = (
        "import sys, engine.families.qwen2_vl.family, engine.families.text.family, engine.families.registry; "
    )
    subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True, timeout=240
    )


def test_lines_of_code_leave_out_comments_and_docstrings():
    source = '"""A.\n\nB."""\nx = 1  # C.\n# D.\n\n\ndef f():\n    "E."\n    return (1,\n\n    2)\n'
    assert code_lines(source) == 4
