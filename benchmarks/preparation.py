"""Images per second through preprocessors, beside the image processors of Transformers.

    python -m benchmarks.preparation [--replicas 1,2,4,8,16] [--sizes 560x560,1920x1080,4000x3000]
                                     [--seconds 3] [--json FILE]

Each replica is a process that holds one preprocessor stage and prepares one image at a time, from a JPEG as
a data URL to the array for the encoder, content hash included. Transformers opens the same JPEGs with PIL;
its processor also normalises and cuts patches, which the encoder does here on its device. ``fast`` is its
default processor and needs torchvision, ``pil`` the other one. Every process computes with one thread. Rows
with more processes than cores say what happens then, not how the work scales.

The pixels are compared first: with those of ``pil`` byte by byte; ``fast`` rounds differently. ``copies`` is
the memory of bytes and arrays that one preparation takes at most, in units of the prepared pixels: each copy
of the pixels that Pillow has resized adds 1. A replica behind Ray copies them once more, into the object
store.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import importlib.util
import io
import json
import multiprocessing
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.pictures import unique_picture
from benchmarks.shapes import write_checkpoint

SHAPE = "qwen2-vl-2b"
#: JPEGs of each size.
DIFFERENT = 4
Prepare = Callable[[bytes], Any]


def jpegs(size: tuple[int, int]) -> list[bytes]:
    """Different photographs' worth of detail, at quality 90."""
    files = []
    for seed in range(DIFFERENT):
        file = io.BytesIO()
        unique_picture(max(size), seed).crop((0, 0, *size)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def stage(path: str) -> Prepare:
    """Prepares by the preprocessor stage."""
    from deployments.preprocessor import Preprocessor
    from deployments.stage_config import PreprocessorConfig
    from engine.config import EngineConfig
    from engine.media.decode import ImageLimits
    from engine.media.guard import FetchPolicy
    from engine.media.source import MediaSource
    from engine.media.video.limits import VideoLimits

    config, engine = PreprocessorConfig(threads=1), EngineConfig(model=path)
    preprocessor = Preprocessor(config, engine, FetchPolicy(), ImageLimits(), VideoLimits())
    loop = asyncio.new_event_loop()

    def prepare(file: bytes) -> np.ndarray:
        url = "data:image/jpeg;base64," + base64.b64encode(file).decode()
        (media,) = loop.run_until_complete(preprocessor.prepare([MediaSource(0, "image", url=url)]))
        return media.pixels

    return prepare


def transformers_processor(path: str, kind: str) -> Prepare:
    """Prepares by a processor of Transformers; gives its pixel values and grid."""
    import torch
    import transformers

    torch.set_num_threads(1)
    names = {"fast": "Qwen2VLImageProcessor", "pil": "Qwen2VLImageProcessorPil"}
    processor = getattr(transformers, names[kind]).from_pretrained(path)

    def prepare(file: bytes) -> Any:
        with Image.open(io.BytesIO(file)) as image:
            found = processor(images=image.convert("RGB"), return_tensors="pt")
        return found["pixel_values"].numpy(), found["image_grid_thw"][0].tolist()

    return prepare


def kinds() -> list[str]:
    """The processors of Transformers that can be used here."""
    return ["fast", "pil"] if importlib.util.find_spec("torchvision") is not None else ["pil"]


def load(path: str, kind: str) -> Prepare:
    return stage(path) if kind == "stage" else transformers_processor(path, kind)


def pixels_of(values: np.ndarray, grid: list[int], config: dict[str, Any]) -> np.ndarray:
    """The uint8 ``(height, width, 3)`` that normalised patches stand for."""
    (_, h, w), merge, patch = grid, config["merge_size"], config["patch_size"]
    blocks = values.reshape(
        h // merge, w // merge, merge, merge, 3, config["temporal_patch_size"], patch, patch
    )
    blocks = blocks[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4)
    image = blocks.reshape(h * patch, w * patch, 3)
    return np.rint((image * config["image_std"] + config["image_mean"]) * 255).astype(np.uint8)


def compare(path: str, files: list[bytes], kind: str) -> float:
    """Share of the bytes that differ from those that Transformers' processor is given to normalise."""
    config = json.loads((Path(path) / "preprocessor_config.json").read_text())
    ours, theirs = stage(path), transformers_processor(path, kind)
    different = total = 0
    for file in files:
        pixels, other = ours(file), pixels_of(*theirs(file), config)
        assert pixels.shape == other.shape, f"{pixels.shape} differs from {other.shape}"
        different += int((pixels != other).sum())
        total += pixels.size
    return different / total


def copies(path: str, files: list[bytes]) -> float:
    """Most memory of bytes and arrays that preparing an opened image takes, in units of its pixels."""
    from engine.config import EngineConfig
    from engine.model_parts import load_media_processor

    processor = load_media_processor(EngineConfig(model=path))
    assert processor is not None
    most = 0.0
    for file in files:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        tracemalloc.start()
        pixels = processor.prepare(image).pixels
        most = max(most, tracemalloc.get_traced_memory()[1] / pixels.nbytes)
        tracemalloc.stop()
    return most


def work(path: str, commands: Connection) -> None:
    """A process: prepares images in rounds, as it is told."""
    loaded: dict[str, Prepare] = {}
    while (command := commands.recv()) is not None:
        kind, size, begin, seconds = command
        files = jpegs(size)
        prepare = loaded.get(kind) or loaded.setdefault(kind, load(path, kind))
        prepare(files[0])
        commands.send("ready")
        begin = commands.recv()
        time.sleep(max(0.0, begin - time.time()))
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            prepare(files[count % len(files)])
            count += 1
        commands.send(count / (time.perf_counter() - began))


class Crew:
    """Processes that work side by side.

    Args:
        path: the checkpoint.
        count: how many there are.
    """

    def __init__(self, path: str, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Any] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(path, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def rate(self, kind: str, size: tuple[int, int], count: int, seconds: float) -> float:
        """Images per second of ``count`` processes together."""
        pipes = self._pipes[:count]
        for pipe in pipes:
            pipe.send((kind, size, 0.0, seconds))
        for pipe in pipes:
            pipe.recv()
        begin = time.time() + 0.1
        for pipe in pipes:
            pipe.send(begin)
        return sum(pipe.recv() for pipe in pipes)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()


@contextmanager
def crew(path: str, count: int) -> Iterator[Crew]:
    """A crew that ends with the block."""
    made = Crew(path, count)
    try:
        yield made
    finally:
        made.close()


def measure(
    path: str, size: tuple[int, int], replicas: list[int], seconds: float, crew: Crew
) -> dict[str, Any]:
    """All figures of one size of image."""
    files = jpegs(size)
    row: dict[str, Any] = {"size": f"{size[0]}x{size[1]}"}
    for kind in kinds():
        row[f"differ from {kind}"] = compare(path, files[:2], kind)
    row["copies"] = copies(path, files[:2])
    for count in replicas:
        row[f"stage {count}"] = crew.rate("stage", size, count, seconds)
    for kind in kinds():
        for count in sorted({1, max(replicas)}):
            row[f"{kind} {count}"] = crew.rate(kind, size, count, seconds)
    return row


def report(row: dict[str, Any], replicas: list[int], cores: int) -> None:
    """Print the figures of one size, and what follows from them."""
    print(f"\n{row['size']}: copies of the pixels: {row['copies']:.2f}")
    for count in replicas:
        rate = row[f"stage {count}"]
        beyond = "" if count <= cores else f"   (more than the {cores} cores)"
        linear = rate / (count * row["stage 1"])
        print(f"  {count:2} replicas {rate:9.1f} images/s   {linear:6.1%} of linear{beyond}")
    for kind in kinds():
        print(f"  {row[f'differ from {kind}']:.2%} of the bytes differ from those of Transformers' {kind}")
        for count in sorted({1, max(replicas)}):
            rate = row[f"{kind} {count}"]
            faster = row[f"stage {count}"] / rate
            print(f"  {kind:4} in {count:2} processes {rate:9.1f} images/s, {faster:.2f} times as many here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--replicas", default="1,2,4,8,16")
    parser.add_argument("--sizes", default="560x560,1920x1080,4000x3000")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Before torch is loaded, here and in the processes.
    os.environ["OMP_NUM_THREADS"] = "1"
    replicas = sorted({int(count) for count in options.replicas.split(",")} | {1})
    cores, rows = len(os.sched_getaffinity(0)), []
    print(f"{cores} cores; up to {max(replicas)} replicas; load before: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_checkpoint(SHAPE, Path(folder)))
        with crew(path, max(replicas)) as workers:
            for size in options.sizes.split(","):
                width, height = map(int, size.split("x"))
                rows.append(measure(path, (width, height), replicas, options.seconds, workers))
                report(rows[-1], replicas, cores)
    if options.json:
        options.json.write_text(json.dumps({"cores": cores, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
