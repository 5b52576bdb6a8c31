"""Small tokenizers of the kinds that checkpoints bring: byte-level, Llama's byte fallback, and Unigram."""

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "describe this image in detail please. <|im_start|> user",
    "what is shown in the picture? a red square on a blue background",
    "Hello world 0 1 2 3 4 5 6 7 8 9\nUSER: ASSISTANT: You are a helpful assistant.\n",
    "günther çok güzel 你好 世界 😀",
] * 3
CHATML = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
]


def special(content, **flags):
    return AddedToken(content, special=True, normalized=False, **flags)


def byte_level() -> Backend:
    """Make a tokenizer like Qwen2's: ChatML tokens, no BOS, and one added token that isn't special."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=360, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    backend.add_tokens([special(text) for text in CHATML] + [AddedToken("<tool_call>", normalized=False)])
    return backend


def byte_fallback() -> Backend:
    """Make one like Llama's and Phi-3's: Metaspace, byte tokens, a BOS, and tokens that strip whitespace."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    alphabet = sorted(set("".join(CORPUS).replace(" ", "▁")) - set("你好世界😀\n"))
    words = ["▁t", "he", "▁the", "▁a", "re", "▁re", "▁red", "▁▁", "ss", "st", "er", "US", "ER", ":▁"]
    for piece in [*alphabet, *words, "▁r", "ed", "▁re"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("r", "e"), ("▁", "re"), ("▁re", "d")]
    merges += [("▁", "▁"), ("s", "s"), ("s", "t"), ("e", "r"), ("U", "S"), ("E", "R"), (":", "▁")]
    backend = Backend(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([special(text) for text in ("<unk>", "<s>", "</s>", "<image>")])
    backend.add_special_tokens([special("<|end|>", rstrip=True), special("<|user|>", lstrip=True)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def legacy_fallback() -> Backend:
    """Make one like older Llama files: the normalizer adds the space, after every special token too."""
    backend = byte_fallback()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    return backend


def unigram() -> Backend:
    """Metaspace over a Unigram vocabulary that holds its control tokens as ordinary pieces."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁the", -3.0), ("▁red", -3.5)]
    pieces += [(character, -5.0) for character in sorted(set("".join(CORPUS)) - {" ", "▁"})]
    backend = Backend(models.Unigram(pieces, 0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([special("<s>"), special("</s>")])
    return backend


KINDS = {
    "byte_level": (byte_level, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "byte_fallback": (byte_fallback, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "legacy_fallback": (legacy_fallback, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "unigram": (unigram, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
}
