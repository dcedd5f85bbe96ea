"""The ring: what is written is read by everybody, in order, and nothing is overwritten before that."""

from __future__ import annotations

import os
import pickle
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.executor.broadcast_ring import RingReader, RingWriter, nameless_file, read_file


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 90), st.lists(st.integers(0, 3), max_size=3)), max_size=40))
def test_every_reader_reads_every_message(steps: list[tuple[int, list[int]]]) -> None:
    """Messages of many sizes; after each, some readers (which fall behind to different degrees) read one more."""
    ring = RingWriter(3, ring_bytes=200)
    readers = [RingReader(ring.descriptor, index, 3) for index in range(3)]
    waiting: list[deque[tuple[int, int, bytes]]] = [deque() for _ in readers]
    try:
        for number, (size, reading) in enumerate(steps):
            message = bytes([number]) * size
            packed = pickle.dumps(message)
            end = ring.write(packed)
            unread = max(sum(length for _, length, _ in queue) for queue in waiting)
            if end is None:  # the space behind a message that did not wrap around counts, too
                assert 2 * unread + 2 * len(packed) > 200
            else:
                for queue in waiting:
                    queue.append((end, len(packed), message))
            for index in reading:
                if index < 3 and waiting[index]:
                    end, length, message = waiting[index].popleft()
                    assert readers[index].read(end, length) == message
        for reader, queue in zip(readers, waiting, strict=True):
            for end, length, message in queue:
                assert reader.read(end, length) == message
    finally:
        ring.close()
        ring.close()


def test_a_message_that_cannot_be_read_counts_as_read() -> None:
    ring = RingWriter(1, ring_bytes=64)
    reader = RingReader(ring.descriptor, 0, 1)
    for _ in range(10):
        end = ring.write(b"no pickle" * 5)
        assert end is not None
        with pytest.raises(pickle.UnpicklingError):
            reader.read(end, 45)
    ring.close()


def test_a_message_of_any_size_in_a_file_of_its_own() -> None:
    packed = pickle.dumps(bytes(10_000_000))
    descriptor = nameless_file(packed)
    copy = os.dup(descriptor)
    assert read_file(descriptor, len(packed)) == bytes(10_000_000)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)
    os.close(copy)
