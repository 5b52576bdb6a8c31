"""The application with stand-ins for the encoder and the language model, for :mod:`benchmarks.serve`.

What its processes then have to do is what a request costs beside the models. The rows of an image are there a
few milliseconds after its pixels, and an answer has a token in every step.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any
from unittest.mock import patch

import numpy as np
from ray.serve import Application

from benchmarks.channel import Replica, Steps
from deployments import app
from deployments.config import AppConfig
from deployments.ray_serve.call_line import CallLines
from deployments.ray_serve.handoff import ObjectStore
from deployments.ray_serve.process import prepare_process
from deployments.ray_serve.replicas import VisionEncoderReplica
from deployments.stage_config import EncoderConfig
from deployments.stages import Generation
from engine.config import EngineConfig
from engine.mailbox import Relay
from engine.outputs import StreamUpdate
from engine.prompt import EmbeddedMedia, PreparedMedia

#: Values of an embedding row, as of Qwen2-VL-2B; seconds that an image takes; seconds between two tokens.
_WIDTH, _IMAGE_S, _STEP_S = 1536, 0.003, 0.004

#: Takes what a GPU would get.
_PINNED = np.zeros(64 << 20, np.uint8)


def _upload(array: np.ndarray) -> None:
    data = array.reshape(-1).view(np.uint8)
    np.copyto(_PINNED[: len(data)], data)


class _Encoder:
    """Makes rows of zeros."""

    async def encode(self, media: PreparedMedia, salt: str, asked: float) -> EmbeddedMedia:
        _upload(media.pixels)
        await asyncio.sleep(_IMAGE_S)
        rows = np.zeros((media.item.num_tokens, _WIDTH), np.uint16)
        return EmbeddedMedia(media.item.hash, rows, "bfloat16")


class _Steps(Steps):
    async def generate(
        self, request: Generation, media: Any, relay: Relay
    ) -> AsyncGenerator[StreamUpdate, None]:
        for each in media:
            _upload(each.rows)
        async for update in super().generate(request, media, relay):
            yield update


class EncoderReplica(VisionEncoderReplica):
    def __init__(self, tracing: Any, config: EncoderConfig, engine: EngineConfig) -> None:
        prepare_process()
        self._stage: Any = _Encoder()
        self._store, self._lines = ObjectStore(), CallLines(self._encode_near)

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Nothing can change."""

    async def check_health(self) -> None:
        """Nothing can fail."""

    async def __del__(self) -> None:
        """Nothing was loaded."""


class ModelReplica(Replica):
    def __init__(
        self, tracing: Any, config: Any, engine: EngineConfig, encoder: EncoderConfig | None = None
    ) -> None:
        super().__init__(_Steps(None, _STEP_S), None if encoder is None else _Encoder())
        self._most = engine.max_model_len

    async def max_model_len(self) -> int:
        assert self._most is not None
        return self._most


def build(args: AppConfig) -> Application:
    """As :func:`deployments.app.build`; Ray Serve calls this."""
    encoder = patch.object(app, "VisionEncoderReplica", EncoderReplica)
    with encoder, patch.object(app, "LanguageModelReplica", ModelReplica):
        return app.build(args)
