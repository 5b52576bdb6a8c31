"""Token counts on the wire."""

from pydantic import BaseModel


class PromptTokensDetails(BaseModel):
    """``cached_tokens`` of the prompt were not computed again."""

    cached_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    """``reasoning_tokens`` of the answer belong to thoughts."""

    reasoning_tokens: int = 0


class Usage(BaseModel):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()
