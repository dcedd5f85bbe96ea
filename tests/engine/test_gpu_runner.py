"""On a GPU: graphs and steps launched ahead give the tokens of eager steps taken one after another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from course_lib import LLM, SamplingParams
from course_lib.core.request import Request

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


def _llm(path: Path, **arguments: object) -> LLM:
    return LLM(
        model=str(path), skip_tokenizer_init=True, device="cuda", dtype="float32", block_size=4,
        num_gpu_blocks_override=64, max_num_seqs=5, max_num_batched_tokens=40, **arguments,
    )  # fmt: skip


PROMPTS = [[3 + (7 * i + 5 * j) % 50 for j in range(1 + 3 * i)] for i in range(12)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=3 + 2 * i, ignore_eos=i % 3 == 0, stop_token_ids=[5, 9] if i % 2 else [])
    for i in range(12)
]


def _tokens(llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def test_every_way_of_running_gives_the_same_tokens(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = _llm(tiny_model_path)
    runner = llm.llm_engine.core.executor.runner
    assert runner.graphs is not None
    ahead = _tokens(llm, PARAMS)
    monkeypatch.setattr(type(runner), "can_run_ahead", False)
    assert _tokens(llm, PARAMS) == ahead, "graphs, one step after another"
    assert _tokens(_llm(tiny_model_path, enforce_eager=True), PARAMS) == ahead, "eager"
    monkeypatch.undo()
    assert _tokens(_llm(tiny_model_path, enforce_eager=True), PARAMS) == ahead, "eager, launched ahead"


def test_seeded_and_mixed_sampling(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random rows beside greedy ones, and rows that need the host, in the same steps."""
    params = [
        SamplingParams(temperature=0, max_tokens=9, ignore_eos=True),
        SamplingParams(temperature=1.2, seed=3, max_tokens=9, ignore_eos=True),
        SamplingParams(temperature=0.7, top_k=9, seed=4, max_tokens=12, ignore_eos=True),
    ] * 4
    llm = _llm(tiny_model_path)
    ahead = _tokens(llm, params)
    monkeypatch.setattr(type(llm.llm_engine.core.executor.runner), "can_run_ahead", False)
    assert _tokens(llm, params) == ahead
    monkeypatch.undo()
    params[5] = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, repetition_penalty=1.5, logprobs=2)
    mixed = _tokens(llm, params)
    assert [t for i, t in enumerate(mixed) if i != 5] == [t for i, t in enumerate(ahead) if i != 5]


def test_an_id_can_be_used_again_while_its_last_step_is_in_flight(tiny_model_path: Path) -> None:
    core = _llm(tiny_model_path).llm_engine.core
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

    def run(request_id: str, prompt: list[int], steps: int | None = None) -> list[int]:
        core.add_request(Request(request_id, prompt, params, 2))
        tokens: list[int] = []
        while core.has_work and (steps is None or steps > 0):
            tokens += [t for news in core.step() if news.request_id == request_id for t in news.new_token_ids]
            steps = None if steps is None else steps - 1
        return tokens

    expected = run("alone", PROMPTS[4])
    run("a", PROMPTS[3], steps=4)
    assert core._in_flight, "nothing was launched ahead"
    core.abort_requests(["a"])
    assert run("a", PROMPTS[4]) == expected
    assert not core.executor.runner.states
    pool = core.scheduler.kv_cache.pool
    assert pool.num_free == pool.num_blocks


def test_a_failed_step_leaves_an_empty_usable_engine(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = _llm(tiny_model_path)
    expected = _tokens(llm, PARAMS)
    core = llm.llm_engine.core
    for i, prompt in enumerate(PROMPTS[:3]):
        core.add_request(Request(str(i), prompt, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), 2))
    for _ in range(3):
        core.step()

    def fail(step: object) -> None:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(core.executor.runner, "finish", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            core.step()
    assert not core.has_work
    assert _tokens(llm, PARAMS) == expected
