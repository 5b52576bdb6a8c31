"""Writes docs/configuration.md: every option of the configuration, as the docstrings of its classes tell it.

``python -m tests.deployments.configuration`` writes the page; a test compares it with the classes.
"""

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from deployments.access import KeyConfig
from deployments.config import AppConfig, IngressConfig, ModelSpec, ReplayConfig
from deployments.logs import LoggingConfig
from deployments.references import ReferenceConfig
from deployments.stage_config import EncoderConfig, LanguageModelConfig, PreprocessorConfig, StageConfig
from deployments.tracing import TracingConfig
from engine.config import EngineConfig, Speculation
from engine.media.decode import ImageLimits
from engine.media.documents.limits import DocumentLimits
from engine.media.guard import FetchPolicy
from engine.media.ledger import Amounts, MediaLimits
from engine.media.video.limits import VideoLimits
from engine.parsers.formats import REASONING_TAGS, TOOL_FORMATS
from tests.serving import ROOT

PAGE = ROOT / "docs" / "configuration.md"

HEAD = """# Configuration

Every option of `args` in [`serve_config.yaml`](../serve_config.yaml), as
`python -m tests.deployments.configuration` writes them from the classes that read them. Unknown options are
refused by name before anything is deployed. An option without a default must be given.
[`changes.md`](changes.md) says which options change while the server runs.

`engine.LLM(model, ...)` takes the options of `models[].engine` as arguments.
"""

#: Each part of the configuration, and the class that reads it. Stages have the options of every stage, too.
PARTS: Mapping[str, type] = {
    "args": AppConfig,
    "models[]": ModelSpec,
    "models[].engine": EngineConfig,
    "models[].engine.speculation": Speculation,
    "every stage": StageConfig,
    "models[].preprocessor": PreprocessorConfig,
    "models[].encoder": EncoderConfig,
    "models[].language_model": LanguageModelConfig,
    "ingress": IngressConfig,
    "ingress.keys[]": KeyConfig,
    "ingress.references": ReferenceConfig,
    "ingress.replay": ReplayConfig,
    "fetch": FetchPolicy,
    "images": ImageLimits,
    "videos": VideoLimits,
    "documents": DocumentLimits,
    "media": MediaLimits,
    "media.per_request, media.per_key, media.in_all": Amounts,
    "logging": LoggingConfig,
    "tracing": TracingConfig,
}

#: What references in docstrings stand for.
_VALUES = {"TOOL_FORMATS": TOOL_FORMATS, "REASONING_TAGS": REASONING_TAGS}
_ENTRY = re.compile(r"^(\w+(?:, \w+)*): (.*)")


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        default: in YAML; empty if it must be given.
        meaning: in Markdown; empty if nothing tells it.
    """

    name: str
    default: str
    meaning: str


def options(part: type) -> list[Option]:
    """The options that a class adds to those of its bases, or changes."""
    meanings: dict[str, str] = {}
    for each in reversed(part.__mro__):
        meanings |= _attributes(each)
    return [Option(name, default, meanings.get(name, "")) for name, default in _defaults(part)]


def _defaults(part: type) -> Iterator[tuple[str, str]]:
    if dataclasses.is_dataclass(part):
        yield from ((field.name, _yaml(field.default)) for field in dataclasses.fields(part))
        return
    for name, field in part.model_fields.items():  # type: ignore[attr-defined]
        if name in part.__annotations__:
            default = field.get_default(call_default_factory=True)
            yield name, "" if default is PydanticUndefined else _yaml(default)


def _yaml(value: Any) -> str:
    """A default in YAML; parts with options of their own are empty objects."""
    if dataclasses.is_dataclass(value) or isinstance(value, BaseModel):
        return "`{}`"
    if isinstance(value, frozenset):
        value = sorted(value)
    return f"`{json.dumps(value).replace(chr(34), '')}`"


def _attributes(part: type) -> dict[str, str]:
    """What the docstring of a class says of each attribute."""
    _, _, text = inspect.cleandoc(part.__dict__.get("__doc__") or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc(text).splitlines():
        if entry := _ENTRY.match(line):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return {name: _markdown(text.strip()) for name, text in found.items()}


def _markdown(text: str) -> str:
    """Text of a docstring, its references replaced by what they stand for."""
    text = re.sub(r",?\s*[Ss]ee :(class|data):`[^`]*`[.]?", "", text)

    def named(found: re.Match[str]) -> str:
        name = found[1].rpartition(".")[2]
        return ", ".join(f"`{value}`" for value in _VALUES[name]) if name in _VALUES else f"`{name}`"

    text = re.sub(r":\w+:`~?([^`]*)`", named, text).replace("``", "`")
    return re.sub(r"\bNone\b", "`null`", text).replace("|", "\\|").rstrip(";,. ")


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_section(path, part) for path, part in PARTS.items())


def _section(path: str, part: type) -> str:
    heading = ", ".join(f"`{each}`" for each in path.split(", "))
    if part is StageConfig:
        heading = "Every stage and the ingress"
    rows = "".join(f"| `{option.name}` | {option.default} | {option.meaning} |\n" for option in options(part))
    summary = _markdown(inspect.cleandoc(part.__doc__ or "").partition("\n\n")[0].replace("\n", " ")) + "."
    return f"\n## {heading}\n\n{summary}\n\n| option | default | meaning |\n|---|---|---|\n{rows}"


if __name__ == "__main__":
    PAGE.write_text(page())
