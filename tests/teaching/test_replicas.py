"""What lesson 05 watches and draws: rules of balancing, ranks in lock step, replicas that are killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from course_lib import LLM
from course_lib.engine.coordinator import AGREE_EVERY, WaveMember
from course_lib.errors import EngineDeadError
from course_lib.teaching.explorers.figures import MAX_BYTES, png_bytes
from course_lib.teaching.explorers.replicas import describe_balancing, draw_balancing, draw_survival
from course_lib.teaching.explorers.waves import describe_waves, draw_waves, play
from course_lib.teaching.recording import replicas
from course_lib.teaching.recording.balancing import RULES, STREAMS, last_end, skewed, spread, waits
from course_lib.teaching.recording.waves import interleave


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stream", STREAMS)
def test_every_job_is_served_once_and_no_seat_twice(stream: str, rule: str) -> None:
    jobs, stays = STREAMS[stream], spread(STREAMS[stream], rule)
    assert sorted(stay.job for stay in stays) == list(range(len(jobs)))
    taken = [(stay.replica, stay.seat, step) for stay in stays for step in range(stay.first, stay.end)]
    assert len(taken) == len(set(taken)) == sum(length for _, length in jobs)
    assert all(stay.first >= jobs[stay.job][0] for stay in stays)


def test_the_straggler_of_turns_and_what_counting_saves() -> None:
    ends = [last_end(spread(STREAMS["long, short, long, short …"], rule)) for rule in RULES]
    assert ends == [32, 38, 26]
    jobs = skewed(0, replicas=8)
    by_turns, by_load = (sum(map(bool, waits(jobs, rule, 8))) for rule in RULES[1:])
    assert by_load * 3 < by_turns


def test_with_dummy_passes_both_ranks_run_every_pass_and_without_them_they_hang() -> None:
    for every in range(1, 9):
        played = play(every)
        awake = [[kind != "asleep" for kind in kinds] for kinds in played.ticks]
        assert awake[0] == awake[1] and not played.gave_up
        assert sum(kinds.count("real") for kinds in played.ticks) == 10
        assert sum(awake[0]) % every == 0
    stuck = play(4, dummies=False)
    assert stuck.gave_up and stuck.ticks[0][-1] == "waits" and stuck.ticks[1][-1] == "asleep"
    assert "waits" in describe_waves(4, dummies=False)


def test_the_legend_of_the_waves_names_what_is_in_the_picture() -> None:
    def named(dummies: bool) -> set[str]:
        return {text.get_text() for axes in draw_waves(4, dummies).axes for text in axes.texts}

    assert "dummy pass" in named(True) and "waits for the other" not in named(True)
    assert "dummy pass" not in named(False) and "waits for the other" in named(False)


def test_interleavings_repeat_and_find_the_member_that_stays_silent() -> None:
    class Silent(WaveMember):
        def on_request(self, wave: int) -> bool:
            super().on_request(wave)
            return False

    assert interleave(WaveMember, 7).log == interleave(WaveMember, 7).log
    assert all(interleave(WaveMember, seed).problem is None for seed in range(200))
    problems = {interleave(Silent, seed).problem for seed in range(200)}
    assert any(problem and problem.startswith("deadlock") for problem in problems)


def test_figures_are_small_and_told_in_words() -> None:
    for stream in STREAMS:
        assert len(png_bytes(draw_balancing(stream))) <= MAX_BYTES and stream in describe_balancing(stream)
    for every, dummies in ((1, True), (4, True), (8, True), (4, False)):
        assert len(png_bytes(draw_waves(every, dummies))) <= MAX_BYTES
    told = {"1": [(0.1, 1), (0.4, 0)], "0": [(0.1, 0), (0.2, 0)]}
    assert len(png_bytes(draw_survival(told, 0.15))) <= MAX_BYTES


@pytest.fixture
def pair(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    llm = LLM(model=str(tiny_model_path), skip_tokenizer_init=True, device="cpu", block_size=4,
              max_num_seqs=4, num_gpu_blocks_override=64, data_parallel_size=2)  # fmt: skip
    yield llm
    llm.llm_engine.shutdown()


@pytest.mark.slow
def test_a_real_pair_is_watched_streamed_to_and_survives(pair: LLM) -> None:
    assert len({one.process for one in pair.collective_rpc(replicas.holding)}) == 2
    pair.collective_rpc(replicas.log_passes)
    own = pair.llm_engine.core.balancer
    jobs = [([3 + i, 4, 5], 3 if i % 2 else 9) for i in range(8)]
    run = replicas.streamed(pair, jobs, at_once=2, policy="round_robin")
    assert run.replica == [0, 1] * 4 and [run.tokens_of(i) for i in (0, 1)] == [36, 12]
    assert all(run.ended) and pair.llm_engine.core.balancer is own
    logs = pair.collective_rpc(replicas.passes_so_far)
    assert sum(logs[0]) == 4 * (3 + 8) and 0 not in logs[0]
    engine, told, killed = pair.llm_engine, {str(i): 0 for i in range(4)}, False
    with replicas.watched(pair) as moments:
        for name in told:
            engine.add_request(name, [5 + int(name), 6], replicas.greedy(20))
        while engine.has_unfinished_requests():
            for output in engine.step():
                told[output.request_id] += len(output.outputs[0].token_ids)
            if not killed and sum(told.values()) >= 8:
                killed = replicas.kill(pair, 1) is None
    assert set(told.values()) == {20} == {len(times) for times in moments.values()}
    assert {replica for _, replica in moments["0"][-1:] + moments["1"][-1:]} == {0}
    assert "_take_news" not in vars(engine.core)
    with pytest.raises(RuntimeError, match="replica 1 is dead already: for new replicas"), replicas.watched(pair):
        engine.add_request("left", [5, 6], replicas.greedy(20))
        replicas.kill(pair, 1)
    assert not engine.has_unfinished_requests()
    engine.add_request("unfinished", [5, 6], replicas.greedy(20))
    engine.shutdown()
    with pytest.raises(EngineDeadError, match="was shut down"):  # and not: this id is in use
        engine.add_request("unfinished", [5, 6], replicas.greedy(20))


def test_a_wave_is_a_multiple_of_the_passes_between_agreements() -> None:
    assert AGREE_EVERY == 16  # lesson 05 says so
