"""docs/configuration.md has every option of the configuration, with its default and what it means."""

import types
from typing import Any, get_args

from pydantic import BaseModel

from deployments.config import AppConfig
from tests.deployments.configuration import PAGE, PARTS, options, page


def test_the_page_is_that_of_the_classes(monkeypatch):
    for name in ("IMAGE", "VIDEO"):
        monkeypatch.delenv(f"SIGHTLINE_{name}_FETCH_TIMEOUT", raising=False)
        monkeypatch.delenv(f"VLLM_{name}_FETCH_TIMEOUT", raising=False)
    assert PAGE.read_text() == page(), "run: python -m tests.deployments.configuration"


def test_every_option_is_explained():
    explained = {part: options(part) for part in PARTS.values()}
    assert all(option.meaning for found in explained.values() for option in found)
    assert sum(map(len, explained.values())) > 130


def parts_of(hint: Any) -> list[type]:
    """The classes of the configuration within an annotation."""
    inner = [part for each in get_args(hint) for part in parts_of(each)]
    own = isinstance(hint, type) and not isinstance(hint, types.GenericAlias)
    is_part = own and (issubclass(hint, BaseModel) or hasattr(hint, "__dataclass_fields__"))
    return [hint, *inner] if is_part else inner


def test_no_part_of_the_configuration_is_left_out():
    found, waiting = set(), [AppConfig]
    while waiting:
        part = waiting.pop()
        found.add(part)
        hints = [field.annotation for field in getattr(part, "model_fields", {}).values()]
        waiting += [each for hint in hints for each in parts_of(hint) if each not in found]
    assert found <= set(PARTS.values()) and len(found) > 15
