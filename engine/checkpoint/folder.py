"""A checkpoint folder in Hugging Face layout: its JSON files, and the headers of its safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

_HEADER_LIMIT = 100 << 20
_WHOLE = "model.safetensors"
_HUB_TEXTS = ["*.json", "*.jinja", "*.txt", "*.model", "*.ttf"]
_HUB_WEIGHTS = ["*.safetensors"]
#: The same weights once more, under the names of Mistral's own format.
_OTHER_WEIGHTS = ["consolidated*.safetensors"]
#: Integers are words of int4 numbers, and what comes with them.
_DTYPES = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "U8", "I32", "I64"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's place in a file.

    Attributes:
        file: the safetensors file.
        dtype: as safetensors writes it, e.g. ``BF16``.
        shape: of the tensor.
        begin: offset of its first byte in ``file``.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int


class Checkpoint:
    """A local checkpoint. This class reads JSON and headers, no weights; pickles are never loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(
        cls, model: str, revision: str | None = None, *, weights: bool = True, config: bool = True
    ) -> Checkpoint:
        """Open the checkpoint in the folder ``model``, or download the hub's ``owner/name``.

        Args:
            weights: whether a download includes the tensors.
            config: whether config.json must exist; a folder with a tokenizer alone has none.

        Raises:
            CheckpointError: there is no such folder or model, or it has no config.json.
        """
        path = Path(model).expanduser()
        if not path.is_dir():
            path = _download(model, revision, [*_HUB_TEXTS, *(_HUB_WEIGHTS if weights else ())])
        if config and not (path / "config.json").is_file():
            raise CheckpointError(f"{path} has no config.json, so it is no checkpoint in Hugging Face layout")
        return cls(path)

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in the file ``name``; empty if there is no such file.

        Raises:
            CheckpointError: the file doesn't hold a JSON object.
        """
        file = self.path / name
        if not self.has(name):
            return {}
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{file} should hold a JSON object")
        return value

    def has(self, name: str) -> bool:
        """Return whether there is a file ``name``."""
        return (self.path / name).is_file()

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.json("config.json")

    @cached_property
    def architectures(self) -> list[str]:
        """The names in config.json's ``architectures``; none if it states none.

        Raises:
            CheckpointError: it is no list of names.
        """
        stated = self.config.get("architectures")
        if stated is None:
            return []
        if not isinstance(stated, list) or not all(isinstance(name, str) for name in stated):
            raise CheckpointError(
                f"config.json: architectures should be a list of names, not {stated!r}", param="architectures"
            )
        return stated

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        return self.json("generation_config.json")

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Ids of the tokens that the tokenizer has beside its vocabulary, by their text.

        Folders without tokenizer.json, which Transformers' slow tokenizers save, have them in
        tokenizer_config.json, or in added_tokens.json before version 4.34.
        """
        found = dict(self.json("added_tokens.json"))
        described = self.json("tokenizer_config.json").get("added_tokens_decoder") or {}
        found |= {token["content"]: int(index) for index, token in described.items()}
        listed = self.json("tokenizer.json").get("added_tokens") or []
        return found | {token["content"]: token["id"] for token in listed}

    @cached_property
    def preprocessor_config(self) -> dict[str, Any]:
        """The image processor's options, from the file that Transformers takes: version 5 saves them in
        processor_config.json, earlier versions in preprocessor_config.json. Folders of Mistral without either
        state them in tekken.json."""
        found = self._processor("image_processor", "preprocessor_config.json")
        return found or self._publishers_processor()

    @cached_property
    def video_preprocessor_config(self) -> dict[str, Any]:
        """The video processor's options, likewise; the image processor's if no file states them."""
        found = self._processor("video_processor", "video_preprocessor_config.json")
        return found or self.json("preprocessor_config.json")

    def _publishers_processor(self) -> dict[str, Any]:
        """The options in tekken.json, as Pixtral's image processor names them; empty if there are none."""
        content = self.json("tekken.json")
        stated = content.get("image") or content.get("multimodal")
        if not isinstance(stated, dict):
            return {}
        return {
            "size": {"longest_edge": stated.get("max_image_size")},
            "patch_size": stated.get("image_patch_size"),
        }

    def _processor(self, part: str, file: str) -> dict[str, Any]:
        """Options nested as ``part`` in processor_config.json, else those in ``file``."""
        nested = self.json("processor_config.json").get(part)
        if not isinstance(nested, dict | None):
            raise CheckpointError(f"processor_config.json: {part} should be an object", param=part)
        return self.json(file) if nested is None else dict(nested)

    @cached_property
    def tensor_names(self) -> frozenset[str]:
        """Names of all tensors; empty if the folder has neither an index nor weights."""
        index = self._index()
        if index is not None:
            return frozenset(index)
        return frozenset(self.tensors if self._weight_files() else ())

    def _index(self) -> dict[str, str] | None:
        """The shard of each tensor; None if one file holds all of them or no file says which does."""
        return None if self.has(_WHOLE) else self.json("model.safetensors.index.json").get("weight_map")

    def _weight_files(self) -> list[Path]:
        """The file that Transformers takes before all others; else all safetensors files of the folder,
        without those in Mistral's own format."""
        if self.has(_WHOLE):
            return [self.path / _WHOLE]
        others = {file for pattern in _OTHER_WEIGHTS for file in self.path.glob(pattern)}
        return sorted(set(self.path.glob("*.safetensors")) - others)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name, from the headers of all shards.

        Raises:
            CheckpointError: naming the shard that is missing, truncated or not a safetensors file.
        """
        index = self._index()
        if index is not None:
            files = sorted({self.path / file for file in index.values()})
        else:
            files = self._weight_files()
        if not files:
            raise CheckpointError(
                f"{self.path} has no *.safetensors in Hugging Face layout; pickled weights are never loaded, "
                f"and {', '.join(_OTHER_WEIGHTS)} (Mistral's own format) aren't read"
            )
        found: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in _read_header(file):
                if name in found:
                    raise CheckpointError(f"tensor {name} is both in {found[name].file.name} and {file.name}")
                found[name] = info
        absent = [name for name in index or () if name not in found]
        if absent:
            raise CheckpointError(f"tensors of the index that no shard holds: {', '.join(absent[:8])}")
        return found


def _read_header(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors that the header of a safetensors file announces.

    Raises:
        CheckpointError: the file is missing, is no safetensors file, or is shorter than announced.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise CheckpointError(f"{file} is truncated or not a safetensors file")
            header = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < 8 + length + end:
        raise CheckpointError(f"{file} is truncated: {size} bytes where {8 + length + end} are announced")
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"tensor {name} in {file.name} has dtype {entry['dtype']}; only floating-point weights "
                "are supported"
            )
        yield (
            name,
            TensorInfo(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]),
        )


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no folder {model!r}, and it isn't a hub name of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=patterns, ignore_patterns=_OTHER_WEIGHTS
            )
        )
    except Exception as error:
        raise CheckpointError(
            f"there is no folder {model!r}, and the hub gave no such model: {error}"
        ) from error
