"""Ask a running server about an image, and print the answer as it comes.

    python examples/chat_client.py "What is in this image?" [IMAGE ...]

An image is a file or a URL. Without one, a red circle beside a blue square is drawn.
"""

import argparse
import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import APIConnectionError, OpenAI, OpenAIError
from pictures import two_shapes
from PIL import Image


def as_url(picture: str) -> str:
    """A URL as it is, a file as a data URL."""
    if "://" in picture:
        return picture
    data = base64.b64encode(Path(picture).read_bytes()).decode()
    kind = Path(picture).suffix.lstrip(".").lower().replace("jpg", "jpeg") or "png"
    return f"data:image/{kind};base64,{data}"


def drawn(picture: Image.Image) -> str:
    """The data URL of a drawing."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def faults(parser: argparse.ArgumentParser, base_url: str) -> Iterator[None]:
    """End the program with one line where the server refuses, or where none answers."""
    try:
        yield
    except (APIConnectionError, OSError):
        parser.error(f"no server answers at {base_url}; `make serve` starts one and says when it is ready")
    except OpenAIError as error:
        parser.error(str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("question", nargs="?", default="Describe this image.")
    parser.add_argument("images", nargs="*")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="pocket")
    options = parser.parse_args()

    urls = [as_url(picture) for picture in options.images] or [drawn(two_shapes())]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": options.question})
    client = OpenAI(base_url=options.base_url, api_key="EMPTY")
    with faults(parser, options.base_url):
        stream = client.chat.completions.create(
            model=options.model,
            messages=[{"role": "user", "content": content}],
            max_tokens=64,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            if chunk.usage:
                used = chunk.usage
                print(f"\n({used.prompt_tokens} tokens in, {used.completion_tokens} out)")


if __name__ == "__main__":
    main()
