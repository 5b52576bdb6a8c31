"""Steps are enqueued before the tokens of earlier ones are read, so that the device has work meanwhile."""

from concurrent.futures import Future

from engine import LLM, SamplingParams
from engine.offline import STEPS_TOGETHER
from tests.engine import tiny
from tests.engine.scheduling.simulated import SimulatedEngine


def test_a_step_leaves_as_many_enqueued_as_it_may():
    engine = SimulatedEngine()
    engine.add("a", [5, 6, 7], max_tokens=12)
    step = engine.core.step
    # Of calls that enqueue a step each, the second one waits for the first one's.
    assert [len(step()), len(step()), len(step())] == [0, 1, 1]
    assert len(step(more=1)) == 0
    # Now for two at once.
    assert len(step()) == 2


def test_two_steps_are_enqueued_while_text_is_made_and_prompts_are_added_together(tmp_path):
    llm = LLM(str(tiny.make_qwen2_vl(tmp_path)), max_model_len=64, max_num_batched_tokens=54)
    runner, outputs = llm._engine.core.runner, llm._engine.outputs
    execute, process = runner.execute, outputs.process
    enqueued, seen = 0, []

    def counted(*arguments, **options):
        nonlocal enqueued
        enqueued += 1
        return execute(*arguments, **options)

    def noted(events):
        nonlocal enqueued
        enqueued -= len(events)
        seen.append((len(events), enqueued))
        return process(events)

    runner.execute, outputs.process = counted, noted
    tokens = 3 * STEPS_TOGETHER
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == tokens
    assert seen[:2] == [(STEPS_TOGETHER, 2), (STEPS_TOGETHER, 2)]

    # Prompts that are prepared and have no media are added together, as many as fill a step.
    class AtOnce:
        def submit(self, prepare, encode):
            done = Future()
            done.set_result(prepare(encode))
            return done

    added = []
    admit = llm._runner._admit
    llm._runner._pool, llm._runner._admit = AtOnce(), lambda jobs: added.append(len(jobs)) or admit(jobs)
    prompts = [{"prompt_token_ids": [5, 6, 7]}] * 20
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
    assert [count for count in added if count] == [18, 2]

    # As many cached ones as a step has room for, too: little is left of them to compute.
    prompts = [{"prompt_token_ids": [*range(5, 38)]}] * 20
    one = SamplingParams(temperature=0.0, max_tokens=1)
    llm.generate(prompts[:1], one, use_tqdm=False)
    added.clear()
    runner.execute = lambda *arguments, **options: added.append(0) or execute(*arguments, **options)
    llm.generate(prompts, one, use_tqdm=False)
    assert sum(added[: added.index(0)]) == 20
