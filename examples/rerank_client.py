"""Ask a running server which pictures meet a query best.

    python examples/rerank_client.py [--model NAME] ["A red square."] [PICTURE ...]

NAME must be a model that is served with task: embed, such as pocket-embed, which serve_config.yaml has in a
comment; or a reranker served with task: score.
"""

import argparse

import requests
from chat_client import as_url, drawn, faults
from pictures import green_triangle, red_square


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("query", nargs="?", default="A red square.")
    parser.add_argument("images", nargs="*")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="pocket-embed")
    parser.add_argument("--instruction", help="what a document must do to meet the query")
    options = parser.parse_args()

    urls = [as_url(picture) for picture in options.images] or [drawn(green_triangle()), drawn(red_square())]
    with faults(parser, options.base_url):
        response = requests.post(
            f"{options.base_url}/rerank",
            json={
                "model": options.model,
                "query": options.query,
                "documents": [{"image": url} for url in urls],
                "instruction": options.instruction,
                "return_documents": False,
            },
            timeout=60,
        )
    if not response.ok:
        parser.error(response.json()["error"]["message"])
    for result in response.json()["results"]:
        print(f"picture {result['index'] + 1}: {result['relevance_score']:.3f}")


if __name__ == "__main__":
    main()
