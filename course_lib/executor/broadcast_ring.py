"""One writer, several readers: messages pickled once, in memory that all their processes share.

The memory is a file without a name: when the last process that has it open ends, in whatever way, it is gone. A
message stands in it in one piece. The writer says by other means where (its end, counted from the first message on,
and its length), and the readers say through counters at the front of the memory how far they have read.

Invariant: the writer overwrites nothing that a reader has not counted as read. A message that there is no room for is
not waited for: it travels in a file of its own.

vLLM: `ShmRingBuffer` in `vllm/distributed/device_communicators/shm_broadcast.py`, whose readers poll a flag in the
shared memory; here they sleep on a socket, since polling takes a core from those who compute.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
from typing import Any

RING_BYTES = 4 << 20
_COUNTER_BYTES = 64  # one cache line for each reader's 8


def nameless_file(content: bytes = b"") -> int:
    """A descriptor of a file in memory (Linux) or of a deleted one, holding `content`."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("course_lib")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    return descriptor


class RingWriter:
    """Makes the memory; `descriptor` is for the readers to inherit."""

    def __init__(self, num_readers: int, ring_bytes: int = RING_BYTES) -> None:
        self.descriptor = nameless_file()
        self._size = ring_bytes
        self._front = num_readers * _COUNTER_BYTES
        os.ftruncate(self.descriptor, self._front + ring_bytes)
        self._memory = mmap.mmap(self.descriptor, self._front + ring_bytes)
        self._view = memoryview(self._memory)
        self._counters = self._view[: self._front].cast("Q")
        self._end = 0  # of the newest message

    def write(self, message: bytes) -> int | None:
        """Store a message. Returns where it ends, or None if there is no room for it at present."""
        start = self._end
        if start % self._size + len(message) > self._size:
            start += self._size - start % self._size  # it would wrap around
        end = start + len(message)
        if end - self._slowest() > self._size:
            return None
        place = self._front + start % self._size
        self._view[place : place + len(message)] = message
        self._end = end
        return end

    def _slowest(self) -> int:
        """How far all readers have read. A counter that is out of date only makes the ring look fuller."""
        return min(self._counters[i] for i in range(0, len(self._counters), _COUNTER_BYTES // 8))

    def close(self) -> None:
        """Let go of the memory. Idempotent."""
        self._counters.release()
        self._view.release()
        self._memory.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class RingReader:
    """Reader `index` of `num_readers`."""

    def __init__(self, descriptor: int, index: int, num_readers: int) -> None:
        self._front = num_readers * _COUNTER_BYTES
        self._view = memoryview(mmap.mmap(descriptor, 0))
        self._size = len(self._view) - self._front
        self._counter = self._view[index * _COUNTER_BYTES : (index + 1) * _COUNTER_BYTES].cast("Q")

    def read(self, end: int, length: int) -> Any:
        """Unpickle the message that ends at `end`, and count it as read. Messages must be read in order."""
        place = self._front + (end - length) % self._size
        try:
            return pickle.loads(self._view[place : place + length])
        finally:
            self._counter[0] = end


def read_file(descriptor: int, length: int) -> Any:
    """Unpickle a message that travelled in a file of its own, and close it."""
    try:
        with mmap.mmap(descriptor, length, access=mmap.ACCESS_READ) as memory:
            return pickle.loads(memory)
    finally:
        os.close(descriptor)
