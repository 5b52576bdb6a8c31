"""The line of the log that says that the server is ready."""

import asyncio
from collections.abc import Mapping

from deployments.errors import logger
from deployments.pipeline import Pipeline
from engine.errors import Overloaded, Unavailable

#: Seconds between two questions to a model that is not there yet.
_INTERVAL_S = 1.0


async def announce(pipelines: Mapping[str, Pipeline], address: str) -> None:
    """Wait until every model answers, then log where the server listens and what it serves."""
    models = await asyncio.gather(*(_described(pipeline) for pipeline in pipelines.values()))
    fields = {"address": address, "models": models}
    words = "; ".join(
        f"{model['name']} ({model['task']}, {model['device']}, context of {model['context']} tokens)"
        for model in models
    )
    logger.info("ready at %s: %s", address, words, extra=fields)


async def _described(pipeline: Pipeline) -> dict[str, str | int]:
    while True:
        try:
            return {
                "name": pipeline.name,
                "task": pipeline.task,
                "device": await pipeline.device(),
                "context": await pipeline.max_model_len(),
            }
        except (Unavailable, Overloaded):
            await asyncio.sleep(_INTERVAL_S)
