"""Data parallelism without processes: who is given a request, when replicas may sleep, what is refused."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, deque
from pathlib import Path

import pytest

from course_lib import AsyncLLM, EngineArgs
from course_lib.engine.balancer import Balancer
from course_lib.engine.coordinator import WaveCoordinator, WaveMember
from course_lib.engine.replica_set import replica_environment
from course_lib.parallel.config import ParallelConfig
from course_lib.parallel.layout import ParallelLayout
from course_lib.parallel.replicas import ReplicaPlace, read_environment

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


class Rank:
    """A replica in lock step, cut into the moments between which others can act."""

    def __init__(self, agree_every: int, member: type[WaveMember]) -> None:
        self.member = member(agree_every)
        self.inbox: deque[tuple[str, int, int]] = deque()  # kind, wave, passes that a request needs
        self.told: deque[tuple[str, int]] = deque()  # to the coordinator
        self.left: list[int] = []  # passes that its requests still need
        self.waits_in: str | None = None  # a collective
        self.result: bool | None = None  # of that collective, not yet taken in
        self.passes: Counter[int] = Counter()  # by wave
        self.served = 0

    def act(self, rng: random.Random, is_first: bool) -> bool:
        """Do one thing; False if there is nothing to do but to wait."""
        if self.waits_in is not None:
            if self.result is None:
                return False
            self._leave_collective(is_first)
        elif self.inbox and (not self.member.running or rng.random() < 0.5):
            self._take_message()
        elif self.member.running:
            self.passes[self.member.wave] += 1
            self.waits_in = "pass"
        else:
            return False
        return True

    def _take_message(self) -> None:
        kind, wave, needs = self.inbox.popleft()
        if kind == "start":
            self.member.on_start(wave)
        else:
            self.left.append(needs)
            if self.member.on_request(wave):
                self.told.append(("alone", self.member.wave))

    def _leave_collective(self, is_first: bool) -> None:
        kind, result, self.waits_in, self.result = self.waits_in, self.result, None, None
        if kind == "agreement":
            wave = self.member.wave
            if self.member.agreed(result) and is_first:
                self.told.append(("complete", wave))
            return
        self.served += sum(needs == 1 for needs in self.left)
        self.left = [needs - 1 for needs in self.left if needs > 1]
        if self.member.after_pass():
            self.waits_in = "agreement"


def simulate(seed: int, member: type[WaveMember] = WaveMember) -> list[Rank]:
    """Requests at random moments, everything in any order that pipes and collectives permit."""
    rng = random.Random(seed)
    ranks = [Rank(rng.choice([1, 2, 5]), member) for _ in range(rng.randint(2, 4))]
    for rank in ranks:
        rank.member._agree_every = ranks[0].member._agree_every
    front, num_requests = WaveCoordinator(), rng.randint(1, 12)
    patience = rng.choice([0.02, 0.2, 0.9])  # of who sends requests

    def call(wave: int, but: Rank) -> None:
        for rank in ranks:
            if rank is not but:
                rank.inbox.append(("start", wave, 0))

    def hear() -> bool:
        telling = [rank for rank in ranks if rank.told]
        if not telling:
            return False
        rank = rng.choice(telling)
        kind, wave = rank.told.popleft()
        if kind == "complete":
            front.on_complete(wave)
        elif front.on_alone(wave):
            call(wave, but=rank)
        return True

    sent = 0
    for _ in range(20_000):
        idle = not any(rank.member.running or rank.inbox or rank.told for rank in ranks)
        if sent == num_requests and idle:
            break
        if sent < num_requests and (idle or rng.random() < patience):
            target = rng.choice(ranks)
            wave, wakes = front.on_request()
            target.inbox.append(("request", wave, rng.randint(1, 6)))
            sent += 1
            if wakes:
                call(wave, but=target)
        actors = [*ranks, "front", "collective"]
        rng.shuffle(actors)
        for actor in actors:
            if actor == "front":
                acted = hear()
            elif actor == "collective":
                acted = all(rank.waits_in and rank.result is None for rank in ranks)
                if acted:
                    assert len({rank.waits_in for rank in ranks}) == 1, "deadlock: in different collectives"
                    anybody = any(rank.left for rank in ranks)
                    for rank in ranks:
                        rank.result = anybody
            else:
                acted = actor.act(rng, is_first=actor is ranks[0])
            if acted:
                break
        else:
            raise AssertionError(f"deadlock: {[rank.waits_in for rank in ranks]}")
        assert all(front.wave <= rank.member.wave for rank in ranks if rank.result is None)
    assert sum(rank.served for rank in ranks) == num_requests, "a request was lost"
    assert not any(rank.member.running for rank in ranks), "somebody never sleeps"
    return ranks


def test_whatever_the_order_no_request_is_lost_and_all_run_equally_many_passes() -> None:
    waves = 0
    for seed in range(1500):
        ranks = simulate(seed)
        assert all(rank.passes == ranks[0].passes for rank in ranks), seed
        waves += len(ranks[0].passes)
    assert waves > 3000  # many waves each, or nothing was tested


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
    with pytest.raises(AssertionError, match="deadlock|in wave"):
        for seed in range(1500):
            simulate(seed, member)


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
