"""Chat templates: finding a checkpoint's own, and rendering it without trusting it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.inputs.mistral_template import mistral_template
from engine.inputs.template_sandbox import LimitReached, Meter, RenderLimits, TemplateEnvironment

#: What a caller may never set through template options, beside the special tokens.
_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}
    | {"conversation", "tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length"}
    | {"raise_exception", "strftime_now", "namespace", "range", "dict"}
)
#: Ends a final message that is to be continued. Its space tells whether the template trims messages.
_CONTINUE = "\U0010fffd "


class ChatTemplate:
    """A compiled chat template. Rendering is thread-safe and bounded.

    Args:
        sources: Jinja text by name; ``default``, and optionally ``tool_use`` for requests with tools.
        variables: what every rendering sees: ``bos_token``, ``eos_token`` and their like.
        limits: bounds of one rendering.

    Raises:
        ConfigError: a template has a syntax error.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        variables: Mapping[str, str] | None = None,
        limits: RenderLimits | None = None,
    ) -> None:
        if "default" not in sources:
            raise ConfigError(
                f"none of the chat templates ({', '.join(sources)}) is the default", param="chat_template"
            )
        #: Jinja text by name.
        self.sources = dict(sources)
        self._environment = TemplateEnvironment(limits or RenderLimits())
        self._variables = dict(variables or {})
        try:
            self._templates = {name: self._environment.from_string(text) for name, text in sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template does not parse: line {error.lineno}: {error.message}",
                param="chat_template",
            ) from error
        for template in self._templates.values():
            # Each rendering copies them, and a ChainMap takes several times as long as a dict.
            template.globals = dict(template.globals)

    @classmethod
    def load(
        cls,
        model_path: str | Path,
        tokenizer_config: Mapping[str, Any],
        override: str | Path | None = None,
        default: str | None = None,
    ) -> ChatTemplate | None:
        """The template of a checkpoint folder; None if there is none.

        The first found counts: ``override``, ``chat_template.jinja``, ``chat_template.json``,
        tokenizer_config.json, ``default``, the template of the version that tekken.json states.

        Args:
            tokenizer_config: content of tokenizer_config.json; also the source of the special tokens.
            override: a file, or Jinja text itself.
            default: Jinja text that the model's family falls back on.

        Raises:
            ConfigError: the override is neither a file nor Jinja text, or a template does not parse.
            CheckpointError: chat_template.json or tekken.json is not readable.
        """
        sources = _sources(Path(model_path), tokenizer_config, override)
        if not sources:
            default = default or mistral_template(Path(model_path))
            sources = {"default": default} if default else {}
        return cls(sources, _special_tokens(tokenizer_config)) if sources else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation, as Transformers' ``apply_chat_template`` has it.

        Args:
            messages: plain JSON data, with content in a form that the template takes; see
                :class:`engine.inputs.content_form.ContentForms`.
            continue_final_message: the prompt ends within the last message, for the model to go on with it.
            options: variables for the template; those that it doesn't know change nothing.

        Raises:
            InvalidRequest: the template refuses the messages, a limit is reached, or an option is not
                allowed.
        """
        reserved = _RESERVED.union(self._variables).intersection(options or {})
        if reserved:
            raise InvalidRequest(
                f"{sorted(reserved)[0]!r} can't be set through template options.",
                param="chat_template_kwargs",
            )
        if continue_final_message:
            if add_generation_prompt:
                raise InvalidRequest(
                    "continue_final_message and add_generation_prompt exclude each other.",
                    param="continue_final_message",
                )
            messages = _tag_final_message(messages)
        variables = {
            **(options or {}),
            **self._variables,
            "messages": messages,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._bounded(variables)
        return _cut_at_tag(text) if continue_final_message else text

    def try_render(
        self,
        messages: Sequence[Mapping[str, Any]],
        meter: Meter,
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> str | None:
        """The prompt text of a probe; None if the template refuses it or ``meter`` is at its limit."""
        variables = {
            **self._variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._bounded(variables, meter)
        except InvalidRequest:
            return None

    def _bounded(self, variables: dict[str, Any], meter: Meter | None = None) -> str:
        name = "tool_use" if variables["tools"] and "tool_use" in self._templates else "default"
        parts: list[str] = []
        try:
            with self._environment.metered(meter) as counted:
                for part in self._templates[name].generate(variables):
                    counted.output(len(part))
                    parts.append(part)
        except LimitReached as error:
            raise InvalidRequest(
                f"Rendering the chat template took more than {error}.", param="messages"
            ) from None
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"The chat template refuses these messages: {str(error.message or error)[:500]}",
                param="messages",
            ) from error
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InvalidRequest(
                f"The chat template can't render these messages ({type(error).__name__}). It may want "
                "another order of roles or plain text content.",
                param="messages",
            ) from error
        return "".join(parts)


def _tag_final_message(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    final = dict(messages[-1])
    content: Any = final.get("content") or []
    if isinstance(content, str):
        final["content"] = content + _CONTINUE
        return [*messages[:-1], final]
    for place in range(len(content) - 1, -1, -1):
        if "text" in content[place]:
            part = {**content[place], "text": content[place]["text"] + _CONTINUE}
            final["content"] = [*content[:place], part, *content[place + 1 :]]
            return [*messages[:-1], final]
    raise InvalidRequest("The last message has no text to be continued.", param="continue_final_message")


def _cut_at_tag(text: str) -> str:
    place = text.rfind(_CONTINUE.strip())
    if place < 0:
        raise InvalidRequest(
            "The chat template drops the last message's text, so it can't be continued.",
            param="continue_final_message",
        )
    return text[:place] if text.startswith(_CONTINUE, place) else text[:place].rstrip()


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def _sources(
    folder: Path, tokenizer_config: Mapping[str, Any], override: str | Path | None
) -> dict[str, str]:
    if override is not None:
        return {"default": _override(override)}
    file = folder / "chat_template.jinja"
    if file.is_file():
        others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        return {"default": file.read_text("utf-8")} | {
            other.stem: other.read_text("utf-8") for other in others
        }
    given: Any = None
    file = folder / "chat_template.json"
    if file.is_file():
        try:
            given = json.loads(file.read_text("utf-8"))["chat_template"]
        except (ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{file.name} can't be read: {error}") from error
    given = given or tokenizer_config.get("chat_template")
    if isinstance(given, list):
        return {entry["name"]: entry["template"] for entry in given}
    return {"default": given} if given else {}


def _override(override: str | Path) -> str:
    if isinstance(override, str) and ("{%" in override or "{{" in override):
        return override
    file = Path(override).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"{str(override)!r} is neither a file nor the text of a Jinja template", param="chat_template"
        )
    return file.read_text("utf-8")
