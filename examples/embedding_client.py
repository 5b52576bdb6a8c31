"""Ask a running server for the vector of an image with a text.

    python examples/embedding_client.py [--model NAME] ["Represent the given image."] [IMAGE ...]

The request's form is not OpenAI's own (that one has no images), so it is posted as plain JSON. NAME must be
a model that is served with task: embed, such as pocket-embed, which serve_config.yaml has in a comment.
"""

import argparse

import requests
from chat_client import as_url, drawn, faults
from pictures import two_shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text", nargs="?", default="Represent the given image.")
    parser.add_argument("images", nargs="*")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="pocket-embed")
    options = parser.parse_args()

    urls = [as_url(picture) for picture in options.images] or [drawn(two_shapes())]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": options.text})
    with faults(parser, options.base_url):
        response = requests.post(
            f"{options.base_url}/embeddings",
            json={
                "model": options.model,
                "messages": [{"role": "user", "content": content}],
                "encoding_format": "float",
            },
            timeout=60,
        )
    if not response.ok:
        parser.error(response.json()["error"]["message"])
    print("Embedding output:", response.json()["data"][0]["embedding"][:8], "...")


if __name__ == "__main__":
    main()
