"""A small tekken.json, and the ids that mistral-common 1.13.1 gives texts by it.

Where mistral-common is installed, ``python -m tests.engine.text.tekken_file`` prints the ids again.
"""

import base64
import json
from pathlib import Path

#: The pattern of Mistral's files.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = [
    "he",
    "er",
    "re",
    " t",
    " the",
    "ere",
    "er e",
    "wh",
    "where",
    "  ",
    "    ",
    "\n\n",
    "12",
    "'s",
    "ab",
    "ba",
    "aba",
    "abab",
    " a",
    " an",
    "na",
    "ana",
    " ana",
    "İ",
    "ü",
    "你",
    "你好",
    "好",
    "世",
    "😀",
    "The",
    "re d",
    " red",
    "red",
    "!!",
    "...",
    " .",
    ".\n",
    "//",
]
TEXTS = [
    "",
    "where the ere",
    "erere rerer werewhere",
    "ababa abababab baba ab",
    "banana ananana an ana anana",
    "  two    spaces     five \n\n\n end \t\t",
    "The theThe THE don't it's I'S",
    "123 12 1,234.5",
    "güz İİ 你好世界 好你 😀😀 é\u0301",
    "a...b .... !!! !!\n//x",
    "[INST]red[/INST] <s></s>[IMG]",
    "\r\n\r\na\u00a0b\u200bc",
]
SPECIALS = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
    "[ARGS]",
    "[CALL_ID]",
    "[THINK]",
    "[/THINK]",
    "[MODEL_SETTINGS]",
    "[/MODEL_SETTINGS]",
]
NUM_SPECIAL = 26
#: The last two tokens of bytes are beyond what models use.
VOCAB_SIZE = NUM_SPECIAL + 256 + len(_WORDS) - 2


def write_tekken(folder: Path, version: str = "v7", listed: bool = True) -> Path:
    """Write the file into ``folder``.

    Args:
        version: of the chat format.
        listed: whether the file lists its special tokens.
    """
    tokens = [bytes([byte]) for byte in range(256)] + [word.encode() for word in _WORDS]
    content = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": VOCAB_SIZE,
            "default_num_special_tokens": NUM_SPECIAL,
            "version": version,
        },
        "image": {"image_patch_size": 16, "max_image_size": 1024, "spatial_merge_size": 1},
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate(tokens)
        ],
    }
    if version == "v15":
        effort = {"type": "enum", "accepts_none": True, "default": "none", "values": ["none", "high"]}
        content["model_settings_builder"] = {"reasoning_effort": effort}
    if listed:
        content["special_tokens"] = [
            {"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(SPECIALS)
        ]
    file = folder / "tekken.json"
    file.write_text(json.dumps(content))
    return file


def recorded() -> list[list[int]]:
    """Return mistral-common's ids of each text, without BOS."""
    return json.loads(Path(__file__).with_suffix(".json").read_text())


def _record() -> None:
    import tempfile

    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    with tempfile.TemporaryDirectory() as folder:
        theirs = Tekkenizer.from_file(write_tekken(Path(folder)))
    ids = [theirs.encode(text, bos=False, eos=False) for text in TEXTS]
    print("[\n" + ",\n".join(json.dumps(each) for each in ids) + "\n]")


if __name__ == "__main__":
    _record()
