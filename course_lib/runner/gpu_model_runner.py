"""The runner on a GPU: a step is launched, and its tokens are fetched later.

Between launching a step and asking for its result the host is free, and may launch the next step: the tokens
that the first one samples go from device to device. The host waits for the device in one place,
`StepInFlight.result`, where it reads the sampled ids. A step is the replay of a CUDA graph (`step_graphs`), fed
by one copy from pinned memory: of one kind for steps in which every request computes one token, of another for
all others; a graph holds the collectives of a tensor-parallel group as well. Steps that collect prompt
log-probabilities, and all steps under `enforce_eager`, of a pipeline, or with experts dealt out, run eagerly.

Invariants: steps run on the device in the order in which they were launched, so a block that was freed and given
to another request is written by its new owner last; at most one step is launched while another is in flight.

vLLM: `vllm/v1/worker/gpu_model_runner.py` (`execute_model`, `AsyncGPUModelRunnerOutput`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from course_lib.attention.metadata import AttentionMetadata
from course_lib.config import EngineConfig
from course_lib.core.messages import LogprobsLists, ModelRunnerOutput, SchedulerOutput
from course_lib.parallel.group import ParallelGroups
from course_lib.runner.device_batch import DeviceBatch
from course_lib.runner.device_inputs import DecodeInputs, TokenInputs
from course_lib.runner.input_batch import slot_mapping
from course_lib.runner.model_runner import ModelRunner
from course_lib.runner.step_graphs import CapturedStep, StepGraphs, capture, decode_sizes, measure_capture, token_sizes
from course_lib.sampling.sampler import LogprobsTensors


@dataclass(slots=True)
class StepInFlight:
    """A launched step. S of its R requests sample a token."""

    runner: GpuModelRunner
    request_ids: list[str]  # R
    sampling: np.ndarray  # int64 [S], indices into request_ids
    places: np.ndarray  # int64 [S], where the sampled tokens will stand in their requests
    tokens: torch.Tensor | None = None  # int64 in pinned memory, valid after `copied`
    picks: np.ndarray | None = None  # int64 [S], indices into `tokens`
    copied: torch.cuda.Event | None = None
    logprobs: LogprobsTensors | None = None
    logprobs_rows: np.ndarray | None = None  # int64 [S], batch rows at the launch
    prompt_logprobs: dict[str, LogprobsLists] | None = None

    def result(self) -> ModelRunnerOutput:
        """Wait for the sampled tokens. Call once."""
        return self.runner.finish(self)


class GpuModelRunner(ModelRunner):
    """CUDA. As `ModelRunner`, and `launch` instead of `execute_model` to keep the host free meanwhile."""

    batch_class = DeviceBatch
    can_run_ahead = True

    def __init__(self, config: EngineConfig, parallel: ParallelGroups | None = None) -> None:
        super().__init__(config, parallel)
        if self.parallel.pipeline.size > 1:
            self.can_run_ahead = False  # a stage's next step is of other requests, or needs what the last one samples
        max_num_seqs, max_blocks = self.batch.block_table.shape
        self.inputs = DecodeInputs(max_num_seqs, self.device)
        self.block_table = torch.zeros((max_num_seqs, max_blocks), dtype=torch.int32, device=self.device)
        self.row_starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=self.device)
        self.token_inputs = TokenInputs(config.scheduler.max_num_batched_tokens, max_num_seqs, self.device)
        self.graphs: tuple[StepGraphs, StepGraphs] | None = None  # of decode steps, of all others
        self._token_logits: torch.Tensor | None = None
        self._newest: StepInFlight | None = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture the graphs, once the cache is there; not under `enforce_eager`, not with the torch backend,
        which plans on the host, and not where ranks wait for each other's host."""
        if self._captures:
            others, decodes = capture(self._captured_steps(), self.device)
            self.graphs = decodes, others

    @torch.inference_mode()
    def graph_memory(self) -> int:
        """Bytes that `warm_up` will take; needs some cache, any size will do."""
        return measure_capture(self._captured_steps(), self.device) if self._captures else 0

    @property
    def _captures(self) -> bool:
        parallel = self.parallel
        alone = parallel.pipeline.size == parallel.expert.size == 1
        return alone and not self.config.enforce_eager and self.config.attention_backend == "triton"

    def _captured_steps(self) -> list[CapturedStep]:
        """Of any numbers of tokens, and of one token each."""
        limits = self.config.scheduler
        if self._token_logits is None:
            self._token_logits = torch.empty(
                (limits.max_num_seqs, self.config.model.vocab_size), dtype=self.dtype, device=self.device
            )
        return [
            (token_sizes(limits.max_num_batched_tokens), self._compute_tokens),
            (decode_sizes(limits.max_num_seqs), self._decode),
        ]

    # ---- one step -------------------------------------------------------------------------------

    def execute_model(self, scheduled: SchedulerOutput) -> ModelRunnerOutput | None:
        output = self.launch(scheduled).result()
        return output if self.parallel.is_last_stage else None

    @torch.inference_mode()
    def launch(self, scheduled: SchedulerOutput) -> StepInFlight:
        """Queue a step on the device and return before it is done. Rows are computed in the batch's order."""
        self._update_states(scheduled)
        counts_by_id = scheduled.num_scheduled_tokens
        if not counts_by_id:
            return self._nothing_sampled()
        rows_of = self.batch.rows
        rows = np.fromiter((rows_of[i] for i in counts_by_id), np.int64, len(counts_by_id))
        counts = np.fromiter(counts_by_id.values(), np.int64, len(counts_by_id))
        order = np.argsort(rows)
        rows, counts = rows[order], counts[order]
        self._update_table()
        if self.graphs is None or self.batch.wants_prompt_logprobs[rows].any():
            step = self._launch_eager(rows, counts)
        elif counts.max() == 1:
            step = self._launch_decode(self.graphs[0], rows)
        else:
            step = self._launch_tokens(self.graphs[1], rows, counts)
        self._newest = step
        return step

    def _update_table(self) -> None:
        changes = self.batch.take_table_changes()
        if changes is not None:
            cells, values = self._to_device(changes)
            self.block_table.view(-1).index_copy_(0, cells, values.to(torch.int32))

    def _launch_decode(self, graphs: StepGraphs, rows: np.ndarray) -> StepInFlight:
        """One token for each of `rows`, by a graph."""
        batch = self.batch
        positions = batch.num_computed[rows].astype(np.int64)
        slots = slot_mapping(batch.block_table, rows, positions, self.block_size)
        self.inputs.fill(rows, batch.token_ids[rows, positions], batch.in_flight_index[rows], positions, slots)
        padded = graphs.size_for(len(batch.request_ids))
        return self._sample_replayed(graphs.replay(padded), rows, np.ones_like(rows), padded)

    def _launch_tokens(self, graphs: StepGraphs, rows: np.ndarray, counts: np.ndarray) -> StepInFlight:
        """Any number of tokens for each of `rows`, by a graph. No token of theirs is in flight: a step that
        is scheduled ahead computes one token a row."""
        batch = self.batch
        computed = batch.num_computed[rows].astype(np.int64)
        token_rows = np.repeat(rows, counts)
        ends = np.cumsum(counts)
        positions = np.arange(ends[-1]) + np.repeat(computed - ends + counts, counts)
        slots = slot_mapping(batch.block_table, token_rows, positions, self.block_size)
        ids = batch.token_ids[token_rows, positions]
        self.token_inputs.fill(rows, counts, computed + counts, ids, positions, slots)
        return self._sample_replayed(graphs.replay(graphs.size_for(len(ids))), rows, counts, int(rows[-1]) + 1)

    def _sample_replayed(
        self, logits: torch.Tensor, rows: np.ndarray, counts: np.ndarray, fetched: int
    ) -> StepInFlight:
        """After a replay, which has left logits and their argmax at the requests' rows. Fetches `fetched` rows."""
        batch = self.batch
        step = self._start_step(rows, counts)
        sampled_rows = rows[step.sampling]
        if not batch.takes_argmax[sampled_rows].all():
            index = self._to_device(sampled_rows)
            self._sample_into(step, logits.index_select(0, index), sampled_rows, index)
        self._fetch(step, sampled_rows, fetched, sampled_rows)
        return step

    def _decode(self, size: int) -> torch.Tensor:
        """The decode step that graphs capture: the first `size` rows; writes their argmax, returns their logits."""
        inputs = self.inputs
        metadata = AttentionMetadata(
            query_start_loc=self.row_starts[: size + 1],
            seq_lens=inputs.seq_lens[:size],
            block_table=self.block_table[:size],
            slot_mapping=inputs.slots[:size],
            query_start_loc_host=np.arange(size + 1),
            seq_lens_host=np.zeros(size, np.int32),  # known to the device alone
            max_query_len=1,
            max_seq_len=self.block_table.shape[1] * self.block_size,
        )
        input_ids = inputs.tokens.index_select(0, inputs.source[:size])
        hidden = self.model(input_ids, inputs.positions[:size], metadata)
        logits = self.model.compute_logits(hidden)
        torch.argmax(logits, dim=-1, out=inputs.sampled[:size])
        return logits

    def _compute_tokens(self, size: int) -> torch.Tensor:
        """The other step that graphs capture: `size` tokens; returns the logits of every row's last one."""
        inputs = self.token_inputs
        metadata = AttentionMetadata(
            query_start_loc=inputs.starts,
            seq_lens=inputs.seq_lens,
            block_table=self.block_table,
            slot_mapping=inputs.slots[:size],
            query_start_loc_host=np.zeros(inputs.num_rows + 1, np.int64),  # known to the device alone
            seq_lens_host=np.zeros(inputs.num_rows, np.int32),
            max_query_len=size,
            max_seq_len=self.block_table.shape[1] * self.block_size,
        )
        hidden = self.model(inputs.ids[:size], inputs.positions[:size], metadata)
        # Every size leaves its logits in the same place: each keeping its own would cost a lot of memory.
        logits = self._token_logits.copy_(self.model.compute_logits(hidden.index_select(0, inputs.last)))
        torch.argmax(logits, dim=-1, out=self.inputs.sampled)
        return logits

    def _launch_eager(self, rows: np.ndarray, counts: np.ndarray) -> StepInFlight:
        """Any step; sampled tokens stand one after another."""
        input_ids, positions, metadata = self._prepare_inputs(rows, counts)
        ends = metadata.query_start_loc_host[1:]
        in_flight = self.batch.in_flight_index[rows]
        if (in_flight >= 0).any():  # these rows compute the one token that only the device knows
            pending = np.flatnonzero(in_flight >= 0)
            places = self._to_device(np.stack((ends[pending] - 1, in_flight[pending])))
            input_ids.index_copy_(0, places[0], self.inputs.sampled.index_select(0, places[1]))
        hidden = self._compute(input_ids, positions, metadata)
        if hidden is None:
            self.batch.num_computed[rows] += counts.astype(np.int32)
            return self._nothing_sampled()
        prompt_logprobs = self._collect_prompt_logprobs(rows, counts, metadata, hidden)

        step = self._start_step(rows, counts)
        step.prompt_logprobs = prompt_logprobs
        count = len(step.sampling)
        if count:
            logits = self.model.compute_logits(hidden.index_select(0, self._to_device(ends[step.sampling] - 1)))
            sampled_rows = rows[step.sampling]
            if self.batch.takes_argmax[sampled_rows].all():
                torch.argmax(logits, dim=-1, out=self.inputs.sampled[:count])
            else:
                self._sample_into(step, logits, sampled_rows, slice(count))
            self._fetch(step, sampled_rows, count, np.arange(count))
        return step

    def _nothing_sampled(self) -> StepInFlight:
        none = np.zeros(0, np.int64)
        return StepInFlight(self, [], none, none)

    def _start_step(self, rows: np.ndarray, counts: np.ndarray) -> StepInFlight:
        """Count the step's tokens as computed, and those it samples as existing."""
        batch = self.batch
        batch.num_computed[rows] += counts.astype(np.int32)
        sampling = np.flatnonzero(batch.num_computed[rows] == batch.num_tokens[rows])
        sampled_rows = rows[sampling]
        places = batch.num_tokens[sampled_rows].astype(np.int64)
        batch.num_tokens[sampled_rows] += 1
        return StepInFlight(self, [batch.request_ids[row] for row in rows.tolist()], sampling, places)

    def _sample_into(
        self, step: StepInFlight, logits: torch.Tensor, rows: np.ndarray, places: torch.Tensor | slice
    ) -> None:
        """Let the sampler choose for `rows`; the tokens go to `places` among the sampled ones."""
        out = self.sampler(logits, self.sampling_inputs.for_rows(rows))
        self.inputs.sampled[places] = out.sampled_token_ids
        step.logprobs, step.logprobs_rows = out.logprobs, rows

    def _fetch(self, step: StepInFlight, rows: np.ndarray, count: int, picks: np.ndarray) -> None:
        """Start copying the first `count` sampled tokens to the host; those of `rows` are at `picks`."""
        step.tokens = torch.empty(count, dtype=torch.int64, pin_memory=True)
        step.tokens.copy_(self.inputs.sampled[:count], non_blocking=True)
        step.picks = picks
        step.copied = torch.cuda.Event()
        step.copied.record()
        self.batch.in_flight_index[rows] = picks

    def finish(self, step: StepInFlight) -> ModelRunnerOutput:
        """Wait for a step's tokens and enter them wherever the requests' rows are by now."""
        batch = self.batch
        if self._newest is step:
            self._newest = None
            batch.in_flight_index.fill(-1)
        request_ids = step.request_ids
        sampled: list[list[int]] = [[] for _ in request_ids]
        logprobs: list[LogprobsLists | None] | None = None
        if step.copied is not None:
            step.copied.synchronize()
            tokens = step.tokens.numpy()[step.picks]
            rows = np.full(len(tokens), -1)
            for j, (i, token) in enumerate(zip(step.sampling.tolist(), tokens.tolist(), strict=True)):
                sampled[i] = [token]
                request_id = request_ids[i]
                state = self.states.get(request_id)
                if state is not None:  # not ended meanwhile
                    state.output_token_ids.append(token)
                    rows[j] = batch.rows.get(request_id, -1)
            # A request at max_model_len is about to be finished by the scheduler: it has no column left.
            fits = (rows >= 0) & (step.places < batch.token_ids.shape[1])
            batch.token_ids[rows[fits], step.places[fits]] = tokens[fits]
            if step.logprobs is not None:
                logprobs = [None] * len(request_ids)
                lists = self._split_logprobs(step.logprobs_rows, step.logprobs)
                for i, row_lists in zip(step.sampling.tolist(), lists, strict=True):
                    logprobs[i] = row_lists
        errors = {s.request_id: s.error for s in batch.states if s.error is not None}
        return ModelRunnerOutput(request_ids, sampled, logprobs, step.prompt_logprobs or {}, errors)

    def reset(self) -> None:
        super().reset()
        self._newest = None

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        """Through pinned memory: a copy from pageable memory would make the host wait for the device."""
        return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)
