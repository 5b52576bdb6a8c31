"""Tiny retrieval models, and what Transformers' classes make of their inputs.

The prompts and the scores are those of the scripts that were published with the models, put together from
Transformers' parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from tests.engine.families import qwen
from tests.engine.families.case import CasePrompt
from tests.engine.tiny import QWEN_SPECIALS, make_text, rewrite_tensors, tokenizer

JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)

#: A text, an image, or both.
Shown = str | Image.Image | tuple[Image.Image, str]


def make_qwen3_vl(path: Path) -> Path:
    """A checkpoint that serves as an embedding model and as a reranker."""
    return qwen.make_qwen3_vl(path, words=("yes", "no"), seed=5)


def make_qwen3(path: Path, *, embeds: bool = False) -> Path:
    """A text reranker: tied embeddings, and a tokenizer with Qwen's control tokens.

    Args:
        embeds: an embedding model instead: without the head, tensors named as in the decoder, and a tokenizer
            that ends a text with a token of its own.
    """
    tok = tokenizer(QWEN_SPECIALS, words=("yes", "no"), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    make_text(path, "qwen3", seed=6, vocab_size=len(tok), tie_word_embeddings=not embeds)
    if embeds:
        end = ("<|endoftext|>", tok.pad_token_id)
        tok.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[end]
        )
        rewrite_tensors(path, _without_head)
    tok.save_pretrained(path)
    return path


def _without_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): x for name, x in tensors.items() if "lm_head" not in name}


def _parts(shown: Shown) -> list[dict[str, str]]:
    texts = [shown] if isinstance(shown, str) else [part for part in _pieces(shown) if isinstance(part, str)]
    images = [part for part in _pieces(shown) if not isinstance(part, str)]
    return [{"type": "image"}] * len(images) + [{"type": "text", "text": text} for text in texts]


def _pieces(shown: Shown) -> Sequence[Any]:
    return shown if isinstance(shown, tuple) else (shown,)


def images_of(*shown: Shown) -> tuple[Image.Image, ...]:
    return tuple(part for each in shown for part in _pieces(each) if isinstance(part, Image.Image))


class Qwen3VLReference:
    """Qwen3-VL-Embedding and Qwen3-VL-Reranker by Transformers' Qwen3-VL."""

    def __init__(self, path: Path) -> None:
        self._reference = qwen.Reference(path, "Qwen3VL")
        self._model = self._reference.model

    def embed(self, shown: Shown, instruction: str) -> torch.Tensor:
        """The vector of length 1."""
        states = self._last([("system", [_text(instruction)]), ("user", _parts(shown))], images_of(shown))
        return torch.nn.functional.normalize(states, dim=-1)

    def score(self, query: Shown, document: Shown, instruction: str) -> float:
        content = [
            _text("<Instruct>: " + instruction),
            _text("<Query>:"),
            *_parts(query),
            _text("\n<Document>:"),
            *_parts(document),
        ]
        states = self._last([("system", [_text(JUDGE)]), ("user", content)], images_of(query, document))
        return _yes_or_no(self._model, self._reference.tokenizer, states)

    @torch.inference_mode()
    def _last(self, messages: list[tuple[str, list]], images: tuple[Image.Image, ...]) -> torch.Tensor:
        conversation = [{"role": role, "content": content} for role, content in messages]
        text = self._reference.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        arguments = self._reference.inputs(CasePrompt(text, images)).arguments
        return self._model.model(**arguments).last_hidden_state[0, -1]


class Qwen3Reference:
    """Qwen3-Embedding and Qwen3-Reranker by Transformers' Qwen3.

    A reranker's prompt and what stands around it are tokenised piece by piece.
    """

    def __init__(self, path: Path) -> None:
        self._model = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(path)

    @torch.inference_mode()
    def embed(self, text: str) -> torch.Tensor:
        """The vector of length 1 of a prompt."""
        states = self._model.model(torch.tensor([self._tokenizer.encode(text)])).last_hidden_state[0, -1]
        return torch.nn.functional.normalize(states, dim=-1)

    @torch.inference_mode()
    def score(self, query: str, document: str, instruction: str) -> float:
        pieces = (
            f"<|im_start|>system\n{JUDGE}<|im_end|>\n<|im_start|>user\n",
            f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        )
        ids = [token for piece in pieces for token in self._tokenizer.encode(piece, add_special_tokens=False)]
        logits = self._model(torch.tensor([ids])).logits[0, -1]
        yes, no = (self._tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
        return float(torch.stack([logits[no], logits[yes]]).log_softmax(0)[1].exp())


def _yes_or_no(model: Any, tok: PreTrainedTokenizerFast, states: torch.Tensor) -> float:
    """The sigmoid of a linear layer that is the difference of two rows of the head."""
    vocab = tok.get_vocab()
    layer = torch.nn.Linear(len(states), 1, bias=False)
    with torch.no_grad():
        layer.weight[0] = model.lm_head.weight[vocab["yes"]] - model.lm_head.weight[vocab["no"]]
        return float(torch.sigmoid(layer(states))[0])


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
