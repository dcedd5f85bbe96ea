"""Collectives over gloo, between processes and between threads: what they give and count, and how they fail."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from course_lib.bootstrap.places import REPO_ROOT
from course_lib.parallel.group import PeerLostError, SoloGroup, Traffic
from course_lib.parallel.layout import ParallelLayout
from course_lib.parallel.torch_group import TorchGroup, connect, open_store
from tests.parallel.ranks import run_ranks

RANKS = 3
CPU = torch.device("cpu")


def exchange(rank: int, port: int) -> dict[str, Any]:
    """What each of the processes does: every collective, then rank 1 dies and the others go on."""
    groups = connect(ParallelLayout(RANKS), rank, open_store("127.0.0.1", port, serve=False), CPU)
    group = groups.tensor
    table = torch.arange(12.0).view(6, 2) * 10**rank
    found: dict[str, Any] = {
        "sum": group.all_reduce(table.clone()),
        "sums": {dtype: group.all_reduce(torch.full((3,), rank + 1, dtype=dtype)).tolist()
                 for dtype in (torch.float16, torch.bfloat16, torch.int64)},
        "no rows": group.all_reduce(torch.empty(0, 2)).shape,
        "transposed": group.all_reduce(table.t()),
        "traffic of sums": group.traffic.all_reduce_bytes,
        "rows": group.all_gather(table[:1]),
        "columns": group.all_gather(table[:2, :1], dim=1),
        "last dimension": group.all_gather(table[:2, :1], dim=-1),
        "traffic of gathers": group.traffic.gather_bytes,
        "scattered": group.reduce_scatter(table),
        "dealt": group.all_to_all(table[:3], *DEALS[rank]),
        "nothing dealt": group.all_to_all(table[:0], [0] * RANKS, [0] * RANKS).shape,
        "objects": group.all_gather_object({"rank": rank, "text": "x" * 1000 * rank}),
    }  # fmt: skip
    if rank == 0:
        group.send(table[1:2], 2)
        group.isend(table[2:3], 2).wait()
    if rank == 2:
        found["received"] = [group.receive((1, 2), torch.float32, 0) for _ in range(2)]
    found["traffic"] = replace(group.traffic)
    group.all_gather_object(None)  # nobody leaves early
    if rank == 1:
        return found
    start = time.perf_counter()
    try:
        while True:  # the first may still reach rank 1's socket
            group.all_reduce(torch.ones(1))
    except PeerLostError as error:
        found["lost"] = str(error), time.perf_counter() - start
    groups.close()
    groups.close()
    return found


DEALS = [([1, 2, 0], [1, 0, 0]), ([0, 3, 0], [2, 3, 2]), ([0, 2, 1], [0, 0, 1])]  # rows sent and received, by rank


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank reports. The meeting place is ours, at a port that was free."""
    folder = tmp_path_factory.mktemp("ranks")
    store = open_store("127.0.0.1", 0, serve=True)
    code = (
        "import os, sys, torch; from tests.parallel.test_collectives import exchange;"
        "rank, port, file = sys.argv[1:];"
        "torch.save(exchange(int(rank), int(port)), file); os._exit(0)"  # dies with its connections open
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO_ROOT)}
    files = [folder / f"{rank}.pt" for rank in range(RANKS)]
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(store.port), str(file)], env=environment)
        for rank, file in enumerate(files)
    ]
    try:
        assert [process.wait(120) for process in processes] == [0] * RANKS
    finally:
        for process in processes:
            process.kill()
    return [torch.load(file, weights_only=False) for file in files]


TABLE = torch.arange(12.0).view(6, 2)


def test_every_rank_gets_the_sum(found: list[dict[str, Any]]) -> None:
    for report in found:
        assert torch.equal(report["sum"], TABLE * 111)
        assert torch.equal(report["transposed"], TABLE.t() * 111)
        assert list(report["sums"].values()) == [[6, 6, 6]] * 3
        assert report["no rows"] == (0, 2)


def test_gathered_parts_lie_in_the_order_of_ranks(found: list[dict[str, Any]]) -> None:
    first = TABLE[:1]
    for report in found:
        assert torch.equal(report["rows"], torch.cat((first, first * 10, first * 100)))
        assert torch.equal(report["columns"], TABLE[:2, :1] * torch.tensor([1, 10, 100]))
        assert torch.equal(report["last dimension"], report["columns"])
        assert report["objects"] == [{"rank": rank, "text": "x" * 1000 * rank} for rank in range(RANKS)]


def test_scattered_and_dealt_rows_reach_the_rank_they_are_for(found: list[dict[str, Any]]) -> None:
    for rank, report in enumerate(found):
        assert torch.equal(report["scattered"], TABLE[2 * rank : 2 * rank + 2] * 111)
        assert report["nothing dealt"] == (0, 2)
    assert torch.equal(found[0]["dealt"], TABLE[:1])
    assert torch.equal(found[1]["dealt"], torch.cat((TABLE[1:3], TABLE[:3] * 10, TABLE[:2] * 100)))
    assert torch.equal(found[2]["dealt"], TABLE[2:3] * 100)


def test_a_tensor_is_sent_to_one_rank(found: list[dict[str, Any]]) -> None:
    assert torch.equal(torch.cat(found[2]["received"]), TABLE[1:3])
    assert [report["traffic"].sent_bytes for report in found] == [16, 0, 0]
    assert found[0]["traffic"].sent_calls == 2


def test_traffic_is_what_a_rank_has_put_in(found: list[dict[str, Any]]) -> None:
    for report in found:
        assert report["traffic of sums"] == 2 * TABLE.nbytes + 3 * (2 + 2 + 8)
        assert report["traffic of gathers"] == 8 + 8 + 8
        traffic: Traffic = report["traffic"]
        assert traffic.all_reduce_calls == 6 and traffic.gather_calls == 6
        assert traffic.gather_bytes == 24 + TABLE.nbytes + 24
        assert traffic.bytes == traffic.all_reduce_bytes + traffic.gather_bytes + traffic.sent_bytes


def test_a_peer_that_dies_is_an_error_at_once(found: list[dict[str, Any]]) -> None:
    assert "lost" not in found[1]
    for rank in (0, 2):
        message, seconds = found[rank]["lost"]
        assert f"rank {rank} of 3" in message and "died" in message
        assert seconds < 10


# ---- ranks as threads -------------------------------------------------------------------------------


def open_files_and_threads() -> tuple[int, int]:
    return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))


def given_back(before: tuple[int, int]) -> bool:
    return all(now <= then for now, then in zip(open_files_and_threads(), before, strict=True))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what Linux lists")
def test_closing_gives_back_every_socket_and_thread() -> None:
    layout = ParallelLayout(tensor=2, pipeline=2)

    def use(groups) -> tuple[int, int]:
        groups.tensor.all_gather_object(None)
        groups.pipeline.all_gather_object(None)
        counts = open_files_and_threads()
        groups.tensor.all_gather_object(None)
        groups.pipeline.all_gather_object(None)
        return counts

    run_ranks(layout, use)  # what torch opens once and keeps
    before = open_files_and_threads()
    during = run_ranks(layout, use)[0]
    assert during[0] > before[0] and during[1] > before[1]
    deadline = time.monotonic() + 5
    while not given_back(before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert given_back(before)


def test_a_peer_that_hangs_is_an_error_after_the_time_limit() -> None:
    leave = threading.Event()

    def work(groups) -> float:
        if groups.tensor.rank == 1:
            leave.wait(20)
            return 0.0
        start = time.perf_counter()
        try:
            with pytest.raises(PeerLostError, match="rank 0 of 2.*hangs"):
                groups.tensor.all_reduce(torch.ones(2))
        finally:
            leave.set()
        return time.perf_counter() - start

    assert 0.4 < run_ranks(ParallelLayout(2), work, time_limit_s=0.5)[0] < 10


def test_a_peer_that_never_comes_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        TorchGroup(dist.HashStore(), 0, 2, CPU, time_limit_s=0.2)


def test_groups_are_those_of_the_layout() -> None:
    def places(groups) -> list[tuple[int, int]]:
        return [(group.rank, group.size) for group in (groups.tensor, groups.pipeline, groups.expert)]

    layout = ParallelLayout(tensor=2, pipeline=2)
    assert run_ranks(layout, places) == [
        [(0, 2), (0, 2), (0, 1)], [(1, 2), (0, 2), (0, 1)], [(0, 2), (1, 2), (0, 1)], [(1, 2), (1, 2), (0, 1)]
    ]  # fmt: skip
    assert all(
        run_ranks(ParallelLayout(2), lambda groups: groups.expert is groups.tensor, deal_experts=True)
    )
    replicas = ParallelLayout(tensor=1, data=2)
    assert run_ranks(replicas, places, deal_experts=True) == [[(0, 1), (0, 1), (0, 2)], [(0, 1), (0, 1), (1, 2)]]


def test_two_engines_meet_in_one_process_each_by_itself() -> None:
    totals: dict[int, list[float]] = {}

    def engine(number: int) -> None:
        totals[number] = run_ranks(
            ParallelLayout(2), lambda groups: groups.tensor.all_reduce(torch.tensor([float(number)])).item()
        )

    threads = [threading.Thread(target=engine, args=(number,)) for number in (1, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert totals == {1: [2, 2], 10: [20, 20]}
    assert not dist.is_initialized()


def test_a_group_of_one_hands_back_what_it_is_given() -> None:
    group, x = SoloGroup(), torch.ones(2, 2)
    assert group.all_reduce(x) is x and group.all_gather(x, 1) is x
    assert group.reduce_scatter(x) is x and group.all_to_all(x, [2], [2]) is x
    assert group.all_gather_object("a") == ["a"]
    assert group.traffic.bytes == 0
    with pytest.raises(ValueError, match="nobody to send to"):
        group.send(x, 0)
    with pytest.raises(ValueError, match="nobody to receive from"):
        group.receive((1,), torch.float32, 0)
