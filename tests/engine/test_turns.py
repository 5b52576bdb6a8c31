import numpy as np

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.prompt import EngineInput
from engine.sampling_params import SamplingParams
from engine.turns import Turns
from tests.engine.tiny import make_text
from tests.serving import wait_until


def test_a_piece_follows_a_step_or_the_piece_before():
    turns, looks = Turns(), []

    def computed() -> bool:
        looks.append(len(looks))
        return len(looks) > 3

    turns.stepped()
    turns.await_step(computed)
    assert not looks, "no step comes that could be held up"
    turns.has_steps = True
    turns.await_step(computed)
    assert len(looks) == 4, "the step before the piece does not count"

    def step() -> bool:
        turns.stepped()
        return False

    turns.await_step(step)


async def test_an_engine_tells_of_its_steps_and_spreads_prompts_unless_many_images_wait(tmp_path):
    class Counted(Turns):
        steps = told = 0

        def stepped(self) -> None:
            super().stepped()
            self.steps += 1
            self.told += self.has_steps

    turns = Counted()
    config = EngineConfig(model=str(make_text(tmp_path, "llama")), device="cpu", kv_cache_bytes=4 << 20)
    engine = AsyncEngine(config, turns=turns)
    scheduler = engine._engine.core.scheduler
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    for crowded in (False, True):
        turns.crowded = crowded
        async for _ in engine.generate("one", EngineInput(np.arange(20, 40).tolist()), params):
            assert scheduler.spreads_prompts != crowded
        await wait_until(lambda: not turns.has_steps)
    assert turns.told == turns.steps == engine.metrics()["batches"]["count"] >= 18
    engine.shutdown()
