"""Notes the calls of torch that a step makes."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from engine.graphs import Replay
from tests.engine.rerun import rerun

#: Calls that reach no device.
HOST = {"alias", "as_strided", "detach", "expand", "select", "slice", "split", "squeeze", "transpose"}
HOST |= {"empty", "resolve_conj", "resolve_neg", "unbind", "unflatten", "unsafe_view", "unsqueeze", "view"}


class Calls(TorchDispatchMode):
    """Notes calls of torch that compute or copy, within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.removeprefix("aten::").strip("_")
        if name not in HOST:
            self.names.append(name)
        return function(*arguments, **(options or {}))


class NotedGraphs:
    """A capture as :func:`~tests.engine.rerun.rerun`, whose replays are one call each for :class:`Calls`.

    Attributes:
        replays: their number.
    """

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, work: Any) -> Replay:
        replay = rerun(work)

        def launch() -> Any:
            self.replays += 1
            with _disable_current_modes():
                return replay()

        return launch
