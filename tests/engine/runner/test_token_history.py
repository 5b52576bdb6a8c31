"""The tokens of sequences that must not repeat themselves, whatever comes and goes beside them."""

import random

import torch

from engine.runner.token_history import TokenHistory


def test_slots_have_their_own_tokens_and_a_step_looks_at_few_others():
    rng, history = random.Random(0), TokenHistory(5, torch.device("cpu"))
    known: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for _ in range(300):
        slot = rng.randrange(4)
        if slot in known and rng.random() < 0.1:
            del known[slot], sizes[slot]
            history.forget(slot)
        elif slot not in known:
            size, count = rng.choice([0, 1, 3]), rng.choice([1, 2, 200])
            known[slot], sizes[slot] = [rng.randrange(9) for _ in range(count)], size
            history.write(slot, size, known[slot] if size else [])
        history.flush()
        # A row of padding stands behind those of slots.
        batch = [each for each in known if rng.random() < 0.9]
        limited = [each for each in batch if sizes[each]]
        if not limited:
            continue
        tokens, lengths, found = history.of(torch.tensor([*batch, 4]))
        assert found.tolist() == [*(sizes[each] for each in batch), 0]
        for row, each in enumerate(batch):
            if sizes[each]:
                assert lengths[row] == len(known[each])
                assert tokens[row, : lengths[row]].tolist() == known[each]
        new = [rng.randrange(9) for _ in batch]
        history.advance(torch.tensor([*batch, 4]), torch.tensor([*new, 7]))
        for each, token in zip(batch, new, strict=True):
            known[each].append(token)
    for slot in list(known):
        history.forget(slot)
    history.write(0, 2, [1, 2, 3])
    history.flush()
    assert history.of(torch.tensor([0]))[0].tolist() == [[1, 2, 3]]
