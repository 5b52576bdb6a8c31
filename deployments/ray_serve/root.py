"""The root of an application of stages."""

from typing import Any


class StagesRoot:
    """The root of an application of stages. Nothing calls it; its process loads no torch.

    Behind HAProxy, Serve refuses an application whose root has a router of its own, as the stages have.
    """

    def __init__(self, *stages: Any) -> None:
        """Take the handles of the stages, which belong to the application by that."""
