"""The media that requests name by ``uuid``, for all replicas of the ingress."""

from collections.abc import Sequence

from deployments.ray_serve.process import prepare_process
from deployments.ray_serve.refusals import Refusal, answered
from deployments.references import Owner, ReferenceConfig, References
from engine.media.source import MediaSource
from engine.prompt import KeptFiles


class ReferencesReplica:
    """Holds :class:`~deployments.references.References`: descriptions of files, and references to their bytes
    in the object store. Deliberate errors are returned as refusals."""

    def __init__(self, config: ReferenceConfig) -> None:
        prepare_process()
        self._references = References(config)

    async def resolve(
        self, owner: Owner, named: Sequence[MediaSource]
    ) -> tuple[list[MediaSource], dict[int, KeptFiles]] | Refusal:
        """Find the media that all of ``named`` name."""
        return await answered(self._references.resolve(owner, named))

    async def keep(self, owner: Owner, source: MediaSource, kept: KeptFiles) -> Refusal | None:
        """Keep the files that ``source`` brought."""
        return await answered(self._references.keep(owner, source, kept))

    async def lost(self, owner: Owner, named: Sequence[MediaSource]) -> Refusal | None:
        """Forget media whose files are lost; always a refusal."""
        return await answered(self._references.lost(owner, named))

    async def check_health(self) -> None:
        """Answer on the event loop that does the work: Ray Serve's own answer comes from another one."""
