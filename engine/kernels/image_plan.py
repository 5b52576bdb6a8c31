"""How the programs of :mod:`engine.kernels.image_attention` share the work, chosen by times measured on an H200."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Keys of a tile, by compute groups: a group has registers for no more.
KEYS = {2: 128, 3: 64}
#: Tokens of an image with heads of 64 up to which the general kernel is faster.
_LARGE = 2048
#: Microseconds with heads of 80. Of whole tiles: the launch, with the first loads and the last stores; a tile of keys,
#: and going on to the next tile of rows, by compute groups.
_START, _STEP, _NEXT = 5.0, {2: 1.2, 3: 1.02}, {2: 2.6, 3: 1.5}
#: Of equal shares: the launch, with merging parts, and a tile of rows by a tile of keys.
_START_SHARES, _STEP_SHARES = 16.0, 1.31
#: Of the general kernel: the launch, and as much as a tile of rows by a tile of keys on each SM.
_START_GENERAL, _STEP_GENERAL = 5.0, 2.2


@dataclass(frozen=True)
class ImagePlan:
    """How the programs share the work.

    Attributes:
        groups: compute groups of a program, each with 64 rows of a tile; 2, or 3 for heads of up to 80.
        shares: all programs take equal shares of one segment, see :mod:`engine.kernels.shares`; for 2 groups.
    """

    groups: int = 2
    shares: bool = False


def possible_plans(head_dim: int, segments: int, *, counted: bool) -> list[ImagePlan]:
    """Return the plans that may be the fastest for some images.

    Args:
        counted: there are counters, which equal shares need.
    """
    plans = [ImagePlan(shares=True)] if counted and segments == 1 else []
    if head_dim > 64:
        # The general kernel keeps more tiles of heads of 64 on an SM.
        plans.append(ImagePlan())
    if head_dim == 80:
        plans.append(ImagePlan(groups=3))
    return plans


def choose_plan(
    tokens: int, segments: int, heads: int, head_dim: int, *, sms: int, counted: bool
) -> ImagePlan | None:
    """Choose the fastest plan; None where the general kernel is faster.

    Args:
        tokens: of all segments, which are taken to be equally long.
        sms: SMs of the GPU.
        counted: see :func:`possible_plans`.
    """
    length = tokens / segments
    plans = possible_plans(head_dim, segments, counted=counted)
    if head_dim == 64:
        return plans[0] if plans and length > _LARGE else None
    general = _START_GENERAL + _STEP_GENERAL * segments * heads * (length / 128) ** 2 / sms
    times: dict[ImagePlan | None, float] = {None: general}
    times.update({plan: _time(plan, length, segments * heads, sms) for plan in plans})
    return min(times, key=lambda plan: times[plan])


def _time(plan: ImagePlan, length: float, heads: int, sms: int) -> float:
    """Return what a plan takes in microseconds. ``heads``: of all segments."""
    down, along = math.ceil(length / (plan.groups * 64)), math.ceil(length / KEYS[plan.groups])
    if plan.shares:
        return _START_SHARES + _STEP_SHARES * heads * down * along / sms
    rounds = math.ceil(heads * down / sms)
    return _START + rounds * (_STEP[plan.groups] * along + _NEXT[plan.groups])
