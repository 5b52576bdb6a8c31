"""What the replicas of the ingress share, each store behind the handle of a deployment with one replica."""

import asyncio
from collections.abc import Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.errors import logger
from deployments.ray_serve.remote import Remote
from deployments.references import Owner, without_payload
from deployments.response_store import Found
from engine.errors import Unavailable
from engine.media.source import MediaSource
from engine.prompt import KeptFiles

#: Seconds for which an answer waits until a store that several ingresses share has taken what is kept of it.
#: One that hangs, or is being restarted, would hold the answer up for as long.
KEEP_S = 5.0


class _RemoteStore(Remote):
    """Store that the replicas of the ingress share.

    Args:
        keep_s: seconds that the store may take to keep something.
    """

    def __init__(self, handle: DeploymentHandle, keep_s: float = KEEP_S) -> None:
        super().__init__(handle)
        self._keep_s = keep_s

    async def _kept(self, response: Any) -> None:
        """Wait until the store has kept what a call of it brings.

        Raises:
            Unavailable: it has not answered in time, or is lost.
        """
        try:
            async with asyncio.timeout(self._keep_s):
                await self._result(response)
        except TimeoutError:
            raise Unavailable(f"The {self.name} has not answered in {self._keep_s:g} s.") from None


class RemoteKeeper(_RemoteStore):
    """A :class:`deployments.response_store.Keeper` behind ``handle``. Errors are those of a lost stage."""

    name = "store of responses"

    async def put(self, name: str, owner: str, data: bytes) -> None:
        await self._kept(self._handle.put.remote(name, owner, data))

    async def update(self, name: str, data: bytes) -> None:
        await self._kept(self._handle.update.remote(name, data))

    async def get(self, name: str, owner: str) -> Found | None:
        return await self._result(self._handle.get.remote(name, owner))

    async def delete(self, name: str, owner: str) -> bool:
        return await self._result(self._handle.delete.remote(name, owner))

    async def cancel(self, name: str, owner: str) -> None:
        await self._result(self._handle.cancel.remote(name, owner))

    async def stopped(self, name: str) -> bool | None:
        return await self._result(self._handle.stopped.remote(name))


class RemoteReferences(_RemoteStore):
    """A :class:`deployments.references.MediaKeeper` behind ``handle``, at which no media's bytes arrive."""

    name = "store of references"

    async def resolve(
        self, owner: Owner, sources: Sequence[MediaSource]
    ) -> tuple[list[MediaSource], dict[int, KeptFiles]]:
        named = [source for source in sources if source.is_reference]
        if not named:
            return list(sources), {}
        resolved, files = await self._result(self._handle.resolve.remote(owner, named))
        found = {source.index: source for source in resolved}
        return [found.get(source.index, source) for source in sources], files

    async def keep(self, owner: Owner, source: MediaSource, kept: KeptFiles) -> None:
        try:
            await self._kept(self._handle.keep.remote(owner, without_payload(source), kept))
        except Unavailable as error:
            # The request itself goes on without it.
            logger.warning("media of the uuid %r are not kept: %s", source.uuid[:64], error)

    async def lost(self, owner: Owner, named: Sequence[MediaSource]) -> None:
        await self._result(self._handle.lost.remote(owner, list(named)))
