"""What one stage of a pipeline takes from the stage before it and hands to the stage behind it.

The tokens of a step pass all stages as one message: hidden states and residual, [2, T, hidden]. Every stage
knows T from the schedule, so nothing announces it.

Sending does not wait. A message is gone when the next stage receives it, perhaps after a long step of its own; a
stage that stood still until then would idle. So a stage only ever waits for the stage before it, and the first for
nobody: there is no circle in which all could wait.

Invariant: a message on its way is kept, unchanged. As many are on their way as steps are in flight, at most.

vLLM: `GPUModelRunner.execute_model` and `Worker.execute_model` in `vllm/v1/worker/`, `isend_tensor_dict` in
`vllm/distributed/parallel_state.py`.
"""

from __future__ import annotations

from collections import deque

import torch

from course_lib.models.causal_lm import IntermediateTensors
from course_lib.parallel.group import Group, Sending


class PipelineStage:
    """Args:
    group: the stages, this one being number `group.rank`.
    hidden_size: of the model.
    dtype: of the model.
    """

    def __init__(self, group: Group, hidden_size: int, dtype: torch.dtype) -> None:
        self._group = group
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._on_the_way: deque[Sending] = deque()

    def receive(self, num_tokens: int) -> IntermediateTensors:
        """Wait for the tokens of the next step, both tensors [num_tokens, hidden]."""
        shape = (2, num_tokens, self._hidden_size)
        hidden, residual = self._group.receive(shape, self._dtype, self._group.rank - 1)
        return IntermediateTensors(hidden, residual)

    def send(self, tensors: IntermediateTensors) -> None:
        """Start handing on the tokens of a step."""
        while len(self._on_the_way) >= self._group.size:  # received long ago, or the step could not be in flight
            self._on_the_way.popleft().wait()
        message = torch.stack((tensors.hidden, tensors.residual))
        self._on_the_way.append(self._group.isend(message, self._group.rank + 1))
