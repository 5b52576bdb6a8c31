"""Several ranks give the tokens of one, and leave nothing behind, however they end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from engine import LLM, SamplingParams
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, RequestFailed, Unavailable
from engine.executor.launch import Launcher
from engine.loading import load_engine
from engine.outputs import RequestOutput
from engine.prompt import EngineInput
from engine.sampling_params import StructuredSpec
from tests.engine import tiny
from tests.engine.executor.threads import ThreadLauncher

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[3]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
CHOICES = ["a red square", "a blue circle", "nothing at all"]


@pytest.fixture(autouse=True)
def one_thread_per_rank(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def room_for_ranks(request):
    """On a machine with GPUs each rank needs one."""
    size = request.node.callspec.params.get("size", 2) if hasattr(request.node, "callspec") else 2
    if torch.cuda.is_available() and torch.cuda.device_count() < size:
        pytest.skip(f"{size} ranks need {size} GPUs")


@pytest.fixture(scope="module", autouse=True)
def own_temporary_folder(tmp_path_factory) -> Iterator[None]:
    """No other process makes folders there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """4 heads over 2 KV heads: with 4 ranks each KV head lives on two."""
    return tiny.make_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"), gqa_ratio=2, seed=3)


def ranks(parent: int | None = None) -> list[psutil.Process]:
    """The processes of other ranks that a process has started."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        # Any child may end meanwhile.
        with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            if "engine.executor.worker" in process.cmdline():
                found.append(process)
    return found


def meeting_places(folder: Path | None = None) -> list[Path]:
    """The folders where ranks meet: there are some only while there are ranks."""
    return list((folder or Path(tempfile.gettempdir())).glob("sightline-*"))


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive


def prompt(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def entry(text: str, *sizes: tuple[int, int]) -> dict:
    pictures = [tiny.picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    return {"prompt": prompt(text), **({"multi_modal_data": {"image": pictures}} if pictures else {})}


GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
WORK = {
    "one picture": (entry("describe this image " + IMAGE, (60, 44)), GREEDY),
    "three pictures": (
        entry(f"{IMAGE} red {IMAGE} blue {IMAGE}", (20, 20), (64, 40), (41, 83)),
        GREEDY,
    ),
    # Together they outgrow the blocks: one is interrupted and computed again.
    "two seeded answers": (
        entry("hello world"),
        SamplingParams(temperature=1.0, top_p=0.95, seed=5, n=2, max_tokens=60, ignore_eos=True),
    ),
    "penalties": (
        entry("what is shown " + IMAGE, (33, 70)),
        SamplingParams(temperature=0.0, repetition_penalty=1.4, presence_penalty=0.5, max_tokens=12),
    ),
    "log-probabilities": (
        entry("0 1 2 3 4 5 6 7 8 9 " * 3),
        SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1, max_tokens=5, ignore_eos=True),
    ),
    "choice": (
        entry("what is it? " + IMAGE, (30, 30)),
        SamplingParams(
            temperature=1.0,
            seed=1,
            max_tokens=30,
            structured=StructuredSpec(kind="choice", text=json.dumps(CHOICES)),
        ),
    ),
}


@dataclass
class Run:
    """The results of an engine for ``WORK``, and once more for its first entry."""

    outputs: dict[str, RequestOutput]
    again: RequestOutput
    preempted: int


def run(path: Path, size: int, launcher: Launcher | None = None) -> Run:
    llm = LLM(
        str(path),
        launcher=launcher,
        tensor_parallel_size=size,
        max_model_len=190,
        max_num_batched_tokens=17,
        block_size=4,
        num_kv_blocks=50,
    )
    separate = size > 1 and launcher is None
    assert len(ranks()) == (size - 1 if separate else 0)
    assert len(meeting_places()) == separate
    entries, params = zip(*WORK.values(), strict=True)
    outputs = llm.generate(list(entries), list(params), use_tqdm=False)
    (again,) = llm.generate(entries[0], params[0], use_tqdm=False)
    llm.check_integrity()
    return Run(dict(zip(WORK, outputs, strict=True)), again, llm.metrics()["preempted"])


@pytest.fixture(scope="module")
def alone(path) -> Run:
    return run(path, 1)


@pytest.mark.parametrize(("size", "launcher"), [(2, None), (4, ThreadLauncher)], ids=["processes", "threads"])
def test_ranks_together_give_the_tokens_of_one(path, alone, size, launcher):
    together = run(path, size, launcher and launcher())
    gc.collect()
    assert not ranks(), "collecting an LLM ends its ranks"
    assert not meeting_places()
    for name, wanted in alone.outputs.items():
        found = together.outputs[name]
        assert [o.token_ids for o in found.outputs] == [o.token_ids for o in wanted.outputs], name
    assert together.preempted > 0 and alone.preempted > 0
    assert together.again.usage.cached_tokens > 0
    assert together.again.outputs[0].token_ids == alone.outputs["one picture"].outputs[0].token_ids
    assert together.outputs["choice"].outputs[0].text in CHOICES
    one, other = (r.outputs["log-probabilities"].outputs[0].cumulative_logprob for r in (alone, together))
    assert one == pytest.approx(other, abs=1e-3)


def config(path: Path, **options) -> EngineConfig:
    options = {"tensor_parallel_size": 2, "max_model_len": 1000, "kv_cache_bytes": 8 << 20, **options}
    return EngineConfig(model=str(path), **options)


async def stream(engine: AsyncEngine, params: SamplingParams):
    ids = np.random.default_rng(0).integers(10, 300, 20).tolist()
    async for update in engine.generate("one", EngineInput(ids), params):
        yield update


@pytest.mark.parametrize("size", [2 if torch.cuda.is_available() else 4])
async def test_a_rank_that_dies_fails_what_runs_and_what_comes(path, size):
    engine = AsyncEngine(config(path, tensor_parallel_size=size))
    processes = ranks()
    updates = stream(engine, SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True))
    await anext(updates)
    processes[-1].kill()
    with pytest.raises(Unavailable, match=r"Rank . of the language model|A rank failed"):
        async for _ in updates:
            pass
    with pytest.raises(Unavailable):
        await anext(stream(engine, GREEDY))
    # The others were lost with it.
    assert_gone(processes)
    engine.shutdown()


async def test_a_rank_that_dies_is_noticed_while_nothing_runs(path):
    engine = AsyncEngine(config(path))
    (process,) = ranks()
    engine.check_health()
    died = threading.Event()
    engine.when_dead(died.set)
    process.kill()
    with pytest.raises(Unavailable, match="Rank 1 of the language model has died"):
        while True:
            engine.check_health()
            await asyncio.sleep(0.01)
    assert await asyncio.to_thread(died.wait, 60)
    engine.shutdown()
    assert not ranks()


async def test_a_request_that_raises_fails_alone_on_all_ranks(path, monkeypatch):
    engine = AsyncEngine(config(path), ThreadLauncher())
    own = engine._engine.core.runner._own

    async def tokens(key: str, ids: list[int]) -> list[int]:
        updates = engine.generate(key, EngineInput(ids), GREEDY)
        return [token async for update in updates for delta in update.deltas for token in delta.token_ids]

    wanted = await tokens("alone", [5, 6, 7])
    admit = own._admit

    def planted(request, slot, num_computed):
        admit(request, slot, num_computed)
        if request.id.startswith("bad"):
            raise ValueError("planted")

    monkeypatch.setattr(own, "_admit", planted)
    found = await asyncio.gather(
        tokens("good", [5, 6, 7]), tokens("bad", [8, 9]), tokens("other", [5, 6, 7]), return_exceptions=True
    )
    assert isinstance(found[1], RequestFailed)
    assert found[0] == found[2] == wanted
    engine.check_health()
    monkeypatch.undo()
    assert len(await tokens("bad", [8, 9])) == len(wanted)
    await asyncio.to_thread(engine.shutdown)


async def test_shutdown_ends_the_ranks(path):
    engine = AsyncEngine(config(path))
    (process,) = ranks()
    updates = stream(engine, SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True))
    await anext(updates)
    await asyncio.to_thread(engine.shutdown)
    assert not process.is_running()
    with pytest.raises(Unavailable, match="shutting down"):
        async for _ in updates:
            pass


SCRIPT = """
import sys
from engine import LLM, SamplingParams

llm = LLM(sys.argv[1], tensor_parallel_size=2, max_model_len=1000)
print("ready", flush=True)
params = SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)
while True:
    llm.generate("hello world", params, use_tqdm=False)
"""


# SIGTERM ends a script like SIGKILL: Python does nothing more.
@pytest.mark.parametrize(
    "how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.wide), signal.SIGKILL]
)
def test_ranks_end_with_their_engine_however_it_ends(path, how, tmp_path):
    """A plain script, without a guard around what it does. The folder where its ranks met goes with them."""
    command = [sys.executable, "-c", SCRIPT, str(path)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        # Shells start background jobs with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as script:
        try:
            assert script.stdout is not None and script.stdout.readline() == b"ready\n"
            processes = ranks(script.pid)
            assert len(processes) == 1 and len(meeting_places(tmp_path)) == 1
            script.send_signal(how)
            assert script.wait(60) != 0
        finally:
            script.kill()
    assert_gone(processes)
    assert not meeting_places(tmp_path)


def test_a_script_that_comes_to_its_end_ends_quietly(path):
    """Captured steps hold memory too, which must be freed in the right order."""
    script = SCRIPT[: SCRIPT.index("while")].replace("900", "40")
    script += 'print(llm.generate("hello world", params, use_tqdm=False))'
    command = [sys.executable, "-c", script, str(path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and "RequestOutput" in ended.stdout
    assert "Traceback" not in ended.stderr and "terminate" not in ended.stderr, ended.stderr


def test_sizes_that_do_not_fit_are_refused_before_anything_starts(path):
    for size in (3, 8):
        with pytest.raises(ConfigError, match=r"can be split over 1, 2, 4 ranks") as error:
            LLM(str(path), tensor_parallel_size=size)
        assert error.value.param == "tensor_parallel_size"
    assert not ranks()


class SpoilingLauncher(ThreadLauncher):
    """Takes a file away that this process has read, but the others have not."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def start(self, size):
        self.file.unlink()
        return super().start(size)


def test_what_another_rank_raises_while_it_loads_is_raised_here(tmp_path):
    path = tiny.make_qwen2_vl(tmp_path / "spoilt", seed=3)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_engine(config(path), SpoilingLauncher(path / "config.json"))
