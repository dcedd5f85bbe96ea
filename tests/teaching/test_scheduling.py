"""One engine under many schedules: the limits hold, the answers do not change, and the engine comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from course_lib import LLM, SamplingParams
from course_lib.teaching.explorers.batching import draw_seats, seat_use, sittings
from course_lib.teaching.explorers.figures import png_bytes
from course_lib.teaching.recording.scheduling import limited, serve, static_batches, step_ms, total_tokens
from course_lib.teaching.recording.trace import record

JOBS = [(0, list(range(3, 17)), 6), (0, [20, 21, 22], 9), (2, [30] * 9, 4), (5, [40, 41], 5)]


@pytest.fixture(scope="module")
def llm(tiny_model_path: Path) -> LLM:
    return LLM(
        model=str(tiny_model_path), skip_tokenizer_init=True, device="cpu", block_size=4, max_num_seqs=8,
        num_gpu_blocks_override=64,
    )  # fmt: skip


def test_answers_are_the_same_under_all_limits(llm: LLM) -> None:
    answers, trace = serve(llm, JOBS)
    assert [len(answer) for answer in answers] == [length for *_, length in JOBS]
    assert [trace.requests[str(i)].num_prompt_tokens for i in range(4)] == [14, 3, 9, 2]
    first_steps = [next(s.index for s in trace.steps if str(i) in s.scheduled) for i in range(4)]
    assert first_steps == [0, 0, 2, 5]
    for limits in (
        {"max_num_batched_tokens": 3},
        {"max_num_seqs": 1},
        {"num_blocks": 6},
        {"long_prefill_token_threshold": 2},
    ):
        again, crowded = serve(llm, JOBS, check_invariants=True, **limits)
        assert again == answers, limits
        assert all(sum(s.scheduled.values()) <= crowded.token_budget for s in crowded.steps)
        assert all(len(s.block_tables) <= crowded.max_num_seqs for s in crowded.steps)
    assert crowded.num_blocks == 64


def test_without_the_model_the_schedule_is_the_same(llm: LLM) -> None:
    limits = {"max_num_batched_tokens": 6, "num_blocks": 7}
    _, real = serve(llm, JOBS, **limits)
    _, rehearsed = serve(llm, JOBS, run_model=False, **limits)
    assert [s.scheduled for s in rehearsed.steps] == [s.scheduled for s in real.steps]
    assert [s.preempted for s in rehearsed.steps] == [s.preempted for s in real.steps]
    assert any(s.preempted for s in real.steps)


def test_the_engine_comes_back_as_it_was(llm: LLM) -> None:
    core, frontend = llm.llm_engine.core, llm.llm_engine.frontend
    before = core.config, core.num_blocks, frontend.config, frontend.input_processor.config
    with pytest.raises(ZeroDivisionError), limited(llm, num_blocks=5, policy="priority", run_model=False):
        assert core.config.scheduler.max_model_len == 20 and core.scheduler.config.policy == "priority"
        llm.generate([[3, 4, 5]], SamplingParams(max_tokens=2), priority=[1], use_tqdm=False)
        with pytest.raises(ValueError, match="max_model_len=20"):
            llm.generate([[3] * 30], use_tqdm=False)
        llm.llm_engine.add_request("left behind", [3, 4], SamplingParams(max_tokens=5))
        1 / 0
    assert before == (core.config, core.num_blocks, frontend.config, frontend.input_processor.config)
    assert "execute_model" not in vars(core.executor) and not llm.llm_engine.has_unfinished_requests()
    assert core.scheduler.kv_cache.pool.num_free == 64


@pytest.mark.parametrize(
    "limits",
    [
        {"num_blocks": 65}, {"num_blocks": 0}, {"max_num_seqs": 9}, {"max_model_len": 65},
        {"max_num_batched_tokens": 0},
    ],  # fmt: skip
)
def test_limits_it_was_not_built_for_are_refused(llm: LLM, limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))), limited(llm, **limits):
        pass
    with pytest.raises(TypeError, match="seats"), limited(llm, seats=3):
        pass


def test_an_engine_with_work_is_refused(llm: LLM) -> None:
    llm.llm_engine.add_request("one", [3, 4], SamplingParams(max_tokens=5))
    with pytest.raises(RuntimeError, match="unfinished"), limited(llm):
        pass
    llm.llm_engine.abort_request("one")


def test_step_ms_needs_such_a_step(llm: LLM) -> None:
    _, trace = serve(llm, JOBS)
    assert step_ms(trace, 2) > 0
    with pytest.raises(ValueError, match="num_tokens=999"):
        step_ms(trace, 999)


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_seats_are_held_until_the_end_and_used_until_the_answer_is_complete(llm: LLM) -> None:
    with limited(llm, max_num_seqs=2, enable_prefix_caching=False), record(llm) as trace:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (4, 2, 3)]
        llm.generate([[3, 4], [5, 6, 7], [8]], params, use_tqdm=False)
    stays = sittings(trace, [4, 1, 3])  # of the second answer only the first token was wanted
    assert [(one.seat, one.first, one.wanted_end, one.end) for one in stays] == [
        (0, 0, 4, 4),
        (1, 0, 1, 2),
        (1, 2, 5, 5),
    ]
    assert seat_use(trace, [4, 1, 3]) == (4 + 1 + 3) / (2 * 5)
    figure = draw_seats(trace, [4, 1, 3], num_steps=9)
    assert "80 % of seats x steps computed something that was wanted" in words(figure)
    assert len(png_bytes(figure)) < 40_000
    # With every answer wanted to its end, the empty seats at the end of the run are no waste.
    assert "90 % of seats x steps were taken, none of them for nothing" in words(draw_seats(trace, [4, 2, 3]))


def test_a_static_batch_hands_over_groups_and_computes_to_the_longest(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[3, 4], [5, 6, 7], [8], [9, 10]]
    free, _ = serve(llm, [(0, prompt, 6) for prompt in prompts])
    end = free[0][2]  # an end that the first answer has as its third token

    class Tokenizer:
        eos_token_id = end

    monkeypatch.setattr(LLM, "get_tokenizer", lambda self: Tokenizer())
    answers, seconds, trace = static_batches(llm, prompts, seats=3, most=6)
    assert answers == [a[: a.index(end) + 1] if end in a else a for a in free]
    assert seconds[0] == seconds[1] == seconds[2] < seconds[3]
    first_group = max(len(answer) for answer in answers[:3])
    assert len(trace.steps) == first_group + len(answers[3])
    assert total_tokens(trace) == 6 + 3 * (first_group - 1) + 2 + len(answers[3]) - 1
    assert not llm.llm_engine.has_unfinished_requests()
