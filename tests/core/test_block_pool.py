"""The block pool: O(1) free queue, sharing, eviction order, cached content."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.core.block_pool import BlockPool


def test_blocks_are_handed_out_oldest_first_and_released_tail_first() -> None:
    pool = BlockPool(4)
    assert pool.allocate(4) == [0, 1, 2, 3]
    pool.release(reversed([0, 1, 2, 3]))
    assert pool.allocate(4) == [3, 2, 1, 0]


def test_a_released_block_is_found_until_it_is_handed_out_again() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.register(block, b"a")
    pool.release([block])
    assert pool.find(b"a") == block
    pool.allocate(1)  # the other block is older in the queue
    assert pool.find(b"a") == block
    pool.allocate(1)
    assert pool.find(b"a") is None


def test_sharing_pulls_a_block_out_of_the_middle_of_the_queue() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    pool.register(blocks[1], b"b")
    pool.release(blocks)
    pool.share([blocks[1]])
    assert pool.num_free == 2
    pool.check_invariants()
    assert pool.allocate(2) == [blocks[0], blocks[2]]


def test_the_first_block_of_a_content_wins() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, b"same")
    pool.register(second, b"same")
    assert pool.find(b"same") == first
    pool.check_invariants()


def test_reset_is_refused_while_blocks_are_held() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.register(block, b"a")
    assert not pool.reset_cache()
    pool.release([block])
    assert pool.reset_cache()
    assert pool.find(b"a") is None
    pool.check_invariants()


def test_invariants_notice_a_wrong_reference_count() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    pool.blocks[0].ref_count = 0
    with pytest.raises(AssertionError, match="block 0"):
        pool.check_invariants()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("arsg"), st.integers(0, 7)), max_size=60))
def test_random_operations_keep_the_invariants(operations: list[tuple[str, int]]) -> None:
    """Against a model of plain lists: who holds what, and in which order free blocks are taken."""
    pool = BlockPool(6)
    held: list[list[int]] = []
    free = list(range(6))
    for operation, argument in operations:
        if operation == "a" and argument <= pool.num_free:
            taken = pool.allocate(argument)
            assert taken == free[:argument]
            del free[:argument]
            held.append(taken)
        elif operation == "s" and held:
            shared = held[argument % len(held)]
            pool.share(shared)
            held.append(list(shared))
        elif operation == "r" and held:
            released = held.pop(argument % len(held))
            pool.release(reversed(released))
            still = {block for blocks in held for block in blocks}
            free += [block for block in reversed(released) if block not in still]
        elif operation == "g" and held and held[argument % len(held)]:
            block = held[argument % len(held)][0]
            if pool.blocks[block].content_hash is None:  # a block's content never changes while it is held
                pool.register(block, bytes([argument]))
        pool.check_invariants()
        assert [block.block_id for block in pool.free_queue] == free
