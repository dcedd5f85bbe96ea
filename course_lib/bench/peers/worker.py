"""The far end of a comparison: loads one engine, then serves batches of token ids until its input ends.

Both directions are lines of JSON. In: `{"items": [[prompt token ids, new tokens], …]}`, on standard input. Out, on the
descriptor named by the first argument: `{"loaded": true}`, then `{"seconds": …, "tokens": …}` for each batch, or
`{"error": …}`. Standard output stays free for what engines print. Standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

# serves [(prompt token ids, new tokens), …] greedily, end-of-sequence ignored; returns the new tokens produced
Serve = Callable[[list[tuple[list[int], int]]], int]


def work(load: Callable[[dict[str, Any]], Serve]) -> None:
    """`load` builds the engine from the second argument, a JSON object: `model` (a folder), `dtype`, `threads`,
    `max_model_len` and `kv_cache_bytes`."""
    with os.fdopen(int(sys.argv[1]), "w") as answers:

        def answer(**message: Any) -> None:
            print(json.dumps(message), file=answers, flush=True)

        try:
            serve = load(json.loads(sys.argv[2]))
            answer(loaded=True)
            for line in sys.stdin:
                items = [(ids, count) for ids, count in json.loads(line)["items"]]
                started = time.perf_counter()
                tokens = serve(items)
                answer(seconds=time.perf_counter() - started, tokens=tokens)
        except Exception as error:  # whatever it is, the other end must hear of it
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}")
            sys.exit(1)
