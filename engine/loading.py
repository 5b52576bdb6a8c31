"""Loads an engine by its configuration, ready to run."""

from __future__ import annotations

import logging
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.checkpoint.folder import Checkpoint
from engine.config import EngineConfig
from engine.core import EngineCore, Runner
from engine.executor.executor import load_ranks
from engine.executor.launch import Launcher, LocalLauncher
from engine.families.base import ModelConfig
from engine.families.load import check_tensors
from engine.families.registry import resolve
from engine.layers.layer_groups import LayerGroups
from engine.metrics import EngineMetrics
from engine.model_parts import tokenizer_folder
from engine.output_processor import OutputProcessor
from engine.placement import resolve_dtype
from engine.request_factory import RequestFactory
from engine.runner.kv_storage import num_snapshots
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.encoder_ledger import EncoderLedger
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.prefix_cache import BlockHasher
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.snapshots import SnapshotPool
from engine.startup import StartTimes
from engine.structured.grammar import GrammarCompiler
from engine.text.tokenizer import Tokenizer

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


def check_checkpoint(config: EngineConfig) -> None:
    """Check by their headers that the tensors of all parts of ``config.model`` are there.

    Raises:
        CheckpointError: see :mod:`engine.families.load`.
    """
    if config.load_format == "auto":
        checkpoint = Checkpoint.open(config.model, config.revision)
        model = resolve(checkpoint).parse(checkpoint)
        check_tensors(checkpoint, model, vectors_only=config.task == "embed")


def load_engine(config: EngineConfig, launcher: Launcher | None = None) -> LoadedEngine:
    """Load the language model of ``config`` and all around it.

    Args:
        launcher: starts the ranks beyond the first; processes of this machine if None.

    Raises:
        CheckpointError: the checkpoint is unusable; see :mod:`engine.families.load`.
        ConfigError: a field of ``config`` does not fit the model or the machine.
        Unavailable: a rank has died.
    """
    times = StartTimes()
    checkpoint = Checkpoint.open(config.model, config.revision)
    model = resolve(checkpoint).parse(checkpoint)
    with ThreadPoolExecutor(1, "tokenizer") as pool:
        # A large vocabulary takes a second or two, and no device.
        tokenizer = pool.submit(Tokenizer.load, tokenizer_folder(config, checkpoint))
        scheduler, runner, max_model_len = _load_model(
            config, checkpoint, model, launcher or LocalLauncher(), times
        )
        with times.phase("rest of the tokenizer"):
            text = tokenizer.result()
    logger.info("the engine started in %s", times)
    grammars = GrammarCompiler(text.backend, model.decoder.vocab_size, model.eos_token_ids)
    metrics = EngineMetrics()
    return LoadedEngine(
        config,
        model,
        text,
        grammars,
        RequestFactory(config, model, scheduler, text, grammars, max_model_len),
        EngineCore(scheduler, runner, config.run_ahead),
        OutputProcessor(text, metrics, config.stream_interval),
        metrics,
    )


def _load_model(
    config: EngineConfig, checkpoint: Checkpoint, model: ModelConfig, launcher: Launcher, times: StartTimes
) -> tuple[Scheduler, Runner, int]:
    """The scheduler, the runner, and the longest sequence in tokens, however many KV blocks there are."""
    ranks = load_ranks(config, checkpoint, model, launcher, times)
    max_model_len = ranks.max_model_len
    groups = LayerGroups.of(model.decoder, max_model_len, config.tensor_parallel_size)
    if config.num_kv_blocks is None:
        # Blocks beyond what all slots can fill serve the prefix cache alone; leave it twice as many.
        most = 1 + 3 * config.max_num_seqs * -(-max_model_len // config.block_size) * len(groups.windows)
        num_blocks = min(ranks.measure_blocks(), most)
    else:
        num_blocks = config.num_kv_blocks * len(groups.windows)
    ranks.check_blocks(num_blocks)
    dtype = resolve_dtype(config, model)
    states = num_snapshots(config, model.decoder, dtype, num_blocks)
    scheduler = _scheduler(config, model, groups, num_blocks, states, max_model_len, str(checkpoint.path))
    if scheduler.max_model_len < max_model_len:
        logger.warning("KV blocks hold %d tokens: max_model_len is cut to that", scheduler.max_model_len)
    runner = ranks.make_runner(num_blocks, scheduler.max_model_len, len(scheduler.slots.requests))
    return scheduler, runner, max_model_len


def _scheduler(
    config: EngineConfig,
    model: ModelConfig,
    groups: LayerGroups,
    num_blocks: int,
    num_states: int,
    max_model_len: int,
    name: str,
) -> Scheduler:
    hasher = None
    has_states = model.decoder.recurrence is not None
    snapshots = SnapshotPool(num_states) if has_states else None
    if config.enable_prefix_caching and snapshots is not None and not num_states:
        logger.warning("no prefix is cached: there is no memory for snapshots of recurrent states")
    elif config.enable_prefix_caching:
        key = f"{name}@{config.revision}:{model.architecture}"
        told_apart = model.decoder.vision_tokens
        hasher = BlockHasher(config.block_size, key, secrets.token_bytes(32), told_apart)
    most_drafted = config.speculation.prompt_lookup
    if most_drafted and has_states:
        logger.warning("speculation is off: this model's recurrent states can't go back behind a guess")
        most_drafted = 0
    return Scheduler(
        KVManager(
            BlockPool(num_blocks, snapshots if hasher else None),
            hasher,
            config.block_size,
            windows=groups.windows,
            step_tokens=config.max_num_batched_tokens,
        ),
        EncoderLedger(config.max_encoder_tokens),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        recompute_beyond=model.decoder.rope.recompute_beyond,
        most_drafted=most_drafted,
        has_states=has_states,
    )
