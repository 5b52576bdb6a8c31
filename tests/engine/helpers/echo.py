"""A helper process that does what its messages say."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from engine.helpers.child import limit_memory, serve
from engine.helpers.files import written


def answer(message, files):
    if "refuse" in message:
        return {"error": message["refuse"]}, []
    if "crash" in message:
        raise RuntimeError
    if "sleep" in message:
        time.sleep(message["sleep"])
    if "memory" in message:
        limit_memory(64 << 20)
        bytearray(message["memory"])
    if files:
        with os.fdopen(files[0], "rb") as file:
            return {"size": os.fstat(file.fileno()).st_size}, [written([file.read()[::-1]])]
    return message, []


if __name__ == "__main__":
    serve(answer, stack_bytes=1 << 20)
