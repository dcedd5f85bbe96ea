"""Two replicas in processes of their own: the same answers as from one engine, whatever happens to one of them."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from course_lib import AsyncLLM, EngineArgs, LLMEngine, RequestOutput, RequestOutputKind, SamplingParams
from course_lib.engine.coordinator import AGREE_EVERY
from course_lib.engine.replicated_core import ReplicatedCore
from course_lib.errors import EngineDeadError
from course_lib.executor.portable import plain_config
from course_lib.parallel.config import STEP_TIME_LIMIT
from tests.engine import runner_calls
from tests.engine.conftest import MAX_MODEL_LEN, VOCAB

COUNT = 24
PROMPTS = [[3 + i % 50, 4, 5 + i % 40, 6] for i in range(COUNT)]
DELTA = {"ignore_eos": True, "output_kind": RequestOutputKind.DELTA}
PLAIN = [SamplingParams(temperature=0, max_tokens=12 + i, **DELTA) for i in range(COUNT)]
# Whatever depends on what was generated before, or on how often a generator was used.
DEMANDING = [
    SamplingParams(temperature=0.9 * (i % 3 > 0), seed=i, max_tokens=12 + i, min_tokens=10, top_p=0.95, logprobs=1,
                   presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.1, prompt_logprobs=1, **DELTA)
    for i in range(COUNT)
]  # fmt: skip


def engine_args(path: Path, **more: Any) -> EngineArgs:
    return EngineArgs(model=str(path), skip_tokenizer_init=True, device="cpu", block_size=4, max_num_seqs=8,
                      num_gpu_blocks_override=64, **more)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For each replica, so that tests beside this one keep their cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def replicated(tiny_model_path: Path) -> Iterator[LLMEngine]:
    engine = LLMEngine.from_engine_args(engine_args(tiny_model_path, data_parallel_size=2))
    yield engine
    engine.shutdown()


@pytest.fixture
def engine(replicated: LLMEngine) -> Iterator[LLMEngine]:
    """Two replicas; afterwards nothing may be left of any request."""
    yield replicated
    core = replicated.core
    assert not replicated.has_unfinished_requests() and not core.has_work
    assert core.balancer.loads == {0: 0, 1: 0}
    assert core.reset_prefix_cache()  # only possible where no block is held


class Answers:
    """What came, request by request; complains about anything that comes twice."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[RequestOutput]] = {}

    def take(self, output: RequestOutput) -> None:
        outputs = self.outputs.setdefault(output.request_id, [])
        assert not (outputs and outputs[-1].finished), f"{output.request_id} was answered twice"
        assert sum(bool(one.prompt_logprobs) for one in [*outputs, output]) <= 1
        outputs.append(output)

    @property
    def num_tokens(self) -> int:
        return sum(len(one.outputs[0].token_ids) for outputs in self.outputs.values() for one in outputs)

    def tokens(self, count: int = COUNT) -> list[list[int]]:
        assert sorted(self.outputs) == sorted(map(str, range(count))), "a request was lost"
        every = [self.outputs[str(i)] for i in range(count)]
        assert all(outputs[-1].finished for outputs in every)
        return [[token for output in outputs for token in output.outputs[0].token_ids] for outputs in every]


def serve(engine: LLMEngine, params: list[SamplingParams], victim: int | None = None) -> Answers:
    """Answer all prompts; kill replica `victim` once it has told tokens of several requests that it has to finish."""
    answers = Answers()
    for i, one in enumerate(params):
        engine.add_request(str(i), PROMPTS[i], one)
    while engine.has_unfinished_requests():
        for output in engine.step():
            answers.take(output)
        if victim is not None and num_begun(engine.core, victim) >= 5:
            kill(engine.core, victim)
            victim = None
    assert victim is None
    return answers


@pytest.fixture(scope="module")
def expected(tiny_model_path: Path) -> dict[str, Answers]:
    """The answers of one engine in this process."""
    alone = LLMEngine.from_engine_args(engine_args(tiny_model_path))
    return {"plain": serve(alone, PLAIN), "demanding": serve(alone, DEMANDING)}


def process_of(core: ReplicatedCore, replica: int) -> int:
    return int(core.replicas.links[replica].name.removeprefix("process "))


def num_begun(core: ReplicatedCore, replica: int) -> int:
    """Unfinished requests of which it has told output."""
    entries = core._in_flight.values()
    return sum(entry.replica == replica and entry.request.num_output_tokens > 0 for entry in entries)


def kill(core: ReplicatedCore, replica: int) -> None:
    os.kill(process_of(core, replica), signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def assert_gone(pids: list[int], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "a replica has outlived its front"
        time.sleep(0.05)


# ---- like one engine --------------------------------------------------------------------------------


def test_answers_are_those_of_one_engine_and_each_replica_gives_half(
    engine: LLMEngine, expected: dict[str, Answers]
) -> None:
    before = list(engine.core.balancer.num_assigned)
    assert serve(engine, PLAIN).tokens() == expected["plain"].tokens()
    assert serve(engine, DEMANDING).tokens() == expected["demanding"].tokens()
    assert [now - then for now, then in zip(engine.core.balancer.num_assigned, before, strict=True)] == [COUNT, COUNT]


def test_children_of_one_request_and_final_outputs(engine: LLMEngine, tiny_engine: LLMEngine) -> None:
    params = SamplingParams(n=3, temperature=1, seed=5, max_tokens=9, ignore_eos=True,
                            output_kind=RequestOutputKind.FINAL_ONLY)  # fmt: skip

    def answer(engine: LLMEngine) -> list[list[int]]:
        engine.add_request("n", [3, 4, 5], params)
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        (output,) = outputs
        return [one.token_ids for one in output.outputs]

    assert answer(engine) == answer(tiny_engine)


def test_each_replica_has_a_prefix_cache_and_a_reset_empties_all(engine: LLMEngine) -> None:
    params = SamplingParams(max_tokens=3)
    prompt = list(range(3, 30))

    def cached() -> list[int]:
        for name in "ab":  # one for each replica
            engine.add_request(name, prompt, params)
        assert not engine.reset_prefix_cache()  # somebody needs it
        last = {}
        while engine.has_unfinished_requests():
            last |= {output.request_id: output.num_cached_tokens for output in engine.step()}
        return sorted(last.values())

    assert cached() == [0, 0]
    assert cached() == [24, 24]
    assert engine.reset_prefix_cache()
    assert cached() == [0, 0]


def test_aborting_frees_the_replica_and_harms_nobody(engine: LLMEngine, expected: dict[str, Answers]) -> None:
    answers = Answers()
    for i, one in enumerate(PLAIN):
        engine.add_request(str(i), PROMPTS[i], one)
    while answers.num_tokens < 30:
        for output in engine.step():
            answers.take(output)
    engine.abort_request([str(i) for i in range(8)])
    engine.add_request("0", PROMPTS[0], PLAIN[0])  # the id is free again at once
    assert sum(engine.core.balancer.loads.values()) == engine.get_num_unfinished_requests() <= COUNT - 7
    again = Answers()
    while engine.has_unfinished_requests():
        for output in engine.step():
            (again if output.request_id == "0" else answers).take(output)
    tokens = expected["plain"].tokens()
    assert [token for one in again.outputs["0"] for token in one.outputs[0].token_ids] == tokens[0]
    for i in range(8, COUNT):
        assert [token for one in answers.outputs[str(i)] for token in one.outputs[0].token_ids] == tokens[i]


def test_a_step_that_fails_over_there_fails_here_and_the_engine_lives_on(
    engine: LLMEngine, expected: dict[str, Answers]
) -> None:
    engine.core.collective_rpc(runner_calls.break_model)
    engine.add_request("a", [3, 4], SamplingParams())
    with pytest.raises(ArithmeticError, match="the model broke") as caught:
        while engine.has_unfinished_requests():
            engine.step()
    assert "in fail" in "".join(caught.value.__notes__)  # where it was raised
    assert not engine.has_unfinished_requests()
    engine.core.collective_rpc(runner_calls.mend_model)
    assert serve(engine, PLAIN).tokens() == expected["plain"].tokens()


def test_calls_reach_every_runner_and_their_errors_come_back(engine: LLMEngine) -> None:
    assert len(engine.core.collective_rpc("reset")) == 2
    with pytest.raises(ValueError, match="no method 'nonsense'"):
        engine.core.collective_rpc("nonsense")
    with pytest.raises(ValueError, match="only be sent what they can import"):
        engine.core.collective_rpc(lambda runner: None)
    with pytest.raises(ValueError, match="logits_processors: other processes can only be sent"):
        engine.add_request("a", [3], SamplingParams(logits_processors=[lambda ids, logits: logits]))
    with pytest.raises(ValueError, match="each replica has a cache of its own"):
        engine.subscribe_kv_events(print)


def test_ctrl_c_drops_the_requests_and_the_engine_lives_on(engine: LLMEngine, expected: dict[str, Answers]) -> None:
    for delay_s in (0.0, 0.003, 0.02):
        timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            for i in range(1000):
                engine.add_request(f"{delay_s}-{i}", [3, 4], SamplingParams(max_tokens=60, ignore_eos=True))
                engine.step()
        timer.join()
        engine.abort_request(list(engine.frontend.output_processor.live))
        engine.core.reset()
    assert serve(engine, PLAIN).tokens() == expected["plain"].tokens()


def test_statistics_are_logged_for_each_replica(
    engine: LLMEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for logger in engine.core._stat_loggers.values():
        monkeypatch.setattr(logger, "interval", 0.0)
    with caplog.at_level("INFO"):
        serve(engine, PLAIN)
    for replica in range(2):
        lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith(f"replica {replica}: computed")]
        # how many at once depends on how fast they were handed over
        assert any("running 0" not in line for line in lines) and "running 0, waiting 0" in lines[-1]
        assert all(re.search(r"running [0-8], waiting \d+, KV cache used ", line) for line in lines)


# ---- a replica dies ---------------------------------------------------------------------------------


def test_what_a_killed_replica_had_not_finished_goes_on_elsewhere(
    replicated: LLMEngine, expected: dict[str, Answers], caplog: pytest.LogCaptureFixture
) -> None:
    """The last of this file to use this engine, as one of its replicas is left, and then none."""
    core = replicated.core
    pids = [process_of(core, replica) for replica in range(2)]
    answers = serve(replicated, DEMANDING, victim=1)
    assert "replica 1 (process" in caplog.text and "was killed by SIGKILL; its 12 unfinished requests" in caplog.text
    assert answers.tokens() == expected["demanding"].tokens()
    moved = [outputs for outputs in answers.outputs.values() if outputs[-1].metrics.num_preemptions]
    assert 5 <= len(moved) <= 12 and all(len(outputs) > 1 for outputs in moved)
    for name, mine in answers.outputs.items():
        assert all(len(one.outputs[0].logprobs) == len(one.outputs[0].token_ids) for one in mine)
        theirs = expected["demanding"].outputs[name]
        assert list(map(list, mine[0].prompt_logprobs[1:])) == list(map(list, theirs[0].prompt_logprobs[1:]))
    assert core.balancer.loads == {0: 0} and core.reset_prefix_cache()

    with pytest.raises(EngineDeadError) as caught:
        serve(replicated, PLAIN, victim=0)
    message = str(caught.value)
    assert message.startswith("no replica is left: replica 1 (process ")
    assert message.count("was killed by SIGKILL") == 2
    assert not replicated.has_unfinished_requests()
    with pytest.raises(EngineDeadError, match="no replica is left"):
        replicated.add_request("later", [3], SamplingParams())
    assert not any(map(is_alive, pids))


def test_a_replica_that_cannot_start_ends_the_others_and_says_why(tiny_model_path: Path) -> None:
    args = engine_args(tiny_model_path, data_parallel_size=2)
    args.num_gpu_blocks_override, args.max_model_len = 3, MAX_MODEL_LEN
    with pytest.raises(ValueError, match="too few for one request"):
        LLMEngine.from_engine_args(args)


def test_coroutines_do_not_notice_that_one_replica_dies_and_another_hangs(
    tiny_model_path: Path,
    expected: dict[str, Answers],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(STEP_TIME_LIMIT, "4")
    answers = Answers()

    async def collect(engine: AsyncLLM, i: int) -> None:
        async for output in engine.generate(PROMPTS[i], PLAIN[i], str(i)):
            answers.take(output)

    async def main() -> list[int]:
        args = engine_args(tiny_model_path, data_parallel_size=3)
        engine = AsyncLLM.from_engine_args(args)
        core = engine._core
        pids = [process_of(core, replica) for replica in range(3)]
        tasks = [asyncio.create_task(collect(engine, i)) for i in range(COUNT - 1)]
        while answers.num_tokens < 60:
            await asyncio.sleep(0.001)
        kill(core, 0)
        os.kill(pids[1], signal.SIGSTOP)
        tasks.append(asyncio.create_task(collect(engine, COUNT - 1)))
        await asyncio.wait_for(asyncio.gather(*tasks), timeout=30)
        assert await engine.reset_prefix_cache()
        return pids  # the engine is forgotten, not shut down

    threads = set(threading.enumerate())
    pids = asyncio.run(main())
    assert answers.tokens() == expected["plain"].tokens()
    assert "has said nothing for more than 4 s" in caplog.text
    gc.collect()
    assert_gone(pids, within_s=5)
    for thread in set(threading.enumerate()) - threads:
        thread.join(timeout=5)
        assert not thread.is_alive()


def start_script(text: str, *arguments: object, **environment: str) -> subprocess.Popen[bytes]:
    """A program of its own, without a `__main__` guard."""
    command = [sys.executable, "-c", text, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=os.environ | environment, stdin=pipe, stdout=pipe)


ORPHANS = """
import pickle, sys
from course_lib.core.request import Request
from course_lib.engine.replicated_core import ReplicatedCore
from course_lib.sampling_params import SamplingParams
core = ReplicatedCore(pickle.load(sys.stdin.buffer))
print(*(link.name.removeprefix("process ") for link in core.replicas.links.values()), flush=True)
while True:
    for i in range(20):
        core.add_request(Request(str(i), [3, 4], SamplingParams(max_tokens=60, ignore_eos=True)))
    while core.has_work:
        core.step()
"""


def test_replicas_end_when_their_front_is_killed(tiny_model_path: Path) -> None:
    config = plain_config(engine_args(tiny_model_path, data_parallel_size=2).create_engine_config())
    script = start_script(ORPHANS)  # the front alone, which starts faster than a whole engine
    pickle.dump(config, script.stdin)
    script.stdin.close()
    pids = list(map(int, script.stdout.readline().split()))
    assert len(pids) == 2 and all(map(is_alive, pids))
    script.kill()
    script.wait()
    assert_gone(pids, within_s=5)


# ---- replicas that share experts --------------------------------------------------------------------


@pytest.fixture(scope="module")
def moe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-mixtral")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=MAX_MODEL_LEN, initializer_range=0.4, sliding_window=None,
        num_local_experts=5, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def moe_expected(moe_path: Path) -> list[list[int]]:
    return serve(LLMEngine.from_engine_args(engine_args(moe_path)), PLAIN).tokens()


def test_replicas_that_share_experts_step_together_and_sleep_together(
    moe_path: Path, moe_expected: list[list[int]]
) -> None:
    args = engine_args(moe_path, data_parallel_size=2, enable_expert_parallel=True)
    engine = LLMEngine.from_engine_args(args)
    core = engine.core
    core.collective_rpc(runner_calls.count_passes)
    for rounds, count in enumerate([COUNT, 1, 3, 1], 1):  # with one request the other replica has nothing of its own
        assert serve(engine, PLAIN[:count]).tokens(count) == moe_expected[:count]
        now, before = core.collective_rpc(runner_calls.num_passes), None
        while now != before:  # until they sleep
            time.sleep(0.05)
            before, now = now, core.collective_rpc(runner_calls.num_passes)
        (passes, empty), (other_passes, other_empty) = now
        assert passes + empty == other_passes + other_empty and (passes + empty) % AGREE_EVERY == 0
        assert core._waves.wave >= rounds and not core._waves.running
    assert min(passes, other_passes) > 0 and max(empty, other_empty) > AGREE_EVERY
    assert core.reset_prefix_cache()

    for i in range(COUNT):
        engine.add_request(str(i), PROMPTS[i], PLAIN[i])
    pids = [process_of(core, replica) for replica in range(2)]
    engine.step()
    kill(core, 1)
    with pytest.raises(EngineDeadError, match="share experts .*: replica 1 .* was killed by SIGKILL; replica 0"):
        while engine.has_unfinished_requests():
            engine.step()
    engine.shutdown()
    assert not any(map(is_alive, pids))


ONE_OF_SEVERAL = """
import json, os, sys
os.environ["VLLM_DP_RANK"] = sys.argv[2]
from course_lib import LLM, SamplingParams
llm = LLM(sys.argv[1], skip_tokenizer_init=True, device="cpu", block_size=4, num_gpu_blocks_override=64,
          enable_expert_parallel=True)
for prompts, max_tokens in json.loads(sys.argv[3]):
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in max_tokens]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    print(json.dumps([output.outputs[0].token_ids for output in outputs]), flush=True)
"""


def test_processes_started_one_by_one_share_experts_until_the_last_is_done(
    moe_path: Path, moe_expected: list[list[int]]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shares = [[range(0, 5), range(5, 6)], [range(6, 7), range(0)]]  # by rank and call of generate: some have nothing
    lengths = [params.max_tokens for params in PLAIN]
    scripts = []
    for rank, calls in enumerate(shares):
        work = json.dumps([[[PROMPTS[i] for i in share], [lengths[i] for i in share]] for share in calls])
        scripts.append(
            start_script(ONE_OF_SEVERAL, moe_path, rank, work, VLLM_DP_SIZE="2", VLLM_DP_MASTER_PORT=str(port),
                         VLLM_DP_MASTER_IP="127.0.0.1")
        )  # fmt: skip
    for script, calls in zip(scripts, shares, strict=True):
        output, _ = script.communicate(timeout=60)
        assert script.returncode == 0
        answers = [json.loads(line) for line in output.splitlines()]
        assert answers == [[moe_expected[i] for i in share] for share in calls]
