"""What the sampler needs to know about the rows that sample in this step.

In steady decoding the same rows sample step after step, so the metadata is rebuilt only when the
rows or their owners change. Lists of output tokens are live: they grow without a rebuild.

vLLM: `InputBatch._make_sampling_metadata` in `vllm/v1/worker/gpu_input_batch.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from course_lib.runner.input_batch import InputBatch, RequestState
from course_lib.sampling.metadata import SamplingMetadata
from course_lib.sampling_checks import processor_arity
from course_lib.sampling_params import GREEDY_TEMPERATURE, SamplingParams


class SamplingInputs:
    """Args:
    batch: the rows.
    generator: source of randomness for requests without a seed.
    device: where the sampler runs.
    vocab_size: V; pads prompts, being a value that no token has.
    """

    def __init__(
        self, batch: InputBatch, generator: torch.Generator, device: torch.device, vocab_size: int
    ) -> None:
        self.batch = batch
        self.vocab_size = vocab_size
        self.generator = generator
        self.device = device
        self._key: tuple[int, bytes] | None = None
        self._metadata: SamplingMetadata | None = None

    def for_rows(self, rows: np.ndarray) -> SamplingMetadata:
        """rows: int64 [R], the batch rows whose logits the sampler will see, in that order."""
        key = (self.batch.version, rows.tobytes())
        if key != self._key or self._metadata is None:
            self._metadata = self._build(rows)
            self._key = key
        return self._metadata

    def _build(self, rows: np.ndarray) -> SamplingMetadata:
        states = [self.batch.states[row] for row in rows.tolist()]
        params = [state.sampling_params for state in states]
        scalars = {name: column[rows] for name, column in self.batch.scalars.items()}
        greedy = scalars["temperature"] < GREEDY_TEMPERATURE
        penalized = (
            (scalars["presence_penalty"] != 0)
            | (scalars["frequency_penalty"] != 0)
            | (scalars["repetition_penalty"] != 1)
        )
        any_penalty = bool(penalized.any())
        return SamplingMetadata(
            temperature=None if greedy.all() else self._tensor(scalars["temperature"]),
            all_greedy=bool(greedy.all()),
            all_random=not greedy.any(),
            top_p=self._tensor(scalars["top_p"]) if (scalars["top_p"] < 1).any() else None,
            top_k=self._tensor(scalars["top_k"]) if (scalars["top_k"] > 0).any() else None,
            min_p=self._tensor(scalars["min_p"]) if (scalars["min_p"] > 0).any() else None,
            generators={i: s.generator for i, s in enumerate(states) if s.generator is not None},
            default_generator=self.generator,
            max_num_logprobs=_widest(params),
            presence_penalties=self._tensor(scalars["presence_penalty"]),
            frequency_penalties=self._tensor(scalars["frequency_penalty"]),
            repetition_penalties=self._tensor(scalars["repetition_penalty"]),
            no_penalties=not any_penalty,
            prompt_token_ids=self._padded_prompts(states) if any_penalty else None,
            output_token_ids=[state.output_token_ids for state in states],
            min_tokens={
                i: (p.min_tokens, p.all_stop_token_ids) for i, p in enumerate(params) if p.min_tokens > 0
            },
            logit_bias={i: p.logit_bias for i, p in enumerate(params) if p.logit_bias},
            allowed_token_ids={i: p.allowed_token_ids for i, p in enumerate(params) if p.allowed_token_ids},
            bad_words_token_ids={
                i: p.bad_words_token_ids for i, p in enumerate(params) if p.bad_words_token_ids
            },
            logits_processors={
                i: ([GuardedProcessor(f, states[i]) for f in p.logits_processors], states[i].prompt_token_ids)
                for i, p in enumerate(params)
                if p.logits_processors
            },
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _padded_prompts(self, states: list[RequestState]) -> torch.Tensor:
        """[R, longest prompt] int64, padded with V."""
        longest = max(len(state.prompt_token_ids) for state in states)
        padded = np.full((len(states), longest), self.vocab_size, np.int64)
        for row, state in enumerate(states):
            padded[row, : len(state.prompt_token_ids)] = state.prompt_token_ids
        return self._tensor(padded)


class GuardedProcessor:
    """A request's own function on logits, kept from harming the batch.

    It gets copies of the token ids and of the logits. If it raises or returns something that is no row
    of logits, the row stays as it was and the request ends with the error; its batch mates never notice.
    """

    def __init__(self, function: Callable[..., torch.Tensor], state: RequestState) -> None:
        self.function = function
        self.state = state
        # Two or three arguments: the sampler looks at the signature.
        self.__signature__ = inspect.Signature(
            inspect.Parameter(f"argument{i}", inspect.Parameter.POSITIONAL_ONLY)
            for i in range(processor_arity("logits_processors", function))
        )

    def __call__(self, *args: Any) -> torch.Tensor:
        logits = args[-1]
        try:
            result = self.function(*map(list, args[:-1]), logits.clone())
            if not isinstance(result, torch.Tensor) or result.shape != logits.shape:
                raise TypeError(f"must return a tensor of shape {tuple(logits.shape)}, got {result!r:.80}")
            if not result.dtype.is_floating_point or result.device != logits.device:
                raise TypeError(
                    f"must return floating-point logits on {logits.device}, got {result.dtype} on "
                    f"{result.device}"
                )
            result = torch.empty_like(logits).copy_(result)  # casts; fails here for what is no plain tensor
        except Exception as error:  # whatever the user's code raises
            self.state.error = f"logits_processors: {type(error).__name__}: {error}"
            return logits
        return result


def _widest(params: list[SamplingParams]) -> int | None:
    """How many log-probabilities the most demanding row wants; -1 for all, None for none."""
    wanted = [p.logprobs for p in params if p.logprobs is not None]
    if not wanted:
        return None
    return -1 if -1 in wanted else max(wanted)
