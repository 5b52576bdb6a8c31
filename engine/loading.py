"""From a configuration to an engine that is ready to run."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass

import torch

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import ConfigError
from engine.families.base import ModelConfig
from engine.families.registry import family_named, resolve
from engine.inputs.tokenizer import Tokenizer
from engine.metrics import EngineMetrics
from engine.output_processor import OutputProcessor
from engine.placement import resolve_device, resolve_dtype
from engine.request import Request
from engine.request_factory import RequestFactory
from engine.runner.kv_storage import allocate_kv, block_bytes, measure_free_bytes
from engine.runner.model_runner import ModelRunner
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.encoder_ledger import EncoderLedger
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.prefix_cache import BlockHasher
from engine.scheduling.scheduler import Scheduler
from engine.structured.grammar import GrammarCompiler
from engine.weights.checkpoint import Checkpoint
from engine.weights.loader import load_language_model

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class LoadedEngine:
    """The parts of an engine: the loop, what makes requests, and what makes text of tokens."""

    config: EngineConfig
    model: ModelConfig
    tokenizer: Tokenizer
    grammars: GrammarCompiler
    requests: RequestFactory
    core: EngineCore
    outputs: OutputProcessor
    metrics: EngineMetrics


def load_engine(config: EngineConfig) -> LoadedEngine:
    """Load the language model of ``config`` and all around it.

    Raises:
        CheckpointError: the checkpoint is unusable; see :mod:`engine.weights.loader`.
        ConfigError: a field of ``config`` does not fit the model or the machine.
    """
    checkpoint = Checkpoint.open(config.model, config.revision)
    model = resolve(checkpoint).parse(checkpoint)
    device, dtype = resolve_device(config), resolve_dtype(config, model)
    max_model_len = config.max_model_len or model.max_position
    if max_model_len > model.max_position:
        raise ConfigError(
            f"max_model_len is {max_model_len}, but the model was made for {model.max_position} tokens",
            param="max_model_len",
        )
    decoder = load_language_model(
        checkpoint,
        model,
        device=device,
        dtype=dtype,
        load_format=config.load_format,
        seed=config.seed,
        max_model_len=max_model_len,
    )

    def positions(request: Request):
        return family_named(model.family).positions(model, request.num_prompt, request.spans)

    def runner(num_blocks: int, length: int, slots: int) -> ModelRunner:
        kv = allocate_kv(model.decoder, num_blocks, config.block_size, dtype, device)
        return ModelRunner(
            decoder,
            kv,
            block_size=config.block_size,
            num_slots=slots,
            max_model_len=length,
            positions=positions,
            capture_graphs=not config.enforce_eager,
        )

    num_blocks = config.num_kv_blocks
    if num_blocks is None:
        free = config.kv_cache_bytes
        if device.type == "cuda":
            runner(2, max_model_len, config.max_num_seqs).profile(config.max_num_batched_tokens)
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            free = measure_free_bytes(device, config.gpu_memory_utilization)
        num_blocks = free // block_bytes(model.decoder, config.block_size, dtype)
        if num_blocks < 2:
            raise ConfigError(
                f"{free >> 20} MiB are left for KV blocks, too little for one; raise gpu_memory_utilization "
                "(or kv_cache_bytes on a CPU), or lower max_num_batched_tokens",
                param="gpu_memory_utilization",
            )
        # Blocks beyond what all slots can fill serve the prefix cache alone; leave it twice as many.
        num_blocks = min(num_blocks, 1 + 3 * config.max_num_seqs * -(-max_model_len // config.block_size))
    scheduler = _scheduler(config, model, num_blocks, max_model_len, str(checkpoint.path))
    if scheduler.max_model_len < max_model_len:
        logger.warning("KV blocks hold %d tokens: max_model_len is cut to that", scheduler.max_model_len)
    final = runner(num_blocks, scheduler.max_model_len, len(scheduler.slots.requests))
    final.warm_up()
    tokenizer = Tokenizer.load(config.tokenizer or checkpoint.path)
    grammars = GrammarCompiler(tokenizer.backend, model.decoder.vocab_size, model.eos_token_ids)
    metrics = EngineMetrics()
    return LoadedEngine(
        config,
        model,
        tokenizer,
        grammars,
        RequestFactory(config, model, scheduler, tokenizer, grammars),
        EngineCore(scheduler, final, config.run_ahead),
        OutputProcessor(tokenizer, metrics),
        metrics,
    )


def _scheduler(
    config: EngineConfig, model: ModelConfig, num_blocks: int, max_model_len: int, name: str
) -> Scheduler:
    hasher = None
    if config.enable_prefix_caching:
        key = f"{name}@{config.revision}:{model.architecture}"
        hasher = BlockHasher(config.block_size, key, secrets.token_bytes(32))
    return Scheduler(
        KVManager(BlockPool(num_blocks), hasher, config.block_size),
        EncoderLedger(config.max_encoder_tokens),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
    )
