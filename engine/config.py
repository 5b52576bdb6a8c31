"""Engine configuration: everything about how a model is run, checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from engine.settings import Settings

_MOST_MEDIA: dict[Literal["image", "video"], int] = {"image": 8, "video": 1}
#: Tasks as vLLM's users know them.
_TASK_NAMES = {"embedding": "embed"}
#: More than these no machine can hold; the ids of blocks have 32 bits.
_MOST_BLOCKS, _MOST_TOKENS, _MOST_SEQUENCES = (1 << 31) - 1, 1 << 24, 1 << 16
_INT64 = 1 << 63
_DTYPE_NAMES = {"half": "float16", "float": "float32"}
#: vLLM's names of values, by option.
_VALUE_NAMES = {"kv_cache_dtype": {"fp8_e4m3": "fp8"}, "load_format": {"safetensors": "auto"}}
#: Forms of quantised weights that a checkpoint states itself, as vLLM names them.
_STATED_FORMS = ("awq", "gptq", "compressed-tensors", "modelopt", "mxfp4", "nvfp4")


class Speculation(Settings):
    """Settings of the guesses of an answer's next tokens, which are verified together.

    Attributes:
        prompt_lookup: most tokens of a guess, which is what followed the last tokens where they came before,
            in the prompt or in the answer; 0 for no guesses.
    """

    prompt_lookup: int = Field(default=0, ge=0, le=32)


class EngineConfig(Settings):
    """Settings of one engine.

    Attributes:
        model: folder with a checkpoint in Hugging Face layout, or a hub name the user chose to download.
        tokenizer: folder of the tokenizer if it isn't the model's.
        revision: hub revision.
        task: ``generate``; ``embed`` (or ``embedding``) to pool hidden states into vectors instead of
            sampling; or ``score`` to let a reranker judge pairs of a query and a document.
        instruction: with ``embed``, put before inputs that bring none, in the format of the family's
            embedding models; empty for their own, None leaves inputs as they stand. With ``score``, None
            takes the rerankers' own.
        dtype: ``auto`` takes the checkpoint's on a GPU and float32 on a CPU. ``half``, ``float`` and torch's
            dtypes are understood too.
        device: ``auto`` takes a GPU if there is one.
        load_format: ``auto`` reads safetensors; ``dummy`` fills weights with noise in place (benchmarks).
        quantization: ``fp8`` rounds the matrices of the decoder's layers to 8-bit floats as they are loaded,
            with a scale for each output; None leaves them as the checkpoint has them. Checkpoints in fp8
            need no option.
        encoder_quantization: ``fp8`` rounds the matrices in the blocks of the vision encoder's tower, too;
            its patch embedding and what follows the tower stay as the checkpoint has them.
        kv_cache_dtype: ``fp8`` keeps keys and values as 8-bit floats, in half the memory of 16-bit ones, with
            the checkpoint's scales, or 1 where it has none; ``auto`` keeps them in the model's dtype.
        max_model_len: longest prompt plus completion, in tokens; the model's own limit if None.
        block_size: tokens per KV block.
        num_kv_blocks: KV blocks of all layers; None measures free memory (GPU) or takes ``kv_cache_bytes``
            (CPU).
        kv_cache_bytes: memory for KV blocks where it isn't measured, on each rank.
        state_snapshot_bytes: memory on each rank for copies of recurrent states, from which the prefix cache
            of models with such states goes on (Qwen3.5); a quarter of the memory for caches if None.
        gpu_memory_utilization: share of the GPU's total memory this process may use.
        max_num_seqs: requests running at once.
        max_num_batched_tokens: token budget of one step. Beside running answers, prompts are spread over
            several steps if the encoder is in this process, unless many images wait.
        max_encoder_tokens: most embedding rows of one request; offline also of all requests together whose
            placeholders are not computed yet.
        enable_prefix_caching: reuse KV blocks of equal prefixes.
        append_forced_tokens: where a grammar or JSON schema leaves a single token, append it without sampling
            it, and compute such tokens together. The answers are the same, in fewer steps.
        speculation: guesses of next tokens, while few requests run: for answers that repeat their prompt or
            themselves. The answers are the same. Not for models with recurrent states.
        enforce_eager: never capture CUDA graphs.
        first_token_goal_s: seconds from a client's request to its first token that users should wait at most.
            Under overload, encoder and engine serve requests first that can still meet it, and of 32 one that
            no longer can. None serves all in the order of their arrival. Clocks of all hosts must agree.
        run_ahead: steps the host may enqueue before it reads sampled tokens; 0 waits for each step.
        stream_interval: tokens that an event of a stream holds at least, but for the first and the last, if
            the answer has one choice; several choices go out together. More than 1 saves work in the ingress
            for each token, and streams are less smooth.
        step_timeout_s: seconds after which a step is assumed never to return; a server's engine then stops.
            Compiling kernels for shapes that are new counts as well.
        tensor_parallel_size: ranks that share the language model, each with a process of its own and, where
            there are GPUs, a GPU; rank 0 is the engine's process. Must divide the model's heads and its
            intermediate size; KV heads may be fewer.
        limit_mm_per_prompt: most items of each kind in one prompt; kinds that aren't named keep the default.
        mm_processor_kwargs: processor options of the model's family, e.g. ``max_pixels`` or ``num_crops``.
        chat_template: a Jinja template or the path of one; overrides the checkpoint's.
        allowed_local_media_path: folder from which ``file://`` images may be read; None allows none.
        seed: seed of offline requests that bring none, and of dummy weights.
    """

    #: vLLM's options that its users of vision-language models give.
    ELSEWHERE: ClassVar[Mapping[str, str]] = {
        "allowed_media_domains": "fetch.allowed_hosts lists them",
        "async_scheduling": "run_ahead says how many steps are enqueued",
        "attention_backend": "kernels are chosen by the GPU",
        "calculate_kv_scales": "the checkpoint's scales are taken",
        "cpu_offload_gb": "weights stay on the GPU; tensor_parallel_size splits them",
        "data_parallel_size": "language_model.num_replicas in a server's configuration has that effect",
        "disable_log_requests": "logging.level in a server's configuration has that effect",
        "disable_log_stats": "leave it out",
        "disable_mm_preprocessor_cache": "preprocessor.cache_bytes: 0 has that effect in a server",
        "enable_chunked_prefill": "prompts are always computed in chunks",
        "enable_lora": "serve the adapter merged into its model",
        "enable_mm_embeds": "image_embeds beside engine in a server's configuration has that effect",
        "generation_config": "sampling parameters come with requests, or from generation_config.json",
        "hf_overrides": "change the checkpoint's config.json",
        "hf_token": "set HF_TOKEN in the environment",
        "interleave_mm_strings": "images stand where the messages have them",
        "kv_cache_memory_bytes": "kv_cache_bytes is its name on a CPU; on a GPU num_kv_blocks",
        "kv_transfer_config": "keys and values stay on their GPU",
        "language_model_only": "limit_mm_per_prompt: {image: 0, video: 0} refuses media",
        "max_logprobs": "requests may ask for 20",
        "media_io_kwargs": "requests may have it",
        "mm_encoder_tp_mode": "encoder.num_replicas in a server's configuration spreads images over GPUs",
        "mm_processor_cache_gb": "preprocessor.cache_bytes in a server's configuration bounds what is kept",
        "mm_processor_cache_type": "preprocessor.cache_bytes in a server's configuration bounds what is kept",
        "override_generation_config": "sampling parameters come with requests",
        "pipeline_parallel_size": "tensor_parallel_size splits a model over GPUs",
        "reasoning_parser": "reasoning_parser beside engine in a server's configuration has that effect",
        "runner": "task says what a model is for",
        "convert": "task says what a model is for",
        "served_model_name": "name beside engine in a server's configuration has that effect",
        "skip_mm_profiling": "nothing is profiled",
        "speculative_config": "speculation has the guesses that are offered",
        "swap_space": "what is preempted is computed again",
        "tokenizer_mode": "the tokenizer's files say which it is",
        "tool_call_parser": "tool_parser beside engine in a server's configuration has that effect",
        "trust_remote_code": "code from checkpoints is never run",
    }

    model: str = Field(min_length=1)
    tokenizer: str | None = Field(default=None, min_length=1)
    revision: str | None = None
    task: Literal["generate", "embed", "score"] = "generate"
    instruction: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    quantization: Literal["fp8"] | None = None
    encoder_quantization: Literal["fp8"] | None = None
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    max_model_len: PositiveInt | None = None
    block_size: PositiveInt = 16
    num_kv_blocks: int | None = Field(default=None, ge=2, le=_MOST_BLOCKS)
    kv_cache_bytes: PositiveInt = 256 << 20
    state_snapshot_bytes: NonNegativeInt | None = None
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    max_num_seqs: int = Field(default=256, gt=0, le=_MOST_SEQUENCES)
    max_num_batched_tokens: int = Field(default=8192, gt=0, le=_MOST_TOKENS)
    max_encoder_tokens: PositiveInt = 65536
    enable_prefix_caching: bool = True
    append_forced_tokens: bool = True
    speculation: Speculation = Speculation()
    enforce_eager: bool = False
    first_token_goal_s: PositiveFloat | None = None
    run_ahead: NonNegativeInt = 1
    stream_interval: PositiveInt = 1
    step_timeout_s: PositiveFloat = 300.0
    tensor_parallel_size: PositiveInt = 1
    limit_mm_per_prompt: dict[Literal["image", "video"], NonNegativeInt] = _MOST_MEDIA
    mm_processor_kwargs: dict[str, Any] = Field(default_factory=dict)
    chat_template: str | None = None
    allowed_local_media_path: str | None = None
    seed: int = Field(default=0, ge=-_INT64, lt=_INT64)

    @field_validator("model", "tokenizer", "chat_template", "allowed_local_media_path", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("task", mode="before")
    @classmethod
    def _task_by_any_name(cls, value: Any) -> Any:
        return _TASK_NAMES.get(value, value) if isinstance(value, str) else value

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype_by_any_name(cls, value: Any) -> str:
        name = str(value).removeprefix("torch.")
        return _DTYPE_NAMES.get(name, name)

    @field_validator("kv_cache_dtype", "load_format", mode="before")
    @classmethod
    def _value_by_any_name(cls, value: Any, info: ValidationInfo) -> Any:
        return _VALUE_NAMES[info.field_name or ""].get(value, value) if isinstance(value, str) else value

    @field_validator("quantization", mode="before")
    @classmethod
    def _stated_by_the_checkpoint(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith(_STATED_FORMS):
            raise ValueError(f"a checkpoint states itself that it is {value}; leave this out")
        return value

    @field_validator("limit_mm_per_prompt", mode="before")
    @classmethod
    def _limit_by_its_count(cls, value: Any) -> Any:
        """vLLM's form: an object with ``count``, and sizes for its profiling."""
        if not isinstance(value, Mapping):
            return value
        return {
            kind: limit["count"] if isinstance(limit, Mapping) and "count" in limit else limit
            for kind, limit in value.items()
        }

    @field_validator("limit_mm_per_prompt")
    @classmethod
    def _every_kind_has_a_limit(cls, value: dict[Any, int]) -> dict[Any, int]:
        return {**_MOST_MEDIA, **value}

    @field_validator("block_size")
    @classmethod
    def _block_size_is_a_power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"block_size must be a power of two, got {value}")
        return value
