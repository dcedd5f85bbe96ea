"""Data parallelism without processes: who is given a request, when replicas may sleep, what is refused."""

from __future__ import annotations

import dataclasses
from collections import deque
from pathlib import Path

import pytest

from course_lib import AsyncLLM, EngineArgs
from course_lib.engine.balancer import Balancer
from course_lib.engine.coordinator import WaveMember
from course_lib.engine.replica_set import replica_environment
from course_lib.parallel.config import ParallelConfig
from course_lib.parallel.layout import ParallelLayout
from course_lib.parallel.replicas import ReplicaPlace, read_environment
from course_lib.teaching.recording.waves import interleave

# ---- balancing --------------------------------------------------------------------------------------


def test_round_robin_takes_turns_and_passes_over_the_dead() -> None:
    balancer = Balancer(3, "round_robin")
    assert [balancer.assign() for _ in range(5)] == [0, 1, 2, 0, 1]
    balancer.remove(0)
    assert [balancer.assign() for _ in range(4)] == [2, 1, 2, 1]
    assert balancer.num_assigned == [2, 4, 3]


def test_least_loaded_goes_where_requests_have_ended_and_takes_turns_among_equals() -> None:
    balancer = Balancer(3, "least_loaded")
    assert [balancer.assign() for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    for _ in range(2):
        balancer.release(2)
    assert [balancer.assign() for _ in range(3)] == [2, 2, 1]
    assert balancer.loads == {0: 3, 1: 3, 2: 2}
    balancer.remove(2)
    balancer.release(2)  # news of a request that was moved must not count
    assert balancer.loads == {0: 3, 1: 3}
    balancer.clear()
    assert balancer.loads == {0: 0, 1: 0}


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded"])
def test_equal_requests_are_spread_evenly_by_both_rules(policy: str) -> None:
    balancer = Balancer(4, policy)
    for _ in range(50):
        balancer.assign()
        assert max(balancer.loads.values()) - min(balancer.loads.values()) <= 1


def test_unequal_requests_are_spread_evenly_by_least_loaded_only() -> None:
    """Every other request is long: taking turns gives all long ones to one replica."""

    def most_in_flight(policy: str) -> int:
        balancer, ends, most = Balancer(2, policy), deque(), 0
        for now in range(200):
            ends.append((now + (40 if now % 2 else 1), balancer.assign()))
            most = max(most, *balancer.loads.values())
            for end in [end for end in ends if end[0] <= now]:
                ends.remove(end)
                balancer.release(end[1])
        return most

    assert most_in_flight("least_loaded") <= 12 < most_in_flight("round_robin")


def test_nobody_left_is_an_error() -> None:
    balancer = Balancer(1, "least_loaded")
    balancer.remove(0)
    with pytest.raises(LookupError):
        balancer.assign()


# ---- waves ------------------------------------------------------------------------------------------


def test_whatever_the_order_no_request_is_lost_and_all_run_equally_many_passes() -> None:
    runs = [interleave(WaveMember, seed) for seed in range(1500)]
    assert [run.problem for run in runs if run.problem] == []
    assert sum(run.num_waves for run in runs) > 3000  # many waves each, or nothing was tested


class HeedsLateCalls(WaveMember):
    """Takes any call to wake up for a new one."""

    def on_start(self, wave: int) -> None:
        self.running = True


class StaysAlone(WaveMember):
    """Takes the number of a request's wave for unimportant."""

    def on_request(self, wave: int) -> bool:
        super().on_request(wave)
        return False


@pytest.mark.parametrize("member", [HeedsLateCalls, StaysAlone])
def test_the_simulation_finds_the_races_that_wave_numbers_are_for(member: type[WaveMember]) -> None:
    problems = [run.problem for run in (interleave(member, seed) for seed in range(1500)) if run.problem]
    assert any("deadlock" in problem or "in wave" in problem for problem in problems)


# ---- what is asked for ------------------------------------------------------------------------------


def test_a_process_knows_by_the_environment_which_replica_it_is() -> None:
    assert read_environment({}) is None
    assert read_environment({"VLLM_DP_SIZE": "1", "VLLM_DP_RANK": "0"}) is None
    environment = {"VLLM_DP_SIZE": "4", "VLLM_DP_RANK": "3", "VLLM_DP_RANK_LOCAL": "1",
                   "VLLM_DP_MASTER_IP": "10.0.0.1", "VLLM_DP_MASTER_PORT": "13345"}  # fmt: skip
    assert read_environment(environment) == (4, ReplicaPlace(3, 1, "10.0.0.1", 13345))
    for changed, message in [
        ({"VLLM_DP_RANK": "4"}, "VLLM_DP_RANK=4 .* must be 0 to 3"),
        ({"VLLM_DP_RANK": ""}, "VLLM_DP_RANK='' .* must be a whole number"),
        ({"VLLM_DP_RANK_LOCAL": "x"}, "VLLM_DP_RANK_LOCAL='x'"),
        ({"VLLM_DP_RANK_LOCAL": "4"}, "one of 0 to 3"),
        ({"VLLM_DP_SIZE": "0"}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_environment(environment | changed)


def test_replicas_started_one_by_one_are_engines_of_their_own_unless_they_share_experts(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in [("SIZE", "2"), ("RANK", "1"), ("MASTER_PORT", "0")]:
        monkeypatch.setenv(f"VLLM_DP_{name}", value)
    args = EngineArgs(model=str(tiny_model_path), skip_tokenizer_init=True, device="cpu")
    parallel = args.create_engine_config().parallel
    assert parallel.layout.data == 1 and parallel.replica.rank == 1 and not parallel.in_lock_step
    args.data_parallel_size = 3
    with pytest.raises(ValueError, match="data_parallel_size=3, but the environment says VLLM_DP_SIZE=2"):
        args.create_engine_config()


def test_each_replica_sees_its_own_gpus_only(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = EngineArgs(model=str(tiny_model_path), device="cpu", data_parallel_size=2, tensor_parallel_size=2)
    config = dataclasses.replace(args.create_engine_config(), device="cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    assert [replica_environment(config, i)["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["3,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    with pytest.raises(ValueError, match="data_parallel_size=2: .* needs 2 .* from number 2 on, and 3 can"):
        replica_environment(config, 1)
    parallel = config.parallel.for_replica(ReplicaPlace(3, 1, "10.0.0.1", 0))
    started_by_hand = dataclasses.replace(config, parallel=parallel)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert replica_environment(started_by_hand, 0)["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_replicas_started_one_by_one_that_share_experts_are_not_for_servers(tiny_model_path: Path) -> None:
    config = EngineArgs(model=str(tiny_model_path), skip_tokenizer_init=True, device="cpu").create_engine_config()
    parallel = ParallelConfig(ParallelLayout(data=2), "uni", True, replica=ReplicaPlace(0, 0, "127.0.0.1", 1))
    with pytest.raises(ValueError, match="for AsyncLLM start one process with data_parallel_size="):
        AsyncLLM(dataclasses.replace(config, parallel=parallel))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data_parallel_balancing": "random"}, "data_parallel_balancing='random': choose one of least"),
        ({"data_parallel_backend": "threads"}, "data_parallel_backend='threads': choose one of mp, ray"),
        ({"data_parallel_backend": "ray"}, "one engine in this process"),
        ({"data_parallel_size": 0}, "data_parallel_size=0 is out of range"),
        ({"data_parallel_size": 2, "enable_expert_parallel": True}, "no experts to share out"),
    ],
)
def test_what_does_not_work_is_refused_by_name(tiny_model_path: Path, wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineArgs(model=str(tiny_model_path), device="cpu", **wrong).create_engine_config()
