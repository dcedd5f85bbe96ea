"""What a request may ask for, end to end: n, seeds, stops, log-probabilities, processors, streaming."""

from __future__ import annotations

import pytest
import torch

from course_lib import LLM, LLMEngine, RequestOutputKind, SamplingParams


def run(engine: LLMEngine, *requests: tuple[str, list[int], SamplingParams]) -> dict[str, list]:
    """Add all, step to the end; every output each request produced."""
    seen: dict[str, list] = {}
    for request_id, prompt, params in requests:
        engine.add_request(request_id, prompt, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            seen.setdefault(output.request_id, []).append(output)
    return seen


def test_n_outputs_share_the_blocks_of_the_prompt(tiny_engine: LLMEngine) -> None:
    prompt = list(range(3, 25))  # 5 full blocks of 4 and a bit
    tiny_engine.add_request("r", prompt, SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=4))
    tiny_engine.step()
    tables = [request.block_ids for request in tiny_engine.core.scheduler.running]
    assert len(tables) == 4 and all(table[:5] == tables[0][:5] for table in tables)
    assert len({table[5] for table in tables}) == 4  # the unfinished block is everyone's own
    outputs = []
    while tiny_engine.has_unfinished_requests():
        outputs += tiny_engine.step()
    final = outputs[-1]
    assert final.finished and [one.index for one in final.outputs] == [0, 1, 2, 3]
    assert sum(output.finished for output in outputs) == 1
    assert len(outputs) == 3  # one per step, siblings joined, the last step included


def test_child_i_of_a_seeded_request_is_the_request_with_seed_plus_i(tiny_engine: LLMEngine) -> None:
    prompt = [5, 6, 7]
    many = run(tiny_engine, ("r", prompt, SamplingParams(n=3, temperature=1.2, seed=10, max_tokens=8)))["r"][-1]
    for i in range(3):
        alone = run(tiny_engine, ("s", prompt, SamplingParams(temperature=1.2, seed=10 + i, max_tokens=8)))["s"][-1]
        assert alone.outputs[0].token_ids == many.outputs[i].token_ids


def test_a_seeded_request_does_not_depend_on_its_batch_mates(tiny_engine: LLMEngine) -> None:
    seeded = SamplingParams(temperature=1.2, seed=3, max_tokens=10, ignore_eos=True)
    alone = run(tiny_engine, ("s", [9, 8, 7], seeded))["s"][-1].outputs[0].token_ids
    others = [(str(i), [4 + i], SamplingParams(temperature=1.5, max_tokens=3 + i)) for i in range(5)]
    assert run(tiny_engine, *others, ("s", [9, 8, 7], seeded))["s"][-1].outputs[0].token_ids == alone


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_output_kinds_tell_the_same_story(tiny_engine: LLMEngine, kind: RequestOutputKind) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, output_kind=kind, logprobs=1)
    outputs = run(tiny_engine, ("r", [3, 4, 5], params))["r"]
    expected = run(tiny_engine, ("q", [3, 4, 5], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)))
    tokens = expected["q"][-1].outputs[0].token_ids
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    if kind is RequestOutputKind.CUMULATIVE:
        assert counts == [1, 2, 3, 4, 5, 6] and outputs[-1].outputs[0].token_ids == tokens
    elif kind is RequestOutputKind.DELTA:
        assert counts == [1] * 6 and [o.outputs[0].token_ids[0] for o in outputs] == tokens
        assert all(len(o.outputs[0].logprobs) == 1 for o in outputs)
    else:
        assert counts == [6] and outputs[0].outputs[0].token_ids == tokens
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_a_stop_string_across_token_borders_ends_the_request_and_frees_its_blocks(llm: LLM) -> None:
    full = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=24))[0].outputs[0]
    stop = full.text[10:15]  # five characters somewhere inside, whatever the tokens are
    assert len(stop) == 5
    out = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=24, stop=stop))[0].outputs[0]
    assert out.text == full.text[: full.text.index(stop)]
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)
    assert len(out.token_ids) < len(full.token_ids)


def test_logprobs_are_those_of_the_unmodified_logits(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=2, logit_bias={1000: -50})
    (output,) = llm.generate("The capital of France is", params)
    one = output.outputs[0]
    assert one.cumulative_logprob == pytest.approx(
        sum(position[t].logprob for t, position in zip(one.token_ids, one.logprobs, strict=True))
    )
    for position in one.logprobs:
        ranked = sorted(position.values(), key=lambda item: item.rank)
        assert [item.rank for item in ranked[:3]] == [1, 2, 3]
        assert sorted(ranked, key=lambda item: -item.logprob) == ranked
    # Re-reading prompt + output as a prompt must give the same numbers.
    again = llm.generate(output.prompt_token_ids + one.token_ids, SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    for i, token_id in enumerate(one.token_ids):
        reread = again.prompt_logprobs[len(output.prompt_token_ids) + i][token_id].logprob
        assert reread == pytest.approx(one.logprobs[i][token_id].logprob, abs=1e-3)


def test_logits_processors_of_both_signatures(tiny_engine: LLMEngine) -> None:
    seen = []

    def only_seven(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, float("-inf")).index_fill_(0, torch.tensor([7]), 0.0)

    def watch(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((list(prompt_ids), len(output_ids)))
        return logits

    params = SamplingParams(temperature=0, max_tokens=3, logits_processors=[watch, only_seven])
    assert run(tiny_engine, ("r", [3, 4], params))["r"][-1].outputs[0].token_ids == [7, 7, 7]
    assert seen == [([3, 4], 0), ([3, 4], 1), ([3, 4], 2)]


@pytest.mark.parametrize("returned", [ZeroDivisionError("mine"), None, torch.zeros(3)])
def test_a_failing_logits_processor_ends_only_its_own_request(tiny_engine: LLMEngine, returned: object) -> None:
    def broken(output_ids: list[int], logits: torch.Tensor) -> object:
        if isinstance(returned, Exception):
            raise returned
        return returned

    good = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    alone = run(tiny_engine, ("g", [3, 4], good))["g"][-1].outputs[0].token_ids
    seen = run(tiny_engine, ("g", [3, 4], good), ("b", [5], SamplingParams(logits_processors=[broken])))
    assert seen["g"][-1].outputs[0].token_ids == alone
    bad = seen["b"][-1].outputs[0]
    assert bad.finish_reason == "abort" and "logits_processors" in bad.stop_reason


def test_prefix_cache_hits_are_reported_and_can_be_reset(tiny_engine: LLMEngine) -> None:
    prompt, params = list(range(3, 20)), SamplingParams(temperature=0, max_tokens=2)
    assert run(tiny_engine, ("a", prompt, params))["a"][-1].num_cached_tokens == 0
    assert run(tiny_engine, ("b", prompt, params))["b"][-1].num_cached_tokens == 16
    assert tiny_engine.reset_prefix_cache()
    assert run(tiny_engine, ("c", prompt, params))["c"][-1].num_cached_tokens == 0


def test_abort_at_any_step(tiny_engine: LLMEngine) -> None:
    keep = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    alone = run(tiny_engine, ("k", [3, 4, 5], keep))["k"][-1].outputs[0].token_ids
    for when in range(6):
        tiny_engine.add_request("k", [3, 4, 5], keep)
        tiny_engine.add_request("x", [6, 7, 8], SamplingParams(n=2, max_tokens=20, ignore_eos=True))
        outputs = [output for _ in range(when) for output in tiny_engine.step()]
        tiny_engine.abort_request(["x", "unknown"])
        while tiny_engine.has_unfinished_requests():
            new = tiny_engine.step()
            assert all(output.request_id == "k" for output in new)
            outputs += new
        assert [o for o in outputs if o.request_id == "k"][-1].outputs[0].token_ids == alone
    pool = tiny_engine.core.scheduler.kv_cache.pool
    assert pool.num_free == pool.num_blocks


def test_an_interrupted_step_leaves_a_usable_engine(tiny_engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of the model: half-computed blocks must not be found later."""
    prompt, params = list(range(3, 30)), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    expected = run(tiny_engine, ("a", prompt, params))["a"][-1].outputs[0].token_ids
    assert tiny_engine.reset_prefix_cache()
    runner = tiny_engine.core.executor.runner
    for moment in ("before", "after"):
        forward = runner.model.forward

        def interrupt(*args, moment=moment, forward=forward):
            if moment == "after":
                forward(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(runner.model, "forward", interrupt)
        tiny_engine.add_request("b", prompt, params)
        with pytest.raises(KeyboardInterrupt):
            tiny_engine.step()
        monkeypatch.setattr(runner.model, "forward", forward)
        assert not tiny_engine.has_unfinished_requests()
        output = run(tiny_engine, ("b", prompt, params))["b"][-1]
        assert output.num_cached_tokens == 0 and output.outputs[0].token_ids == expected
        assert tiny_engine.reset_prefix_cache()


def test_an_interrupted_submission_leaves_no_ghost(tiny_engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(request: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_engine.core, "add_request", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny_engine.add_request("a", [3], SamplingParams())
    assert not tiny_engine.has_unfinished_requests()


def test_aborting_n_outputs_reports_all_of_them(tiny_engine: LLMEngine) -> None:
    params = SamplingParams(n=3, temperature=1.0, max_tokens=9, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    tiny_engine.add_request("r", [3, 4], params)
    tiny_engine.step()
    last = tiny_engine.frontend.output_processor.abort("r")
    assert last.finished and [(one.index, one.finish_reason) for one in last.outputs] == [
        (0, "abort"), (1, "abort"), (2, "abort")
    ]  # fmt: skip
    tiny_engine.core.abort_requests([request.request_id for request in tiny_engine.core.scheduler.running])
