"""Ask a served model whether statements about an image are true, and how sure it is.

    python examples/decision_client.py [--image IMAGE] ["Is there a red circle?" ...]

An image is a file or a URL. Without one, a red circle and a blue square are drawn. Without a question,
whether they are there is asked.
"""

import argparse

from chat_client import as_url, drawn
from openai import OpenAI
from pictures import two_shapes

QUESTIONS = ["Is there a red circle?", "Is there a blue square?", "Is there a triangle?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--image")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="pocket")
    options = parser.parse_args()

    url = as_url(options.image) if options.image else drawn(two_shapes())
    client = OpenAI(base_url=options.base_url, api_key="EMPTY")
    # The image is encoded once for all questions.
    decision = client.decisions.create(
        model=options.model,
        input=[{"role": "user", "content": [{"type": "input_image", "image_url": url}]}],
        questions=[{"type": "predicate", "instructions": question} for question in options.questions],
    )
    for question, answer in zip(options.questions, decision.answers, strict=True):
        print(f"{question} yes: {answer.probability:.1%}")


if __name__ == "__main__":
    main()
