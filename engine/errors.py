"""The errors that a user can cause or must hear of, each with its HTTP status.

Everything raised on purpose derives from :class:`SightlineError`. ``status`` is the HTTP status an ingress
answers with, ``code`` OpenAI's machine-readable ``error.code``. They survive pickling, since they cross
process boundaries.

``param`` is the part of the request or configuration at fault, by the engine's own name: a field of
``SamplingParams``, ``PoolingParams`` or ``EngineConfig``, an argument of :class:`engine.llm.LLM`, ``prompt``,
``model``, or the ``where`` of a media item. The engine knows no wire protocol: a server maps these names to
the fields that its client sent.
"""

from __future__ import annotations


class SightlineError(Exception):
    """Base of all deliberate errors.

    Args:
        message: what is wrong and what to change, in words meant for the caller.
        param: the part at fault by the engine's own name, if there is one.
    """

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self):
        return _rebuild, (type(self), self.message, self.param)


def _rebuild(cls: type[SightlineError], message: str, param: str | None) -> SightlineError:
    return cls(message, param=param)


class ConfigError(SightlineError, ValueError):
    """A configuration value is unusable; ``param`` names the field."""

    code = "invalid_config"


class CheckpointError(SightlineError):
    """A checkpoint is missing, incomplete, or of an architecture that isn't supported."""

    code = "invalid_checkpoint"


class InvalidRequest(SightlineError, ValueError):
    """The request can't be served as it is; the message says what to change."""

    status = 400
    code = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus completion can never fit into the model's context or the KV cache."""

    code = "context_length_exceeded"

    @classmethod
    def by(cls, limit: int, prompt: int, answer: int) -> ContextLengthExceeded:
        """The refusal of a request. Clients search the message for "maximum context length is".

        Args:
            limit: tokens that the context holds.
            prompt: tokens of the prompt.
            answer: tokens that the answer needs: the request's ``max_tokens``, else 1; 0 for embeddings.
        """
        needed = f"{prompt} in the prompt" + (f", {answer} in the completion" if answer else "")
        param, advice = "prompt", "shorten the prompt, or use smaller or fewer images"
        if prompt < limit and answer > 1:
            param, advice = "max_tokens", "lower max_tokens"
        return cls(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{prompt + answer} tokens ({needed}): {advice}.",
            param=param,
        )


class NoTokenAllowed(InvalidRequest):
    """In the middle of an answer the request's constraints have left no token that could come next."""

    code = "no_token_allowed"


class MediaError(InvalidRequest):
    """An image could not be fetched, decoded or shown to the model."""

    code = "invalid_image"


class MediaForbidden(MediaError):
    """This server may not fetch from the image's address."""

    code = "image_url_forbidden"


class MediaTooLarge(MediaError):
    """An image, or all of them together, exceeds a budget (bytes, pixels, count or visual tokens)."""

    status = 413
    code = "image_too_large"


class ModelNotFound(SightlineError):
    """No model of that name is served."""

    status = 404
    code = "model_not_found"


class Overloaded(SightlineError):
    """The queue is full; the caller should come back later.

    Attributes:
        retry_after_s: whole seconds until then, if whoever refuses knows the queue; not pickled.
    """

    status = 429
    code = "overloaded"
    retry_after_s: int | None = None


class RequestFailed(SightlineError):
    """Computing one request raised an exception. Other requests are not affected."""


class Unavailable(SightlineError):
    """A part of the server that this request needs is down or restarting."""

    status = 503
    code = "unavailable"
