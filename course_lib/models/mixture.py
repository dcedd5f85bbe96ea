"""What every model with experts can do besides a Llama's forward pass: run one without tokens.

Experts may be dealt out among replicas that serve different requests. Then a forward pass of one is a forward pass
of all: whoever has no token takes part with none. Invariant: all ranks of the expert group run equally many passes,
`forward` or `forward_without_tokens`.

vLLM: `GPUModelRunner._dummy_run`, which makes up tokens instead.
"""

from __future__ import annotations

from typing import Any

import torch

from course_lib.attention.metadata import AttentionMetadata
from course_lib.layers.expert_exchange import make_exchange
from course_lib.layers.moe import MoE
from course_lib.models.causal_lm import IntermediateTensors
from course_lib.models.llama import LlamaForCausalLM


class MixtureForCausalLM(LlamaForCausalLM):
    """A Llama-like decoder in which some layers have a `MoE` for an MLP."""

    def __init__(self, hf_config: Any, **arguments: Any) -> None:
        super().__init__(hf_config, **arguments)
        self.exchange = make_exchange(self.parallel)
        for mixture in self.mixtures():
            mixture.bind(self.exchange)

    def mixtures(self) -> list[MoE]:
        """This stage's, in layer order."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        inputs_embeds: torch.Tensor | None = None,
        intermediate: IntermediateTensors | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        self.exchange.begin(len(positions))
        return super().forward(input_ids, positions, metadata, inputs_embeds, intermediate)

    @torch.inference_mode()
    def forward_without_tokens(self) -> None:
        """Take part in the others' forward pass: this rank's experts compute, its caches stay as they are."""
        self.exchange.begin(0)
        for mixture in self.mixtures():
            weight = mixture.router.weight
            mixture(torch.empty(0, weight.shape[1], dtype=weight.dtype, device=weight.device))
