"""Frames of a video file that models are shown, chosen as the models' own video processors choose them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.errors import InvalidRequest
from engine.media.video.video import VideoInfo, VideoOptions

#: Numbers that ``torch.arange`` computes at a time on x86-64, and in one turn of its loop.
_LANES, _TURN = 8, 16


@dataclass(frozen=True, slots=True)
class FrameRules:
    """A checkpoint's rules for the number of frames of a video.

    Attributes:
        fps: frames per second of a video whose caller asks for nothing.
        num_frames: their number instead of a rate; None if the rate decides.
        min_frames, max_frames: bounds of the number that follows from a rate.
        temporal: frames that make one step in time.
    """

    fps: float | None = None
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    temporal: int = 1


DEFAULT_RULES = FrameRules()

#: Chooses a file's frames by the family's rules and the caller's options: ascending indices.
Sampler = Callable[[VideoInfo, FrameRules, VideoOptions], list[int]]


def qwen2_indices(info: VideoInfo, rules: FrameRules, asked: VideoOptions) -> list[int]:
    """Indices as Transformers' ``Qwen2VLVideoProcessor.sample_frames`` gives them.

    That one fails for a single frame, and its float arithmetic may add an index behind the last frame.

    Raises:
        InvalidRequest: the video has fewer frames than asked for.
    """
    step, total = rules.temporal, info.frames
    if asked.num_frames is not None:
        count = round(asked.num_frames / step) * step
    else:
        fps = asked.fps or rules.fps
        assert fps is not None
        most = min(rules.max_frames, total) // step * step
        count = math.floor(min(max(total / info.fps * fps, rules.min_frames), most, total) / step) * step
    count = max(count, 1)
    _require(count, total)
    return _arange(total / count, count)


def qwen3_indices(info: VideoInfo, rules: FrameRules, asked: VideoOptions) -> list[int]:
    """Indices as Transformers' ``Qwen3VLVideoProcessor.sample_frames`` gives them; they may repeat."""
    total, count = info.frames, asked.num_frames
    if count is None:
        fps = asked.fps or rules.fps
        assert fps is not None
        count = min(max(int(total / info.fps * fps), rules.min_frames), rules.max_frames, total)
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def uniform_indices(info: VideoInfo, rules: FrameRules, asked: VideoOptions) -> list[int]:
    """Indices as Transformers' ``default_sample_indices_fn`` gives them.

    Raises:
        InvalidRequest: the video has fewer frames than asked for.
    """
    total, count = info.frames, asked.num_frames
    if count is None and (fps := asked.fps or rules.fps):
        count = max(1, int(total / info.fps * fps))
        if not asked.fps:
            count = min(count, total)
    elif count is None:
        count = min(rules.num_frames or total, total)
    _require(count, total)
    return [index * total // count for index in range(count)]


def ernie_indices(info: VideoInfo, rules: FrameRules, asked: VideoOptions) -> list[int]:
    """Indices as Transformers' ``Ernie4_5_VLMoeVideoProcessor.sample_frames`` gives them.

    That one's float arithmetic may add an index behind the last frame.

    Raises:
        InvalidRequest: the number of frames asked for is out of the model's bounds, or of the video's.
    """
    total, least, most = info.frames, rules.min_frames, rules.max_frames
    if asked.num_frames is not None:
        if not least <= asked.num_frames <= most:
            raise InvalidRequest(
                f"this model is shown {least} to {most} frames of a video, not num_frames {asked.num_frames}",
                param="video",
            )
        _require(asked.num_frames, total)
        count: float = asked.num_frames
    else:
        fps = asked.fps or rules.fps
        assert fps is not None
        count = min(max(total / info.fps * fps, least), most, total)
    step = total / count
    return [index for index in _arange(step, math.ceil(total / step)) if index < total]


def middle_indices(info: VideoInfo, rules: FrameRules, asked: VideoOptions) -> list[int]:
    """Indices as Transformers' ``InternVLVideoProcessor.sample_frames`` gives them with ``initial_shift``.

    They are the middle frames of equal parts.

    Raises:
        InvalidRequest: the video has fewer frames than asked for.
    """
    total, count = info.frames, asked.num_frames
    if count is None and asked.fps:
        count = max(1, int(total / info.fps * asked.fps))
    elif count is None:
        count = min(rules.num_frames or total, total)
    _require(count, total)
    step = total / count
    return _arange(step, count, start=step / 2)


#: Longest video, in seconds, that GLM-4.1V gets at the whole rate; longer videos get as many frames as it.
_GLM4V_SECONDS = 300
#: GLM-4.6V: frames per second by the longest video, in seconds, that has them; most seconds; most frames.
_GLM46V_RATES, _GLM46V_SECONDS, _GLM46V_FRAMES = {30: 3, 300: 1, 2400: 0.5}, 2400, 640


def glm4v_indices(info: VideoInfo, rules: FrameRules, asked: VideoOptions) -> list[int]:
    """Indices as Transformers' ``Glm4vVideoProcessor.sample_frames`` gives them.

    Raises:
        InvalidRequest: the caller asks for a number of frames, which this model's videos don't have.
    """
    _refuse(asked.num_frames, "num_frames", "ask for fps")
    fps = asked.fps or rules.fps
    assert fps is not None
    last, duration = info.frames - 1, info.duration
    if duration <= _GLM4V_SECONDS:
        count = max(math.floor(duration * fps), 1)
        found = [min(last, math.ceil(i * info.fps / fps)) for i in range(count)]
    elif (count := int(_GLM4V_SECONDS * fps)) >= info.frames:
        found = list(range(info.frames))
    else:
        seconds = np.linspace(0, duration, count, endpoint=True)
        found = [min(last, math.ceil(second * info.fps)) for second in seconds]
    return _paired(found)


def glm46v_indices(info: VideoInfo, rules: FrameRules, asked: VideoOptions) -> list[int]:
    """Indices as Transformers' ``Glm46VVideoProcessor.sample_frames`` gives them; the rate falls with the
    length of a video.

    Raises:
        InvalidRequest: the caller asks for a rate or a number of frames, which the model decides by itself.
    """
    _refuse(asked.num_frames, "num_frames", "leave it out")
    _refuse(asked.fps, "fps", "leave it out")
    total, seconds = info.frames, min(info.duration, _GLM46V_SECONDS)
    rate = next(rate for most, rate in _GLM46V_RATES.items() if seconds <= most)
    count = min(int(seconds * rate * rules.temporal), _GLM46V_FRAMES)
    found: list[int] = []
    if total >= count:
        due, step, frame = 0.0, 1 / (rules.temporal * rate), 1 / info.fps
        for index in range(total):
            if index * frame >= due:
                due += step
                found.append(index)
                if due >= int(info.duration):
                    break
    if len(found) < count:
        first, last = (found[0], found[-1]) if found else (0, total - 1)
        found = np.linspace(first, last, count, dtype=int).tolist()
    elif len(found) > count:
        found = np.linspace(0, total - 1, count, dtype=int).tolist()
    return _paired(found)


def smolvlm_indices(info: VideoInfo, rules: FrameRules, asked: VideoOptions) -> list[int]:
    """Indices as Transformers' ``SmolVLMVideoProcessor.sample_frames`` gives them, with a second skipped at
    both ends of videos that are longer than the most frames last."""
    fps, most, last = asked.fps or rules.fps, asked.num_frames or rules.max_frames, info.frames - 1
    assert fps is not None
    count = max(1, min(round(fps * info.duration), most))
    first, end = 0, last
    if info.duration - 2 > most * fps:
        first, end = max(0, int(info.fps)), min(int(info.frames - info.fps), last)
    if first >= end:
        first, end = 0, last
    return np.unique(np.linspace(first, end, count, dtype=int)).tolist()


def minicpm_indices(info: VideoInfo, rules: FrameRules, asked: VideoOptions) -> list[int]:
    """Indices as Transformers' ``MiniCPMV4_6VideoProcessor.sample_frames`` gives them without stacked frames:
    one a second, or, of a video of more seconds than the most frames, that many of all tenths of a second.

    Args:
        asked: its ``num_frames`` are the most frames.

    Raises:
        InvalidRequest: the caller asks for a rate, which the model decides by itself.
    """
    _refuse(asked.fps, "fps", "ask for num_frames, which are the most that it is shown")
    most, last, duration = asked.num_frames or rules.max_frames, info.frames - 1, info.duration
    if duration <= most:
        return [min(int(second * info.fps), last) for second in range(math.ceil(duration))]
    tenths = [min(int(round(tenth * 0.1, 1) * info.fps), last) for tenth in range(int(duration / 0.1))]
    if len(tenths) <= most:
        return tenths
    return [tenths[index] for index in np.linspace(0, len(tenths) - 1, most, dtype=int)]


def molmo2_indices(info: VideoInfo, rules: FrameRules, asked: VideoOptions) -> list[int]:
    """Indices as Transformers' ``Molmo2VideoProcessor.sample_frames`` gives them.

    Args:
        rules: ``fps`` is the highest rate of a video whose caller asks for none; None if there is no bound.
    """
    if asked.fps is not None:
        count = int(info.duration * asked.fps)
    else:
        count = asked.num_frames or rules.num_frames or info.frames
        if rules.fps is not None and info.fps > rules.fps:
            count = min(count, int(info.duration * rules.fps))
    count = max(min(count, info.frames), 1)
    return _arange(info.frames / count, count)


def muse_indices(info: VideoInfo, rules: FrameRules, asked: VideoOptions) -> list[int]:
    """Indices as Transformers' ``MuseGlimmerVideoProcessor.sample_frames`` gives them: whole
    steps, from the first frame to the last.

    Args:
        asked: its ``num_frames`` are the most frames.
    """
    fps, most = asked.fps or rules.fps, asked.num_frames or rules.max_frames
    assert fps is not None
    count = min(int(info.frames * fps / info.fps), most, info.frames) // rules.temporal * rules.temporal
    return _linspace(info.frames - 1, min(max(rules.temporal, count), info.frames))


def _linspace(last: int, count: int) -> list[int]:
    """``torch.linspace(0, last, count).long()`` of float32 numbers, to the bit."""
    if count == 1:
        return [0]
    step = np.float32(last) / np.float32(count - 1)
    index = np.arange(count)
    rising = (index * step).astype(np.float32)
    falling = (np.float32(last) - (count - 1 - index) * step).astype(np.float32)
    return np.where(index < count // 2, rising, falling).astype(int).tolist()


def _paired(indices: list[int]) -> list[int]:
    """Each index once, and the last one twice if their number is odd."""
    once = list(dict.fromkeys(indices or [0]))
    return once + once[-1:] * (len(once) % 2)


def _refuse(asked: float | None, field: str, instead: str) -> None:
    if asked is not None:
        raise InvalidRequest(
            f"this model chooses the frames of a video by its length and has no {field}: {instead}",
            param="video",
        )


def _require(count: int, total: int) -> None:
    if count > total:
        raise InvalidRequest(
            f"the video has {total} frames, fewer than the {count} asked for by fps or num_frames",
            param="video",
        )


def _arange(step: float, count: int, start: float = 0.0) -> list[int]:
    """``torch.arange(start, end, step).int()`` on x86-64, to the bit, up to ``count`` numbers."""
    index = np.arange(count)
    first = index // _LANES * _LANES
    lanes = ((start + first * step).astype(np.float32) + (index - first) * step).astype(np.float32)
    exact = (start + index * step).astype(np.float32)
    return np.where(index < count // _TURN * _TURN, lanes, exact).astype(int).tolist()
