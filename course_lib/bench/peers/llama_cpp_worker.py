"""llama.cpp through `llama-cpp-python`, on the GGUF file that the course model is converted from: 4-bit weights, one
request after another, which is all that its Python interface does."""

from __future__ import annotations

from typing import Any

from course_lib.bench.peers.worker import Serve, work


def load(options: dict[str, Any]) -> Serve:
    from llama_cpp import Llama

    threads = options["threads"]
    llama = Llama(
        options["gguf"], n_ctx=options["max_model_len"], n_threads=threads, n_threads_batch=threads, verbose=False
    )  # fmt: skip

    def serve(items: list[tuple[list[int], int]]) -> int:
        produced = 0
        for ids, count in items:
            llama.reset()
            for i, _ in enumerate(llama.generate(ids, temp=0.0), start=1):
                produced += 1
                if i == count:
                    break
        return produced

    return serve


if __name__ == "__main__":
    work(load)
