"""Groups over torch's process groups: gloo between CPUs, NCCL between GPUs.

The process groups are made directly, not through `torch.distributed.init_process_group`, whose default group is one
per process: so several engines, and a learner's own `torch.distributed` code, live side by side. Objects always
travel by gloo. vLLM: `stateless_init_torch_distributed_process_group` in `vllm/distributed/utils.py`.
"""

from __future__ import annotations

import datetime
import pickle
from typing import Any

import torch
import torch.distributed as dist

from course_lib.parallel.group import Group, ParallelGroups, PeerLostError, Sending, SoloGroup, Traffic
from course_lib.parallel.layout import ParallelLayout

TIME_LIMIT_S = 600.0


class TorchGroup:
    """Args:
    store: where the ranks of this group, and no others, find each other.
    device: of the tensors.
    host: interface that gloo listens on, as a name or address.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        device: torch.device,
        *,
        host: str = "127.0.0.1",
        time_limit_s: float = TIME_LIMIT_S,
    ) -> None:
        self.rank = rank
        self.size = size
        self.traffic = Traffic()
        self._device = device
        limit = datetime.timedelta(seconds=time_limit_s)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = limit
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, options)
        self._tensors: Any = self._gloo
        if device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = limit
            self._tensors = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, nccl)
            self._tensors.eager_connect_single_device(device)  # its memory is taken now, not in the first step

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        self.traffic.all_reduce_calls += 1
        self.traffic.all_reduce_bytes += tensor.nbytes
        self._wait(self._tensors.allreduce([tensor]))
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        tensor = tensor.contiguous()
        self._count_gather(tensor)
        parts = tensor.new_empty((self.size, *tensor.shape))
        self._wait(self._tensors._allgather_base(parts.view(-1), tensor.view(-1)))
        dim %= tensor.dim()
        return parts.movedim(0, dim).flatten(dim, dim + 1)  # no copy for dim 0

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        self._count_gather(tensor)
        share = tensor.new_empty((tensor.shape[0] // self.size, *tensor.shape[1:]))
        self._wait(self._tensors._reduce_scatter_base(share.view(-1), tensor.view(-1)))
        return share

    def all_to_all(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        tensor = tensor.contiguous()
        self._count_gather(tensor)
        received = tensor.new_empty((sum(receive), *tensor.shape[1:]))
        self._wait(self._tensors.alltoall_base(received, tensor, receive, send))
        return received

    def send(self, tensor: torch.Tensor, to: int) -> None:
        self.isend(tensor, to).wait()

    def isend(self, tensor: torch.Tensor, to: int) -> Sending:
        tensor = tensor.contiguous()
        self.traffic.sent_calls += 1
        self.traffic.sent_bytes += tensor.nbytes
        return _Sending(self, self._tensors.send([tensor], to, 0))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        self._wait(self._tensors.recv([tensor], source, 0))
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        data = pickle.dumps(value)
        sizes = torch.empty(self.size, dtype=torch.int64)
        self._wait(self._gloo._allgather_base(sizes, torch.tensor([len(data)])))
        longest = int(sizes.max())
        padded = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8)
        everyone = torch.empty(self.size * longest, dtype=torch.uint8)
        self._wait(self._gloo._allgather_base(everyone, padded))
        rows = everyone.view(self.size, longest).numpy()
        return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)]

    def close(self) -> None:
        if self._tensors is not self._gloo:
            self._tensors.shutdown()
        self._tensors = self._gloo = None

    def _count_gather(self, tensor: torch.Tensor) -> None:
        self.traffic.gather_calls += 1
        self.traffic.gather_bytes += tensor.nbytes

    def _wait(self, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise PeerLostError(
                f"rank {self.rank} of {self.size}: another rank of its group has died, hangs or is out of step"
            ) from error


class _Sending:
    def __init__(self, group: TorchGroup, work: dist.Work) -> None:
        self._group, self._work = group, work  # the work keeps the tensor alive

    def wait(self) -> None:
        self._group._wait(self._work)


def connect(
    layout: ParallelLayout,
    rank: int,
    store: dist.Store,
    device: torch.device,
    *,
    deal_experts: bool = False,
    host: str = "127.0.0.1",
    time_limit_s: float = TIME_LIMIT_S,
) -> ParallelGroups:
    """Meet the other ranks of `layout` in `store` and make this rank's groups. Every rank must call it.

    `deal_experts` gives whole experts to the ranks of `layout.expert_groups()`; otherwise `expert` is a group of one.
    """

    def make(kind: str, groups: list[list[int]]) -> Group:
        number, members = next((i, ranks) for i, ranks in enumerate(groups) if rank in ranks)
        if len(members) == 1:
            return SoloGroup()
        meeting = dist.PrefixStore(f"{kind}{number}", store)
        return TorchGroup(
            meeting, members.index(rank), len(members), device, host=host, time_limit_s=time_limit_s
        )

    tensor = make("tensor", layout.tensor_groups())
    pipeline = make("pipeline", layout.pipeline_groups())
    if not deal_experts:
        expert = SoloGroup()
    elif layout.data == 1:
        expert = tensor  # the same ranks
    else:
        expert = make("expert", layout.expert_groups())
    return ParallelGroups(tensor, pipeline, expert)


def open_store(host: str, port: int, *, serve: bool, time_limit_s: float = TIME_LIMIT_S) -> dist.TCPStore:
    """The meeting place. With `serve` it is made here, and port 0 chooses a free one (`store.port`)."""
    limit = datetime.timedelta(seconds=time_limit_s)
    return dist.TCPStore(host, port, is_master=serve, timeout=limit, wait_for_workers=False)
