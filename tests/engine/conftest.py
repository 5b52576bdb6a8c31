"""Fixtures that tests of several packages of the engine share."""

import json

import pytest

from tests.engine.tokenizers import KINDS


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of each kind of tokenizer, as a checkpoint holds it."""
    root = tmp_path_factory.mktemp("tokenizers")
    folders = {}
    for name, (make, config) in KINDS.items():
        folder = folders[name] = root / name
        folder.mkdir()
        make().save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folders
