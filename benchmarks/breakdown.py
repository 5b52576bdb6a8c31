"""Where the time of a served load goes: CPU time by process, the GPUs' busy shares, times of the stages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections import Counter
from typing import Any, Self

from benchmarks.processes import cpu_seconds

_SAMPLE = re.compile(r"^(sightline_\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_STAGE = re.compile(r'stage="(\w+)"')

#: Histograms of seconds whose means are shown, by the stage that their labels name.
_TIMES = (
    "sightline_stage_call_duration_seconds",
    "sightline_stage_request_duration_seconds",
    "sightline_engine_queue_time_seconds",
    "sightline_engine_time_to_first_token_seconds",
    "sightline_engine_time_between_tokens_seconds",
)
#: Prints ten times a second in how much of the time each GPU computed anything.
_GPU = ["nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]

_BATCHES = "sightline_stage_batch_size"


class Breakdown:
    """A block in which a load runs.

    Args:
        base_url: of the application.
    """

    def __init__(self, base_url: str) -> None:
        self._metrics_url = base_url.removesuffix("/v1") + "/metrics"

    def __enter__(self) -> Self:
        self._before = self._metrics()
        self._gpu: subprocess.Popen | None = None
        if shutil.which("nvidia-smi"):
            self._samples = tempfile.TemporaryFile("w+")
            # Not the GPUs that other work has.
            ours = [f"--id={ids}"] if (ids := os.environ.get("CUDA_VISIBLE_DEVICES")) else []
            self._gpu = subprocess.Popen([*_GPU, *ours], stdout=self._samples, stderr=subprocess.DEVNULL)
        self._cpu, self._began = cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self._began
        self.cpu = cpu_seconds() - self._cpu
        if self._gpu is not None:
            self._gpu.terminate()
            self._gpu.wait()
        self._gained = self._metrics() - self._before

    def lines(self) -> list[str]:
        """The breakdown in words."""
        cores = ", ".join(f"{name} {used / self.seconds:.2f}" for name, used in sorted(self.cpu.items()))
        found = [f"CPU cores: {cores}"]
        if self._gpu is not None:
            self._samples.seek(0)
            samples: dict[str, list[int]] = {}
            for index, busy in re.findall(r"^(\d+), (\d+)$", self._samples.read(), re.MULTILINE):
                samples.setdefault(index, []).append(int(busy))
            found.append(f"GPU busy: {', '.join(f'{sum(s) / len(s):.0f}' for s in samples.values())} %")
        times = []
        for name in (*_TIMES, _BATCHES):
            for stage in ("", "preprocessor", "encoder", "language_model"):
                count = self._gained[f"{name}_count", stage]
                if count > 0:
                    mean = self._gained[f"{name}_sum", stage] / count
                    value = f"{mean:.1f}" if name == _BATCHES else f"{mean * 1e3:.1f} ms"
                    short = name.removeprefix("sightline_").removesuffix("_seconds")
                    times.append(f"{short} {stage} {value}".replace("  ", " "))
        found.append("means: " + ", ".join(times))
        encoding = self._gained["sightline_encoder_busy_seconds_total", "encoder"]
        items = self._gained["sightline_encoder_items_total", "encoder"]
        found.append(f"encoder: {encoding:.2f} s busy, {items:.0f} images")
        return found

    def _metrics(self) -> Counter[tuple[str, str]]:
        """Samples by name and stage, the sum over all other labels."""
        found: Counter[tuple[str, str]] = Counter()
        with urllib.request.urlopen(self._metrics_url, timeout=10) as response:
            text = response.read().decode()
        for name, labels, value in _SAMPLE.findall(text):
            stage = _STAGE.search(labels)
            found[name, stage[1] if stage else ""] += float(value)
        return found
