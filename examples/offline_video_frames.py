"""Frames of a video as images of one message, in base64.

python examples/offline_video_frames.py [--model FOLDER]

pocket, which answers unless a folder is given, was never taught what a video is: its answer says little.
"""

import argparse
import base64
import io
from pathlib import Path

from pictures import moving_circle

from engine import LLM, SamplingParams

POCKET = Path(__file__).parent.parent / "models" / "pocket"


def encode_image(picture) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(POCKET))
    # The most frames in a prompt; more would be refused.
    llm = LLM(parser.parse_args().model, limit_mm_per_prompt={"image": 4})
    message = {
        "role": "user",
        "content": [
            {
                "type": "text",
                "text": "Describe this set of frames. Consider the frames to be a part of the same video.",
            },
        ],
    }
    for frame in moving_circle(4):
        url = f"data:image/jpeg;base64,{encode_image(frame)}"
        message["content"].append({"type": "image_url", "image_url": {"url": url}})
    outputs = llm.chat([message], SamplingParams(temperature=0, max_tokens=64))
    for o in outputs:
        print(o.outputs[0].text)


if __name__ == "__main__":
    main()
