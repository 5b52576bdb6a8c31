"""Token counts on the wire."""

from typing import Any

from pydantic import BaseModel, Field

from deployments.report import ItemReport, Report


class PromptTokensDetails(BaseModel):
    """``cached_tokens`` of the prompt were not computed again."""

    cached_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    """``reasoning_tokens`` of the answer belong to thoughts."""

    reasoning_tokens: int = 0


def _is_none(value: object) -> bool:
    return value is None


class Timings(BaseModel):
    """Milliseconds in each stage of one request; a stage that it didn't need is left out.

    Attributes:
        fetch_ms: until the bytes of all images were there.
        prepare_ms: decoding and resizing them.
        prompt_ms: rendering and tokenizing the prompt.
        encode_ms: the vision encoder, its queue and transport included.
        queue_ms: waiting for a place among the running requests.
        prefill_ms: computing the prompt, up to the first token.
        first_token_ms: from the request's arrival to its first token.
        per_token_ms: mean time between the tokens of one choice after that.
        total_ms: from the request's arrival.
    """

    fetch_ms: float | None = Field(default=None, exclude_if=_is_none)
    prepare_ms: float | None = Field(default=None, exclude_if=_is_none)
    prompt_ms: float | None = Field(default=None, exclude_if=_is_none)
    encode_ms: float | None = Field(default=None, exclude_if=_is_none)
    queue_ms: float | None = Field(default=None, exclude_if=_is_none)
    prefill_ms: float | None = Field(default=None, exclude_if=_is_none)
    first_token_ms: float | None = Field(default=None, exclude_if=_is_none)
    per_token_ms: float | None = Field(default=None, exclude_if=_is_none)
    total_ms: float


class MediaUsage(BaseModel):
    """One image or video of a request, in order.

    Attributes:
        width, height: its size in pixels as the model's processor got it.
        tokens: embedding rows that stand for it in the prompt.
        frames: frames of a video that the model was shown; 1 for an image.
        cached: its embedding came from the encoder's cache.
        note: what is missing of it, such as the end of a file; left out if nothing is.
        fetch_ms, prepare_ms, encode_ms: as in :class:`Timings`, for this item.
    """

    type: str
    width: int
    height: int
    tokens: int
    frames: int
    cached: bool
    note: str | None = Field(default=None, exclude_if=_is_none)
    fetch_ms: float
    prepare_ms: float
    encode_ms: float


class UsageBody(BaseModel):
    """Token counts of one request; ``timings`` and ``media`` if it has ``include_timings``."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()
    timings: Timings | None = Field(default=None, exclude_if=_is_none)
    media: list[MediaUsage] | None = Field(default=None, exclude_if=_is_none)


def usage_extras(report: Report) -> dict[str, Any]:
    """Fields ``timings`` and ``media`` of a request that has ended."""
    timings = Timings(**{f"{name}_ms": value for name, value in report.times().items()})
    return {"timings": timings.model_dump(), "media": [_media(item).model_dump() for item in report.media]}


def _media(found: ItemReport) -> MediaUsage:
    width, height = found.item.size
    times = {
        f"{name}_ms": round(found.seconds.get(name, 0.0) * 1e3, 2) for name in ("fetch", "prepare", "encode")
    }
    return MediaUsage(
        type=found.item.kind,
        width=width,
        height=height,
        tokens=found.item.num_tokens,
        frames=found.frames,
        cached=found.cached,
        note=found.note or None,
        **times,
    )
