"""Names for the contents of full KV blocks.

A block's hash covers its own tokens *and everything before them*: each block hashes its parent's hash
together with its tokens. Two blocks with the same hash therefore hold the same keys and values,
whatever requests they came from. SHA-256, so that "same hash" may be taken as "same tokens": no
second comparison is needed and nobody can craft a collision to read another user's cache.

Tokens do not always say everything. The same ids give other keys and values under another LoRA
adapter, and an image's placeholder tokens are the same for every image. What else matters is in a
request's `CacheKeys`, and enters the hash of each block that it concerns as *extra keys*. Within one
pool parent and tokens have a fixed length, and the extra keys follow as JSON: two different blocks never
give the same bytes to hash.

vLLM: `vllm/v1/core/kv_cache_utils.py` (`hash_block_tokens`, `generate_block_hash_extra_keys`).
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from course_lib.core.request import Request

ROOT = sha256(b"course_lib prefix cache").digest()  # what the first block hashes as its parent

ExtraKeys = tuple[tuple[str | int, ...], ...]  # each begins with the name of its kind


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """One image, sound or video in a prompt.

    Args:
        identifier: names the content, such as a hash of it.
        offset: position of its first placeholder token in the prompt.
        length: how many placeholder tokens it has.
    """

    identifier: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        """Position after its last placeholder token."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class CacheKeys:
    """What besides its tokens decides who may share a request's blocks.

    Args:
        salt: requests share only with requests of the same salt.
        lora: (name, path) of the adapter; the path too, because a name may be given to another adapter.
        media: in the order of their places, which do not overlap.

    Raises ValueError if `media` are not so.
    """

    salt: str | None = None
    lora: tuple[str, str] | None = None
    media: tuple[MediaSpan, ...] = ()

    def __post_init__(self) -> None:
        for span in self.media:
            if span.offset < 0 or span.length < 1:
                raise ValueError(f"media: {span} must begin at 0 or later and have at least one token")
        for one, other in pairwise(self.media):
            if one.end > other.offset:
                raise ValueError(f"media: {other} begins before {one} has ended: sort them, and let none overlap")

    def of_block(self, begin: int, end: int) -> ExtraKeys:
        """Extra keys of the block with tokens [begin, end).

        The salt enters the first block and so, through the chain, all. An item of media enters each block
        that it overlaps, with its place relative to the block: among equal placeholders, nothing else tells
        where the image begins.
        """
        extra: list[tuple[str | int, ...]] = []
        if self.lora is not None:
            extra.append(("lora", *self.lora))
        media = self.media
        if media and media[-1].end > begin:
            for i in range(bisect_right(media, begin, key=lambda span: span.end), len(media)):
                if media[i].offset >= end:
                    break
                extra.append(("mm", media[i].identifier, media[i].offset - begin))
        if self.salt is not None and begin == 0:
            extra.append(("cache_salt", self.salt))
        return tuple(extra)


def block_extra_keys(request: Request, index: int, block_size: int) -> ExtraKeys:
    """Extra keys of block `index` of `request`; () for most."""
    keys = request.cache_keys
    return () if keys is None else keys.of_block(index * block_size, (index + 1) * block_size)


def hash_block(parent: bytes, token_ids: list[int], extra_keys: ExtraKeys = ()) -> bytes:
    """Hash of one full block, given its parent's (`ROOT` for the first): 32 bytes."""
    content = parent + array("q", token_ids).tobytes()
    if extra_keys:
        content += json.dumps(extra_keys).encode()
    return sha256(content).digest()


def extend_block_hashes(request: Request, block_size: int) -> None:
    """Append the hashes of blocks that have become full since the last call."""
    hashes = request.block_hashes
    tokens = request.token_ids
    start = len(hashes) * block_size
    if start + block_size > len(tokens):
        return
    parent = hashes[-1] if hashes else ROOT
    keys = request.cache_keys
    for begin in range(start, len(tokens) - block_size + 1, block_size):
        end = begin + block_size
        parent = hash_block(parent, tokens[begin:end], () if keys is None else keys.of_block(begin, end))
        hashes.append(parent)
