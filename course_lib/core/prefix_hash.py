"""Names for the contents of full KV blocks.

A block's hash covers its own tokens *and everything before them*: each block hashes its parent's
hash together with its tokens. Two blocks with the same hash therefore hold the same keys and values,
whatever requests they came from. SHA-256, so that "same hash" may be taken as "same tokens": no
second comparison is needed and nobody can craft a collision to read another user's cache.

vLLM: `vllm/v1/core/kv_cache_utils.py` (`hash_block_tokens`).
"""

from __future__ import annotations

from array import array
from hashlib import sha256

from course_lib.core.request import Request

_ROOT = sha256(b"course_lib prefix cache").digest()


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """Hash of one full block, given its parent's hash: 32 bytes."""
    return sha256(parent + array("q", token_ids).tobytes()).digest()


def root_hash(request: Request) -> bytes:
    """What the first block of `request` hashes as its parent: the salt separates cache users."""
    if request.cache_salt is None:
        return _ROOT
    return sha256(_ROOT + request.cache_salt.encode()).digest()


def extend_block_hashes(request: Request, block_size: int) -> None:
    """Append the hashes of blocks that have become full since the last call."""
    hashes = request.block_hashes
    tokens = request.token_ids
    start = len(hashes) * block_size
    if start + block_size > len(tokens):
        return
    parent = hashes[-1] if hashes else root_hash(request)
    for begin in range(start, len(tokens) - block_size + 1, block_size):
        parent = hash_block(parent, tokens[begin : begin + block_size])
        hashes.append(parent)
