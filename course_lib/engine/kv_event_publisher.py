"""KV events for other processes: ZeroMQ messages that vLLM's subscribers can read.

A publisher is a listener (`engine.subscribe_kv_events(publisher)`). Each step's events become one message of
three parts: topic, sequence number (8 bytes, big-endian, from 0) and a msgpack array [time in seconds, events,
data-parallel rank]; an event is a map with its class name under "type".

Publishing never waits for anybody: to a reader that is too slow, or not there yet, a message is lost. It finds
out by the sequence numbers, and asks a second socket to replay from the number that it misses on; the last
message there has an empty payload. Invariant: what is replayed is what was published, in order.

vLLM: `ZmqEventPublisher` in `vllm/distributed/kv_events.py`, `examples/features/kv_events/`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import msgpack
import zmq

from course_lib.core.kv_events import BlockRemoved, BlockStored, KVEvent
from course_lib.core.prefix_hash import ExtraKeys

_MEDIUM = "GPU"  # vLLM's word for an engine's own cache, whatever the device
_KEPT = 10_000  # most recent messages, for replays and for a reader that is behind
_END = (-1).to_bytes(8, "big", signed=True)
_POLL_MS = 50  # how soon the replaying thread notices that it is to end
_LINGER_MS = 200  # for what is still on its way when the publisher is closed


class ZmqEventPublisher:
    """Args:
    endpoint, replay_endpoint: addresses to listen on; with port 0 the system chooses, and the attribute of the
        same name says what.
    topic: what subscribers filter by.
    data_parallel_rank: which of several engines this is.

    Raises zmq.ZMQError if an address cannot be used. Call `close` at the end, or use it as a context manager.
    """

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:0",
        replay_endpoint: str = "tcp://127.0.0.1:0",
        topic: str = "kv-events",
        data_parallel_rank: int = 0,
    ) -> None:
        self._topic = topic.encode()
        self._rank = data_parallel_rank
        self._sequence = 0
        self._recent: deque[tuple[bytes, bytes]] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()  # of the publishing socket and of what is kept
        self._closed = threading.Event()
        self._context = zmq.Context()
        try:
            self._publish = self._context.socket(zmq.PUB)
            self._replay = self._context.socket(zmq.ROUTER)
            self._publish.set_hwm(_KEPT)
            self._replay.set_hwm(_KEPT + 1)
            self.endpoint = _bind(self._publish, endpoint)
            self.replay_endpoint = _bind(self._replay, replay_endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._serve_replays, name="kv-event-replay", daemon=True)
        self._thread.start()

    def __call__(self, events: list[KVEvent]) -> None:
        """Send one step's events. Raises RuntimeError after `close`."""
        payload = msgpack.packb([time.time(), [_to_wire(event) for event in events], self._rank])
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError("this publisher is closed: end its subscription before closing it")
            number = self._sequence.to_bytes(8, "big")
            self._sequence += 1
            self._recent.append((number, payload))
            self._publish.send_multipart((self._topic, number, payload))

    def _serve_replays(self) -> None:
        while not self._closed.is_set():
            if not self._replay.poll(_POLL_MS):
                continue
            client, *rest = self._replay.recv_multipart()
            if len(rest) != 2 or rest[0] or len(rest[1]) != 8:
                continue  # not a request: an empty part, then the first number wanted
            with self._lock:
                wanted = [kept for kept in self._recent if kept[0] >= rest[1]]
            for number, payload in wanted:
                self._replay.send_multipart((client, b"", self._topic, number, payload))
            self._replay.send_multipart((client, b"", b"", _END, b""))

    def close(self) -> None:
        """End the thread and free the ports. Idempotent."""
        with self._lock:
            self._closed.set()
        self._thread.join()
        self._context.destroy(linger=_LINGER_MS)

    def __enter__(self) -> ZmqEventPublisher:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _bind(socket: zmq.Socket, endpoint: str) -> str:
    socket.bind(endpoint)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def _to_wire(event: KVEvent) -> dict[str, Any]:
    """An event as vLLM's subscribers expect it."""
    fields: dict[str, Any] = {"type": type(event).__name__}
    if isinstance(event, BlockStored):
        fields |= {
            "block_hashes": event.block_hashes,
            "parent_block_hash": event.parent_block_hash,
            "token_ids": event.token_ids,
            "block_size": event.block_size,
            "lora_id": None,
            "medium": _MEDIUM,
            "lora_name": event.lora_name,
            "extra_keys": [_without_kinds(keys) for keys in event.extra_keys],
        }
    elif isinstance(event, BlockRemoved):
        fields |= {"block_hashes": event.block_hashes, "medium": _MEDIUM}
    return fields


def _without_kinds(extra_keys: ExtraKeys) -> list[Any] | None:
    """vLLM's events leave the kinds out: an adapter's name, (identifier, offset) of media, a salt."""
    return [key[1:] if key[0] == "mm" else key[1] for key in extra_keys] or None
