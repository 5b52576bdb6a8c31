"""Let a served model call a function about an image, and answer once it has the result.

    python examples/tool_client.py "Report what you see." [IMAGE]

An image is a file or a URL. Without one, three green stars are drawn. The server must have pocket-tools:
serve_config.yaml has it in a comment.
"""

import argparse
import json

from chat_client import as_url, drawn, faults
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam
from pictures import three_stars

REPORT = {
    "name": "report",
    "description": "Take down what an image shows.",
    "parameters": {
        "type": "object",
        "properties": {
            "color": {"type": "string"},
            "shape": {"type": "string"},
            "count": {"type": "integer"},
        },
        "required": ["color", "shape", "count"],
        "additionalProperties": False,
    },
}


def report(color: str, shape: str, count: int) -> str:
    """A tool that the model may call. A program would write to a database here."""
    print(f"report(color={color!r}, shape={shape!r}, count={count})")
    return "saved"


FUNCTIONS = {"report": report}


def answer(client: OpenAI, model: str, messages: list[ChatCompletionMessageParam], rounds: int = 5) -> str:
    """Ask, call what the model wants called, and ask again, until it answers in words."""
    for _ in range(rounds):
        completion = client.chat.completions.create(
            model=model, messages=messages, tools=[{"type": "function", "function": REPORT}], temperature=0
        )
        message = completion.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("question", nargs="?", default="Report what you see.")
    parser.add_argument("image", nargs="?")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="pocket-tools")
    options = parser.parse_args()

    url = as_url(options.image) if options.image else drawn(three_stars())
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": options.question},
    ]
    client = OpenAI(base_url=options.base_url, api_key="EMPTY")
    with faults(parser, options.base_url):
        print(answer(client, options.model, [{"role": "user", "content": content}]))


if __name__ == "__main__":
    main()
