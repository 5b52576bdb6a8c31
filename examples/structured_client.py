"""Let a served model describe an image as an object that follows a schema.

    python examples/structured_client.py "Describe this image." [IMAGE]

An image is a file or a URL. Without one, three green stars are drawn. The server must have pocket-tools:
serve_config.yaml has it in a comment.
"""

import argparse
from typing import Literal

from chat_client import as_url, drawn, faults
from openai import OpenAI
from pictures import three_stars
from pydantic import BaseModel

Color = Literal["red", "green", "blue", "yellow", "orange", "purple", "pink", "black"]


class Shapes(BaseModel):
    """Shapes of one kind. A grammar made of this class's schema guides every token of the answer."""

    color: Color
    shape: Literal["circle", "square", "triangle", "star", "diamond", "cross"]
    count: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("question", nargs="?", default="Describe this image.")
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
        completion = client.chat.completions.parse(
            model=options.model,
            messages=[{"role": "user", "content": content}],
            response_format=Shapes,
            temperature=0,
        )
    print(completion.choices[0].message.parsed)


if __name__ == "__main__":
    main()
