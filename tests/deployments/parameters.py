"""Writes docs/parameters.md: every parameter that the clients' types or vLLM's server know, and what becomes
of it here.

``python -m tests.deployments.parameters`` writes the page; a test compares it with the installed clients.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import anthropic.types.message_create_params
import openai.types.chat.completion_create_params
import openai.types.completion_create_params
import openai.types.decision_create_params
import openai.types.embedding_create_params
import openai.types.responses.response_create_params

from deployments.protocol.base import RequestBody, known_fields
from deployments.protocol.chat import ChatCompletionRequest
from deployments.protocol.completions import CompletionRequest
from deployments.protocol.decisions import DecisionRequest
from deployments.protocol.embeddings import EmbeddingRequest, PoolingRequest
from deployments.protocol.messages import MessagesRequest
from deployments.protocol.responses import ResponsesRequest
from deployments.protocol.scoring import RerankRequest, ScoreRequest
from deployments.protocol.tokens import DetokenizeRequest, TokenizeRequest
from tests.deployments.nested_parameters import Field, fields_of
from tests.serving import ROOT

PAGE = ROOT / "docs" / "parameters.md"

HEAD = """# Parameters

What becomes of every parameter that the types of OpenAI's and Anthropic's Python clients know, and of those
that vLLM's server takes beside them. `tests/deployments/test_parameters.py` compares this page with the
installed clients.

- **works**: it does what the API says, or says which of its values can't be had.
- **refused**: 400 with the code `unsupported_parameter` and the parameter's name. Null, false, 0 and empty
  values are taken, since they ask for nothing, and so is the default where it is none of these.
- **no effect**: it is taken and no answer depends on it, for the reason given.

Fields within parameters have tables of their own: `[]` stands for an entry of a list, `<...>` for the `type`
or the `role` of an object. Anthropic's blocks within blocks take what blocks take.
"""

#: What becomes of fields within parameters, by a part of their paths and all below it: the first part that is
#: found counts. All others work.
NESTED: Mapping[str, tuple[str, str]] = {
    "<user>.content[]<thinking>": ("refused", "only assistants think"),
    "<user>.content[]<redacted_thinking>": ("refused", "only assistants think"),
    "<user>.content[]<tool_use>": ("refused", "only assistants call functions"),
    "<assistant>.content[]<tool_result>": ("refused", "only users bring results"),
    "<assistant>.content[]<image>": ("refused", "only users show images"),
    "<assistant>.content[]<document>": ("refused", "only users show documents"),
    ".cache_control": ("no effect", "every prompt is cached"),
    "<text>.citations": ("no effect", "models are not shown citations"),
    ".citations.enabled": ("refused", "answers cite no sources"),
    ".transformations": ("no effect", "images are resized as the model wants them"),
    "<text>.media_type": ("no effect", "it is plain text"),
    ".toolset_name": ("no effect", "functions have no toolsets"),
    "<tool_use>.caller": ("no effect", "only clients call functions"),
    "<thinking>.signature": ("no effect", "nothing checks it"),
    "<redacted_thinking>.data": ("no effect", "nobody here can read it"),
    ".defer_loading": ("no effect", "tools are always shown"),
    "tools[].eager_input_streaming": ("no effect", "arguments are always streamed"),
    ".allowed_callers": ("no effect", "only clients call functions"),
    "<input_audio>": ("refused", "there is no audio"),
    "<assistant>.audio": ("refused", "there is no audio"),
    ".prompt_cache_breakpoint": ("no effect", "every prompt is cached"),
    ".annotations": ("no effect", "models are not shown citations"),
    "<output_text>.logprobs": ("no effect", "models are not shown log-probabilities"),
    ".include_obfuscation": ("no effect", "events are not padded"),
    "json_schema.description": ("no effect", "models are not shown the schema"),
    "<json_schema>.description": ("no effect", "models are not shown the schema"),
    ".file_id": ("refused", "files are not kept here"),
    "reasoning.context": ("no effect", "thoughts come whole"),
    "reasoning.generate_summary": ("no effect", "thoughts come whole"),
    "reasoning.mode": ("no effect", "thoughts come whole"),
    "reasoning.summary": ("no effect", "thoughts come whole"),
    "<message>.id": ("no effect", "items are known by their place"),
    "<message>.status": ("no effect", "items are taken as they are"),
    "<message>.phase": ("no effect", "models are not shown it"),
    "<reasoning>.id": ("no effect", "items are known by their place"),
    "<reasoning>.status": ("no effect", "items are taken as they are"),
    "<reasoning>.encrypted_content": ("no effect", "nothing is encrypted here"),
    "<function_call>.id": ("no effect", "items are known by their place"),
    "<function_call>.status": ("no effect", "items are taken as they are"),
    "<function_call>.async": ("no effect", "items are taken as they are"),
    "<function_call>.caller": ("no effect", "only models call functions"),
    "<custom_tool_call>.id": ("no effect", "items are known by their place"),
    ".output_schema": ("no effect", "models are not shown it"),
    "<function>.async": ("no effect", "a result may come with any later request"),
    "<custom>.async": ("no effect", "a result may come with any later request"),
    "<custom_tool_call>.status": ("no effect", "items are taken as they are"),
    "<custom_tool_call_output>.status": ("no effect", "items are taken as they are"),
    "<custom_tool_call>.async": ("no effect", "items are taken as they are"),
    "<custom_tool_call>.caller": ("no effect", "only models call functions"),
    "<custom_tool_call_output>.id": ("no effect", "items are known by their place"),
    "<custom_tool_call_output>.caller": ("no effect", "only models call functions"),
    "<function_call_output>.id": ("no effect", "items are known by their place"),
    "<function_call_output>.name": ("no effect", "the call has the name"),
    "<function_call_output>.status": ("no effect", "items are taken as they are"),
    "<function_call_output>.caller": ("no effect", "only models call functions"),
    "<function_call_output>.namespace": ("no effect", "the call has it"),
    "<namespace>.description": ("no effect", "models are shown those of the functions"),
    "input[].id": ("refused", "send the items themselves"),
}

#: Kinds of objects that work; objects of all others are refused by their ``type``.
KINDS: Mapping[str, tuple[str, ...]] = {
    "/v1/responses": (
        "message",
        "input_text",
        "input_image",
        "input_file",
        "output_text",
        "refusal",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "custom",
        "grammar",
        "reasoning",
        "summary_text",
        "reasoning_text",
        "function",
        "namespace",
        "json_schema",
        "json_object",
        "text",
        "allowed_tools",
        "file_citation",
        "url_citation",
        "container_file_citation",
        "file_path",
    ),
    "/v1/decisions": (
        "user",
        "developer",
        "system",
        "assistant",
        "message",
        "input_text",
        "input_image",
        "input_json",
        "output_text",
        "refusal",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "predicate",
        "choice",
        "score",
    ),
    "/v1/messages": (
        "user",
        "assistant",
        "system",
        "text",
        "image",
        "document",
        "search_result",
        "thinking",
        "redacted_thinking",
        "tool_use",
        "tool_result",
        "base64",
        "url",
        "content",
        "enabled",
        "disabled",
        "adaptive",
        "ephemeral",
        "json_schema",
        "object",
        "auto",
        "any",
        "tool",
        "none",
    ),
}

#: What a parameter that works can't do.
LIMITS: Mapping[str, Mapping[str, str]] = {
    "/v1/chat/completions": {
        "modalities": "only `text`",
        "response_format": "numbers have at most 20 digits in a row; dates and times are those of RFC 3339, "
        "seconds with at most 9 digits behind the point; a number with bounds has no exponent "
        "(llguidance 1.9.1); an integer of `const` or `enum` that a double does not hold is refused",
        "service_tier": "echoed; there is one tier",
        "tools": "functions and `custom`, whose input is free or follows a regex; numbers of a call have at "
        "most 20 digits in a row",
        "verbosity": "only `medium`",
    },
    "/v1/responses": {
        "include": "`message.output_text.logprobs`; nothing of the other kinds is in an answer",
        "reasoning": "`effort`; thoughts come whole, without a summary",
        "service_tier": "echoed; there is one tier",
        "text": "`format`; of `verbosity` only `medium`",
        "tools": "functions and `custom`, whose input is free or follows a regex; numbers of a call have at "
        "most 20 digits in a row",
        "truncation": "with `auto` too, a conversation that is too long is refused, never cut",
    },
    "/v1/decisions": {
        "input": "the last message, if it is the user's, gets the question at its end",
        "questions": "each choice is named by one token: a letter, or of more than 26 two letters, as far as "
        "the tokenizer has them; images of questions count with those of the input",
    },
    "/v1/messages": {
        "max_tokens": "more than the context has room for is cut to what is left",
        "thinking": "off unless it is asked for",
        "tools": "the client's own",
    },
}

_CHATS = "/v1/chat/completions"

#: The release of vLLM whose server takes these parameters.
VLLM_VERSION = "0.33.0"

#: What vLLM's server takes beside the parameters of OpenAI's types, by endpoint.
VLLM: Mapping[str, str] = {
    "/v1/chat/completions": """add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt
        chat_template chat_template_kwargs continue_final_message documents
        ec_transfer_params echo ignore_eos include_reasoning include_stop_str_in_output
        kv_transfer_params length_penalty logprob_token_ids media_io_kwargs min_p min_tokens
        mm_payload mm_processor_kwargs priority prompt_logprobs repetition_detection
        repetition_penalty request_id return_mm_kwargs return_prompt_text return_token_ids
        return_token_offsets return_tokens_as_token_ids return_weight_versions
        routed_experts_prompt_start session_id skip_special_tokens
        spaces_between_special_tokens stop_token_ids stream_interval structured_outputs
        thinking_token_budget top_k truncate_prompt_tokens truncation_side use_beam_search
        vllm_xargs watermarking""",
    "/v1/responses": """cache_salt chat_template_kwargs ec_transfer_params enable_response_messages
        frequency_penalty ignore_eos include_reasoning include_stop_str_in_output
        kv_transfer_params logit_bias media_io_kwargs min_p mm_payload mm_processor_kwargs
        presence_penalty previous_input_messages priority repetition_penalty request_id
        return_mm_kwargs seed session_id skip_special_tokens spaces_between_special_tokens
        stop stop_token_ids structured_outputs top_k vllm_xargs watermarking""",
    "/v1/completions": """add_special_tokens allowed_token_ids bad_words cache_salt ec_transfer_params
        ignore_eos include_stop_str_in_output kv_transfer_params length_penalty
        logprob_token_ids min_p min_tokens mm_payload priority prompt_embeds prompt_logprobs
        repetition_detection repetition_penalty request_id response_format return_mm_kwargs
        return_token_ids return_token_offsets return_tokens_as_token_ids
        return_weight_versions routed_experts_prompt_start session_id skip_special_tokens
        spaces_between_special_tokens stop_token_ids stream_interval structured_outputs
        thinking_token_budget top_k truncate_prompt_tokens truncation_side use_beam_search
        vllm_xargs watermarking""",
    "/v1/embeddings": """add_generation_prompt add_special_tokens cache_salt chat_template
        chat_template_kwargs continue_final_message embed_dtype endianness media_io_kwargs
        messages mm_processor_kwargs padding priority request_id truncate_prompt_tokens
        truncation_side use_activation""",
    "/v1/messages": """cache_salt chat_template_kwargs ec_transfer_params kv_transfer_params mm_payload
        return_mm_kwargs temperature top_k top_p vllm_xargs watermarking""",
    "/v1/decisions": "cache_salt joint",
    "/pooling": """add_generation_prompt add_special_tokens cache_salt chat_template
        chat_template_kwargs continue_final_message dimensions embed_dtype encoding_format
        endianness input media_io_kwargs messages mm_processor_kwargs model padding priority
        request_id task truncate_prompt_tokens truncation_side use_activation user""",
    "/v1/score": """cache_salt chat_template_kwargs data_1 data_2 documents instruction items
        max_tokens_per_doc max_tokens_per_query mm_processor_kwargs model padding priority
        queries request_id text_1 text_2 truncate_prompt_tokens truncation_side
        use_activation user""",
    "/v1/rerank": """cache_salt chat_template_kwargs documents instruction max_tokens_per_doc
        max_tokens_per_query mm_processor_kwargs model padding priority query request_id
        top_n truncate_prompt_tokens truncation_side use_activation user""",
    "/tokenize": """add_generation_prompt add_special_tokens chat_template chat_template_kwargs
        continue_final_message media_io_kwargs messages mm_processor_kwargs model prompt
        return_token_strs tools""",
    "/detokenize": "model tokens",
}

#: What SGLang's and llama.cpp's servers, and those of models that think, take beside all these in a chat.
ELSEWHERE = """custom_logit_processor dry_multiplier dynatemp_range ebnf enable_thinking grammar
    guided_whitespace_pattern json_schema lora_path mirostat no_stop_trim regex return_hidden_states rid
    separate_reasoning stop_regex stream_reasoning top_n_sigma typical_p"""

#: What a parameter of vLLM's that works can't do.
VLLM_LIMITS: Mapping[str, Mapping[str, str]] = {
    "/v1/chat/completions": {"structured_outputs": "without `structural_tag` and `whitespace_pattern`"},
    "/v1/responses": {"structured_outputs": "without `structural_tag` and `whitespace_pattern`"},
    "/v1/completions": {"structured_outputs": "without `structural_tag` and `whitespace_pattern`"},
    "/v1/embeddings": {
        "add_special_tokens": "of `input`",
        "embed_dtype": "`float32`, `float16` or `bfloat16`, in base64",
        "endianness": "in base64",
        "truncate_prompt_tokens": "of `input`",
        "use_activation": "the same as `normalize`",
    },
    "/pooling": {
        "add_special_tokens": "of `input`",
        "embed_dtype": "`float32`, `float16` or `bfloat16`, in base64",
        "endianness": "in base64",
        "task": "`token_embed` or `embed`",
        "truncate_prompt_tokens": "of `input`",
        "use_activation": "the same as `normalize`",
    },
    "/v1/score": {
        "max_tokens_per_doc": "of documents that are a text",
        "max_tokens_per_query": "of queries that are a text",
        "use_activation": "only true",
    },
    "/v1/rerank": {
        "max_tokens_per_doc": "of documents that are a text",
        "max_tokens_per_query": "of a query that is a text",
        "use_activation": "only true",
    },
    "/tokenize": {"add_special_tokens": "of `prompt`"},
}


#: Path of a field of a block within another block.
_BLOCK_IN_BLOCK = re.compile(r"content\[\]<.*\.content\b.*[.<]")


@dataclass(frozen=True)
class Parameters:
    """The parameters of one endpoint, as a client's types know them."""

    client: str
    path: str
    types: tuple[Any, ...]
    body: type[RequestBody]

    @property
    def names(self) -> list[str]:
        return sorted({name for each in self.types for name in each.__annotations__})

    def nested(self) -> dict[str, Field]:
        """The fields within the parameters that work, by their paths."""
        found: dict[str, Field] = {}
        for each in self.types:
            for name, hint in get_type_hints(each, include_extras=True).items():
                if self.state(name) == "works":
                    found |= {field.path: field for field in fields_of(hint, name) if field.path not in found}
        if self.client == "anthropic":
            return {path: field for path, field in found.items() if not _BLOCK_IN_BLOCK.search(path)}
        return found

    def treatment(self, path: str) -> tuple[str, str, str]:
        """Treatment of a field within a parameter: the part of its path that decides, state and reason."""
        kinds = KINDS.get(self.path)
        # Neither callers of calls nor citations are looked at, of whatever kind.
        for found in (
            re.finditer(r"(?<!caller)(?<!citations\[\])<([^>]*)>", path) if kinds is not None else ()
        ):
            if found[1] not in kinds:
                return path[: found.end()], "refused", "this kind is not offered"
        for part, (state, note) in NESTED.items():
            before, at, rest = path.partition(part)
            if at and (part.endswith(">") or rest[:1] in ("", ".", "[", "<")):
                return before + at, state, note
        return path, "works", ""

    def state(self, name: str) -> str | None:
        """Treatment of a parameter; None if nobody has decided."""
        return state_of(self.body, name)

    def note(self, name: str) -> str:
        return note_of(self.body, name, LIMITS.get(self.path, {}))


def state_of(body: type[RequestBody], name: str) -> str | None:
    """Treatment of a parameter; None if nobody has decided."""
    if name in body.REFUSED:
        return "refused"
    if name in body.SILENT:
        return "no effect"
    return "works" if name in known_fields(body) else None


def note_of(body: type[RequestBody], name: str, limits: Mapping[str, str]) -> str:
    """Why a parameter is treated so."""
    notes = {"refused": body.REFUSED, "no effect": body.SILENT}
    return notes.get(state_of(body, name) or "", limits).get(name, "")


_CHAT = openai.types.chat.completion_create_params
_RESPONSES = openai.types.responses.response_create_params
_COMPLETIONS = openai.types.completion_create_params
_MESSAGES = anthropic.types.message_create_params

ENDPOINTS = [
    Parameters(
        "openai",
        "/v1/chat/completions",
        (_CHAT.CompletionCreateParamsNonStreaming, _CHAT.CompletionCreateParamsStreaming),
        ChatCompletionRequest,
    ),
    Parameters(
        "openai",
        "/v1/responses",
        (_RESPONSES.ResponseCreateParamsNonStreaming, _RESPONSES.ResponseCreateParamsStreaming),
        ResponsesRequest,
    ),
    Parameters(
        "openai",
        "/v1/completions",
        (_COMPLETIONS.CompletionCreateParamsNonStreaming, _COMPLETIONS.CompletionCreateParamsStreaming),
        CompletionRequest,
    ),
    Parameters(
        "openai",
        "/v1/embeddings",
        (openai.types.embedding_create_params.EmbeddingCreateParams,),
        EmbeddingRequest,
    ),
    Parameters(
        "openai",
        "/v1/decisions",
        (openai.types.decision_create_params.DecisionCreateParams,),
        DecisionRequest,
    ),
    Parameters(
        "anthropic",
        "/v1/messages",
        (_MESSAGES.MessageCreateParamsNonStreaming, _MESSAGES.MessageCreateParamsStreaming),
        MessagesRequest,
    ),
]


#: Bodies of the endpoints that neither OpenAI's nor Anthropic's client knows.
OTHERS: Mapping[str, type[RequestBody]] = {
    "/pooling": PoolingRequest,
    "/v1/score": ScoreRequest,
    "/v1/rerank": RerankRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}

BODIES: Mapping[str, type[RequestBody]] = {**{each.path: each.body for each in ENDPOINTS}, **OTHERS}


def beyond() -> list[tuple[str, str, str | None]]:
    """Endpoint, name and treatment of each parameter that other servers take beside those of the clients."""
    named = [(path, name) for path, names in VLLM.items() for name in names.split()]
    named += [(_CHATS, name) for name in ELSEWHERE.split()]
    return [(path, name, state_of(BODIES[path], name)) for path, name in named]


def page() -> str:
    """The whole page."""
    sections = "".join(_section(each) + _beyond(each.path) for each in ENDPOINTS)
    return HEAD + sections + "".join(f"\n## {path}\n{_beyond(path)}" for path in OTHERS)


def _beyond(path: str) -> str:
    beside = "" if path in OTHERS else " beside them"
    table = f"\nvLLM {VLLM_VERSION} takes{beside}:\n\n{_rows(path, VLLM[path])}"
    if path == _CHATS:
        table += f"\nOf the fields of other servers:\n\n{_rows(path, ELSEWHERE)}"
    return table


def _rows(path: str, names: str) -> str:
    body, limits = BODIES[path], VLLM_LIMITS.get(path, {})
    rows = "".join(
        f"| `{name}` | {state_of(body, name)} | {note_of(body, name, limits)} |\n" for name in names.split()
    )
    return f"| parameter | here | note |\n|---|---|---|\n{rows}"


def _section(given: Parameters) -> str:
    version = {"openai": openai.__version__, "anthropic": anthropic.__version__}[given.client]
    rows = "".join(f"| `{name}` | {given.state(name)} | {given.note(name)} |\n" for name in given.names)
    head = f"\n## {given.path}\n\nAs {given.client} {version} knows it.\n\n"
    return f"{head}| parameter | here | note |\n|---|---|---|\n{rows}" + _within(given)


def _within(given: Parameters) -> str:
    """The table of fields within parameters."""
    rows = dict.fromkeys(map(given.treatment, given.nested()))
    lines = "".join(f"| `{path}` | {state} | {note} |\n" for path, state, note in rows)
    return f"\n| field within | here | note |\n|---|---|---|\n{lines}" if lines else ""


def undecided() -> Iterator[str]:
    """Parameters that would be ignored in silence."""
    for each in ENDPOINTS:
        yield from (f"{each.path}: {name}" for name in each.names if each.state(name) is None)
    yield from (f"{path}: {name}" for path, name, state in beyond() if state is None)


if __name__ == "__main__":
    PAGE.write_text(page())
