"""Runs the model for one step: from a `SchedulerOutput` to sampled tokens.

Owns the model, the cache tensors and the per-request state on this side of the scheduler's border.
A step is: take in the scheduler's differences; lay all new tokens of all requests out as one flat
batch; run the model once; sample for those requests whose last known token was in the batch.

A model on several ranks has a runner on each, and all are given the same schedule. Ranks of a tensor-parallel
group compute the same logits and sample the same tokens with generators of the same seed: nothing is sent back.
Of the stages of a pipeline the last one samples. The others only learn from the scheduler what it sampled, when
that is to be computed, so theirs is a request's state without what sampling needs.

Invariants: after a step, `num_computed` of every row is what the scheduler thinks it is. Steps are executed in the
order in which they were planned, on every rank.

vLLM: `vllm/v1/worker/gpu_model_runner.py`.
"""

from __future__ import annotations

import numpy as np
import torch

from course_lib.attention.backend import make_backend
from course_lib.attention.metadata import AttentionMetadata
from course_lib.config import EngineConfig
from course_lib.core.messages import LogprobsLists, ModelRunnerOutput, NewRequestData, SchedulerOutput
from course_lib.models.loader import load_model
from course_lib.parallel.group import ParallelGroups
from course_lib.runner.input_batch import InputBatch, RequestState, slot_mapping
from course_lib.runner.pipeline_stage import PipelineStage
from course_lib.runner.prompt_logprobs import PendingPromptLogprobs
from course_lib.runner.sampling_inputs import SamplingInputs
from course_lib.sampling.draw import skip_draws
from course_lib.sampling.sampler import LogprobsTensors, Sampler


class ModelRunner:
    """Eager PyTorch. Call `load_model`, then `initialize_cache`, then `execute_model`.

    On a GPU the engine uses `gpu_model_runner`, which launches steps without waiting for them.

    Args:
        config: of the whole engine.
        parallel: the groups of this rank, one of several; None: the model is whole.
    """

    batch_class = InputBatch
    can_run_ahead = False

    def __init__(self, config: EngineConfig, parallel: ParallelGroups | None = None) -> None:
        self.config = config
        self.parallel = parallel or ParallelGroups.solo()
        self.device = torch.device(config.device)
        self.dtype = getattr(torch, config.model.dtype)
        self.block_size = config.cache.block_size
        self.sampler = Sampler()
        # The engine's own source of randomness: torch's global generator is not touched.
        self.generator = torch.Generator(self.device).manual_seed(config.model.seed)
        self.states: dict[str, RequestState] = {}
        limits = config.scheduler
        self.batch = self.batch_class(limits.max_num_seqs, limits.max_model_len, self.block_size)
        self.sampling_inputs = SamplingInputs(
            self.batch, self.generator, self.device, config.model.vocab_size
        )
        self.backend = make_backend(
            config.attention_backend,
            block_size=self.block_size,
            num_kv_heads=config.model.kv_heads_per_rank(config.parallel.layout),
            head_dim=config.model.head_dim,
            dtype=self.dtype,
            device=self.device,
        )
        self.stage = PipelineStage(self.parallel.pipeline, config.model.hf_config.hidden_size, self.dtype)

    def load_model(self) -> None:
        """Read the weights. Raises CourseError if the files are not what they should be."""
        model = self.config.model
        self.model = load_model(
            model.path, model.hf_config, dtype=self.dtype, device=self.device,
            max_model_len=model.max_model_len, load_format=model.load_format, seed=model.seed,
            parallel=self.parallel,
        )  # fmt: skip
        self.model.pack_weights()

    def initialize_cache(self, num_blocks: int) -> None:
        """Allocate the paged cache and bind it to the model's attention layers."""
        layers = self.model.attention_layers()
        for layer, kv_cache in zip(layers, self.backend.allocate_cache(len(layers), num_blocks), strict=True):
            layer.bind(self.backend, kv_cache)

    def warm_up(self) -> None:
        """What is better done before the first request, once the cache is there; here nothing."""

    # ---- one step -------------------------------------------------------------------------------

    @torch.inference_mode()
    def execute_model(self, scheduled: SchedulerOutput) -> ModelRunnerOutput | None:
        """Compute every scheduled token; sample one token for each request that is caught up.

        None on a stage of a pipeline that does not sample.
        """
        self._update_states(scheduled)
        if not scheduled.num_scheduled_tokens:
            return ModelRunnerOutput([], [])
        request_ids = list(scheduled.num_scheduled_tokens)
        rows = np.fromiter((self.batch.rows[i] for i in request_ids), np.int64, len(request_ids))
        counts = np.fromiter(scheduled.num_scheduled_tokens.values(), np.int64, len(request_ids))
        input_ids, positions, metadata = self._prepare_inputs(rows, counts)
        hidden = self._compute(input_ids, positions, metadata)
        if hidden is None:
            self.batch.num_computed[rows] += counts.astype(np.int32)
            return None
        prompt_logprobs = self._collect_prompt_logprobs(rows, counts, metadata, hidden)
        self.batch.num_computed[rows] += counts.astype(np.int32)
        caught_up = np.flatnonzero(self.batch.num_computed[rows] == self.batch.num_tokens[rows])
        return self._sample(request_ids, rows, caught_up, metadata, hidden, prompt_logprobs)

    def _update_states(self, scheduled: SchedulerOutput) -> None:
        """Take in what the scheduler says has changed."""
        for request_id in scheduled.finished_request_ids:
            self.batch.remove(request_id)
            self.states.pop(request_id, None)
        for request_id in scheduled.preempted_request_ids:
            self.batch.remove(request_id)
        for new in scheduled.new_requests:
            state = self.states.get(new.request_id)
            if state is None or not self.parallel.is_last_stage:  # resumed: others do not know what was sampled since
                state = self.states[new.request_id] = self._make_state(new)
            self.batch.add(state, new.block_ids, new.num_computed_tokens)
        cached = scheduled.cached_requests
        rows = [self.batch.rows[request_id] for request_id in cached.request_ids]
        self.batch.num_computed[rows] = cached.num_computed_tokens
        for row, new_blocks in zip(rows, cached.new_block_ids, strict=True):
            if new_blocks:
                self.batch.append_blocks(row, new_blocks)
        if not self.parallel.is_last_stage:
            counts = map(scheduled.num_scheduled_tokens.__getitem__, cached.request_ids)
            starts = cached.num_computed_tokens
            for row, start, count, token_ids in zip(rows, starts, counts, cached.new_token_ids, strict=True):
                self.batch.write_tokens(row, start + count - len(token_ids), token_ids)

    def _make_state(self, new: NewRequestData) -> RequestState:
        params = new.sampling_params
        state = RequestState(new.request_id, params, new.prompt_token_ids, new.output_token_ids)
        if not self.parallel.is_last_stage:
            return state
        if params.seed is not None:
            state.generator = torch.Generator(self.device).manual_seed(params.seed)
            # Tokens that were sampled before we heard of the request: by another replica, which is gone.
            skip_draws(state.generator, self.config.model.vocab_size, len(new.output_token_ids))
        if params.prompt_logprobs is not None:
            state.pending_prompt_logprobs = PendingPromptLogprobs(new.prompt_token_ids, params.prompt_logprobs)
        return state

    def _prepare_inputs(
        self, rows: np.ndarray, counts: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
        """Lay out the flat batch. rows, counts: int64 [R], R requests with counts[i] new tokens."""
        batch = self.batch
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        token_rows = np.repeat(rows, counts)
        computed = batch.num_computed[rows].astype(np.int64)
        positions = np.arange(starts[-1]) + np.repeat(computed - starts[:-1], counts)
        input_ids = batch.token_ids[token_rows, positions].astype(np.int64)
        slots = slot_mapping(batch.block_table, token_rows, positions, self.block_size)
        seq_lens = (computed + counts).astype(np.int32)
        max_seq_len = int(seq_lens.max())
        table = batch.block_table[rows, : -(-max_seq_len // self.block_size)]
        metadata = AttentionMetadata(
            query_start_loc=self._to_device(starts.astype(np.int32)),
            seq_lens=self._to_device(seq_lens),
            block_table=self._to_device(table),
            slot_mapping=self._to_device(slots),
            query_start_loc_host=starts,
            seq_lens_host=seq_lens,
            max_query_len=int(counts.max()),
            max_seq_len=max_seq_len,
        )
        metadata.plan = self.backend.plan(metadata)
        return self._to_device(input_ids), self._to_device(positions), metadata

    def _compute(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor | None:
        """Run this rank's layers. [T, hidden] to sample from; None on a stage that has handed them on instead."""
        if self.parallel.is_first_stage:
            states = self.model(input_ids, positions, metadata)
        else:
            received = self.stage.receive(len(positions))
            states = self.model(None, positions, metadata, intermediate=received)
        if self.parallel.is_last_stage:
            return states
        self.stage.send(states)
        return None

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _collect_prompt_logprobs(
        self, rows: np.ndarray, counts: np.ndarray, metadata: AttentionMetadata, hidden: torch.Tensor
    ) -> dict[str, LogprobsLists]:
        """Advance the requests that asked for them; return those now complete."""
        complete: dict[str, LogprobsLists] = {}
        for i, row in enumerate(rows.tolist()):
            state = self.batch.states[row]
            pending = state.pending_prompt_logprobs
            if pending is None:
                continue
            start = metadata.query_start_loc_host[i]
            pending.add(
                hidden[start : start + counts[i]], int(self.batch.num_computed[row]), self.model.compute_logits
            )
            if pending.is_complete:
                complete[state.request_id] = pending.result()
                state.pending_prompt_logprobs = None
        return complete

    def _sample(
        self,
        request_ids: list[str],
        rows: np.ndarray,
        caught_up: np.ndarray,
        metadata: AttentionMetadata,
        hidden: torch.Tensor,
        prompt_logprobs: dict[str, LogprobsLists],
    ) -> ModelRunnerOutput:
        """Sample one token for each request in `caught_up` (indices into `request_ids`)."""
        sampled: list[list[int]] = [[] for _ in request_ids]
        logprobs: list[LogprobsLists | None] | None = None
        if len(caught_up):
            last = metadata.query_start_loc_host[1:][caught_up] - 1
            logits = self.model.compute_logits(hidden[self._to_device(last)])
            sampled_rows = rows[caught_up]
            out = self.sampler(logits, self.sampling_inputs.for_rows(sampled_rows))
            tokens = out.sampled_token_ids.cpu().numpy()
            self.batch.append_tokens(sampled_rows, tokens)
            for i, token_id in zip(caught_up.tolist(), tokens.tolist(), strict=True):
                sampled[i] = [token_id]
            if out.logprobs is not None:
                logprobs = [None] * len(request_ids)
                for i, lists in zip(caught_up, self._split_logprobs(sampled_rows, out.logprobs), strict=True):
                    logprobs[i] = lists
        errors = {s.request_id: s.error for s in self.batch.states if s.error is not None}
        return ModelRunnerOutput(request_ids, sampled, logprobs, prompt_logprobs, errors)

    def execute_dummy_batch(self) -> None:
        """Take part, without a token of our own, in a step of replicas whose experts are partly here."""
        self.model.forward_without_tokens()

    def reset(self) -> None:
        """Forget all requests: after an interrupted step nothing here can be trusted."""
        self.states.clear()
        self.batch.clear()

    def _split_logprobs(self, rows: np.ndarray, tensors: LogprobsTensors) -> list[LogprobsLists | None]:
        """Per row: as many alternatives as *that* request asked for."""
        token_ids, values = tensors.token_ids.tolist(), tensors.logprobs.tolist()
        ranks = tensors.ranks.tolist()
        lists: list[LogprobsLists | None] = []
        for i, row in enumerate(rows.tolist()):
            wanted = self.batch.states[row].sampling_params.logprobs
            if wanted is None:
                lists.append(None)
                continue
            width = len(token_ids[i]) if wanted == -1 else wanted + 1
            lists.append(LogprobsLists([token_ids[i][:width]], [values[i][:width]], [ranks[i]]))
        return lists
