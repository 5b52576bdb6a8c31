"""Several encoders and language models in one process, chosen as Ray Serve's routers choose their replicas.

It shows what the policies of :mod:`deployments.routing` do where there are too few CPU cores for as many
processes.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn

from deployments.api import create_api
from deployments.config import AppConfig
from deployments.encoder import VisionEncoder
from deployments.language_model import LanguageModel
from deployments.metrics.families import Part
from deployments.pipeline import make_pipelines
from deployments.preprocessor import Preprocessor
from deployments.routing import ItemPlaces, Load, PromptPlaces, prompt_keys
from deployments.stages import Generation, Stages
from engine.mailbox import Taker
from engine.outputs import StreamUpdate
from engine.prompt import EmbeddedMedia, PreparedMedia


class _Replicas:
    """Replicas of a stage and the requests at each.

    Args:
        made: the replicas, by name.
        by_content: choose by content, or as Ray Serve does by default: the less busy of two random ones.
    """

    def __init__(self, made: dict[str, Any], by_content: bool) -> None:
        self.made = made
        self.by_content = by_content
        self.requests = dict.fromkeys(made, 0)

    def less_busy(self) -> str:
        return min(random.sample(list(self.made), 2), key=lambda name: self.requests[name])

    async def collect(self) -> list[Part]:
        return [part for replica in self.made.values() for part in await replica.collect()]


class Encoders(_Replicas):
    """The encoder stage."""

    def __init__(self, made: dict[str, VisionEncoder], by_content: bool) -> None:
        super().__init__(made, by_content)
        self._places = ItemPlaces()

    async def encode(self, pixels: PreparedMedia, salt: str) -> EmbeddedMedia:
        key = f"{pixels.item.hash}:{salt}".encode()[:64]
        name = self._places.choose(key, self.requests)[0] if self.by_content else self.less_busy()
        self._places.sent(key, name)
        self.requests[name] += 1
        try:
            return await self.made[name].encode(pixels, salt)
        finally:
            self.requests[name] -= 1
            self._places.ended(key, name)


class LanguageModels(_Replicas):
    """The language model stage."""

    def __init__(self, made: dict[str, LanguageModel], by_content: bool) -> None:
        super().__init__(made, by_content)
        self._places = PromptPlaces()

    async def generate(
        self, request: Generation, media: Sequence[EmbeddedMedia], relay: Taker | None = None
    ) -> AsyncGenerator[StreamUpdate, None]:
        keys, tokens = prompt_keys(request.inputs), len(request.inputs.token_ids)
        loads = {name: self._load(name) for name in self.made}
        name = self._places.choose(keys, tokens, loads)[0] if self.by_content else self.less_busy()
        self._places.sent(keys, name)
        self.requests[name] += 1
        try:
            async for update in self.made[name].generate(request, media, relay):
                yield update
        finally:
            self.requests[name] -= 1

    def _load(self, name: str) -> Load:
        found = self.made[name].metrics()
        usage = found["kv_blocks_used"] / max(found["kv_blocks_total"], 1)
        return Load(self.requests[name], found["waiting_tokens"], usage)

    async def max_model_len(self) -> int:
        return await next(iter(self.made.values())).max_model_len()

    async def device(self) -> str:
        return await next(iter(self.made.values())).device()


@contextmanager
def running_locally(args: dict[str, Any]) -> Iterator[str]:
    """The application of ``args``, one model with several replicas, in this process; its base URL."""
    torch.set_num_threads(1)
    config = AppConfig.model_validate(args)
    (spec,) = config.models
    names = [f"replica {number}" for number in range(spec.encoder.num_replicas)]
    stage = spec.encoder
    limits = stage.max_batch_patches, stage.cache_bytes, stage.duty_cycle
    encoders = {name: VisionEncoder(spec.engine, *limits) for name in names}
    models = {name: LanguageModel.load(spec.engine) for name in names}
    stages = Stages(
        LanguageModels(models, spec.language_model.routing == "content"),  # type: ignore[arg-type]
        Preprocessor(spec.engine, config.fetch, config.images, config.videos, spec.preprocessor.threads),
        Encoders(encoders, spec.encoder.routing == "content"),
    )
    api = create_api(config.ingress, make_pipelines(config, [stages]))
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join()
        for replica in (*encoders.values(), *models.values()):
            replica.close()
