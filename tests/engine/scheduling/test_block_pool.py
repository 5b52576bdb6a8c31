"""The order in which blocks are taken, and those that can still be found."""

from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.prefix_cache import BlockHasher

from .simulated import SimulatedEngine, tokens_alone


def test_the_block_that_is_free_for_longest_is_taken_first():
    pool = BlockPool(7)
    first, second, third = pool.allocate(2), pool.allocate(1), pool.allocate(3)
    assert [*first, *second, *third] == [1, 2, 3, 4, 5, 6]
    pool.release(third)
    pool.release(first)
    pool.release(second)
    assert pool.allocate(6) == [*third, *first, *second]


def test_a_block_that_was_used_again_is_as_new():
    pool = BlockPool(4)
    one, two, three = pool.allocate(3)
    for block in (one, two, three):
        pool.publish(block, bytes([block]))
        pool.release([block])
    pool.share([one])
    pool.release([one])
    assert pool.allocate(1) == [two]
    assert pool.lookup(bytes([two])) is None
    assert (pool.lookup(bytes([one])), pool.lookup(bytes([three]))) == (one, three)


def request_of(ids: list[int]) -> Request:
    return Request("a", ids, len(ids), SamplingParams(), 40, frozenset())


def test_a_sequence_loses_its_end_first():
    kv = KVManager(BlockPool(5), BlockHasher(4, "model"), 4)
    request = request_of(list(range(16)))
    assert kv.admit(request, [[]], 0)
    blocks = list(request.blocks[0])
    kv.publish(request, request.token_ids, 16)
    kv.free(request)
    for left in (3, 2, 1):
        kv.pool.release(kv.pool.allocate(1))
        assert kv.cached_prefix(request_of(list(range(20)))) == [blocks[:left]]


def test_a_prefix_outlives_the_ends_of_answers():
    """Two prompts that don't fit into the cache together: of the first, its beginning is what remains."""
    engine = SimulatedEngine(num_blocks=13, max_num_seqs=1)
    prompt = list(range(24))
    engine.add("first", prompt, max_tokens=2)
    engine.run()
    engine.add("other", [30 + i % 9 for i in range(30)], max_tokens=2)
    engine.run()
    again = engine.add("again", prompt, max_tokens=2)
    engine.run()
    assert again.num_cached == 16
    assert engine.outputs["again"] == tokens_alone(prompt, [], 2)
