"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783) and Mistral (arXiv 2310.06825).

A decoder layer is: norm, attention, add; norm, gated MLP, add. Between layers two tensors travel:
`hidden`, the output of the last block, and `residual`, the running sum it has not been added to yet,
so that each add is done together with the norm behind it. Invariant: tokens are one flat batch [T];
which request a token belongs to is known to `metadata` alone.

Of a model on several ranks each builds its part: its pipeline stage's layers, at their places in the whole model,
and of these the share of heads and MLP features that its tensor-parallel group leaves to it. `hidden` is whole
wherever it leaves a block. vLLM: `model_executor/models/llama.py`.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import nn

from course_lib.attention.layer import Attention
from course_lib.attention.metadata import AttentionMetadata
from course_lib.errors import UnsupportedModelError
from course_lib.layers.activation import silu_and_mul
from course_lib.layers.embedding import LMHead, TokenEmbedding
from course_lib.layers.linear import GateUpLinear, QKVLinear, RowParallelLinear
from course_lib.layers.norm import QKNorm, RMSNorm
from course_lib.layers.rotary import RotaryEmbedding, apply_rotary
from course_lib.layers.weights import OtherStage
from course_lib.models.causal_lm import CausalLM, IntermediateTensors
from course_lib.parallel.group import ParallelGroups
from course_lib.parallel.layout import split_evenly

# The gathered (cos, sin) of `RotaryEmbedding`; or, where the attention backend rotates, (table, positions).
CosSin = tuple[torch.Tensor, torch.Tensor]


def check_activation(hf_config: Any) -> None:
    """UnsupportedModelError unless the MLPs are gated by silu."""
    if hf_config.hidden_act != "silu":
        raise UnsupportedModelError(
            f"config.json: hidden_act={hf_config.hidden_act!r} is not supported; supported is 'silu'."
        )


class LlamaMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`; `intermediate_size` instead of the config's, if given."""

    def __init__(
        self,
        hf_config: Any,
        *,
        bias: bool,
        intermediate_size: int | None = None,
        parallel: ParallelGroups,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        check_activation(hf_config)
        hidden, inner = hf_config.hidden_size, intermediate_size or hf_config.intermediate_size
        where = dict(group=parallel.tensor, dtype=dtype, device=device)
        self.gate_up_proj = GateUpLinear(hidden, inner, bias=bias, **where)
        self.down_proj = RowParallelLinear(inner, hidden, bias=bias, **where)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_and_mul(self.gate_up_proj(hidden)))


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions. H query heads share Hkv key-value heads of size D.

    H and Hkv are those of this rank.
    """

    def __init__(
        self,
        hf_config: Any,
        layer_idx: int,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        sliding_window: int | None = None,
        scale: float | None = None,
        parallel: ParallelGroups,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        hidden, num_heads = hf_config.hidden_size, hf_config.num_attention_heads
        num_kv_heads = getattr(hf_config, "num_key_value_heads", None) or num_heads
        if num_heads % num_kv_heads:
            raise UnsupportedModelError(
                f"config.json: num_attention_heads={num_heads} is not a multiple of "
                f"num_key_value_heads={num_kv_heads}."
            )
        self.head_dim = getattr(hf_config, "head_dim", None) or hidden // num_heads
        where = dict(group=parallel.tensor, dtype=dtype, device=device)
        self.qkv_proj = QKVLinear(hidden, self.head_dim, num_heads, num_kv_heads, bias=qkv_bias, **where)
        self.o_proj = RowParallelLinear(num_heads * self.head_dim, hidden, bias=out_bias, **where)
        num_heads, num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.q_size, self.kv_size = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.qk_norm: QKNorm | None = None
        if qk_norm:
            eps = hf_config.rms_norm_eps
            self.qk_norm = QKNorm(self.head_dim, num_heads, num_kv_heads, eps, dtype=dtype, device=device)
        self.attn = Attention(
            num_heads,
            self.head_dim,
            self.head_dim**-0.5 if scale is None else scale,
            num_kv_heads,
            layer_idx=layer_idx,
            sliding_window=sliding_window,
        )

    @property
    def fuses_rotary(self) -> bool:
        """Whether rotation is left to the attention backend; head norms would have to come in between."""
        return self.qk_norm is None and self.attn.fuses_rotary

    def forward(self, hidden: torch.Tensor, cos_sin: CosSin, metadata: AttentionMetadata) -> torch.Tensor:
        if self.fuses_rotary:
            return self.o_proj(self.attn.forward_rotary(self.qkv_proj(hidden), *cos_sin, metadata))
        qk, v = self.qkv_proj(hidden).split((self.q_size + self.kv_size, self.kv_size), dim=-1)
        qk = qk.view(len(hidden), -1, self.head_dim)  # queries and keys are rotated in one go
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        q, k = apply_rotary(qk, *cos_sin).flatten(1).split((self.q_size, self.kv_size), dim=-1)
        return self.o_proj(self.attn(q, k, v, metadata))


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    mlp_name = "mlp"  # the checkpoint's

    def __init__(
        self,
        hf_config: Any,
        layer_idx: int,
        *,
        parallel: ParallelGroups,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        size, eps = hf_config.hidden_size, hf_config.rms_norm_eps
        where = dict(parallel=parallel, dtype=dtype, device=device)
        self.input_layernorm = RMSNorm(size, eps, dtype=dtype, device=device)
        self.self_attn = self.make_attention(hf_config, layer_idx, **where)
        self.post_attention_layernorm = RMSNorm(size, eps, dtype=dtype, device=device)
        self.add_module(self.mlp_name, self.make_mlp(hf_config, layer_idx, **where))

    def make_mlp(self, hf_config: Any, layer_idx: int, **where: Any) -> nn.Module:
        """What makes [T, hidden] of [T, hidden] behind the attention; `where` is parallel, dtype and device."""
        return LlamaMLP(hf_config, bias=getattr(hf_config, "mlp_bias", False), **where)

    def make_attention(self, hf_config: Any, layer_idx: int, **where: Any) -> LlamaAttention:
        """What the architectures of this family differ in; `where` is parallel, dtype and device."""
        bias = getattr(hf_config, "attention_bias", False)
        return LlamaAttention(hf_config, layer_idx, qkv_bias=bias, out_bias=bias, **where)

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        cos_sin: CosSin,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden, residual) -> (hidden, residual), all [T, hidden]; no residual before the first layer."""
        if residual is None:
            hidden, residual = self.input_layernorm(hidden), hidden
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, cos_sin, metadata)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return getattr(self, self.mlp_name)(hidden), residual


class LlamaModel(nn.Module):
    """Embedding, decoder layers, final norm: what belongs to this pipeline stage, and `OtherStage` for the rest."""

    def __init__(
        self,
        hf_config: Any,
        layer_class: type[LlamaDecoderLayer],
        *,
        parallel: ParallelGroups,
        dtype: torch.dtype,
        device: torch.device | str,
        max_model_len: int,
    ) -> None:
        super().__init__()
        vocab, size, num_layers = hf_config.vocab_size, hf_config.hidden_size, hf_config.num_hidden_layers
        first, last = parallel.is_first_stage, parallel.is_last_stage
        self.embed_tokens: TokenEmbedding | OtherStage = OtherStage()
        if first or (last and hf_config.tie_word_embeddings):  # tied, the table is needed at both ends
            self.embed_tokens = TokenEmbedding(vocab, size, group=parallel.tensor, dtype=dtype, device=device)
        self.stage = split_evenly(num_layers, parallel.pipeline.size)[parallel.pipeline.rank]
        where = dict(parallel=parallel, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            layer_class(hf_config, i, **where) if i in self.stage else OtherStage() for i in range(num_layers)
        )
        self.norm: RMSNorm | OtherStage = OtherStage()
        if last:
            self.norm = RMSNorm(size, hf_config.rms_norm_eps, dtype=dtype, device=device)
        self.rotary = RotaryEmbedding(hf_config, max_model_len=max_model_len, dtype=dtype, device=device)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        inputs_embeds: torch.Tensor | None = None,
        intermediate: IntermediateTensors | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if intermediate is not None:
            hidden, residual = intermediate.hidden, intermediate.residual
        else:
            hidden, residual = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds, None
        fuses_rotary = self.layers[self.stage.start].self_attn.fuses_rotary  # all layers are of one class
        cos_sin = (self.rotary.cos_sin, positions) if fuses_rotary else self.rotary(positions)
        for layer in islice(self.layers, self.stage.start, self.stage.stop):
            hidden, residual = layer(hidden, residual, cos_sin, metadata)
        if isinstance(self.norm, OtherStage):
            return IntermediateTensors(hidden, residual)
        return self.norm(hidden, residual)[0]


class LlamaForCausalLM(CausalLM):
    """A Llama-like decoder with a language-model head, tied to the embedding or not.

    `max_model_len` is the number of positions that rotary angles are kept for; `parallel` says which part of the
    model this rank holds, None: all of it.
    """

    layer_class: type[LlamaDecoderLayer] = LlamaDecoderLayer

    def __init__(
        self,
        hf_config: Any,
        *,
        parallel: ParallelGroups | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
        max_model_len: int,
    ) -> None:
        parallel = parallel or ParallelGroups.solo()
        super().__init__(parallel)
        where = dict(dtype=dtype, device=device)
        self.model = LlamaModel(hf_config, self.layer_class, parallel=parallel, max_model_len=max_model_len, **where)
        self.lm_head: LMHead | OtherStage | None = None
        if not hf_config.tie_word_embeddings:
            vocab, size = hf_config.vocab_size, hf_config.hidden_size
            last = parallel.is_last_stage
            self.lm_head = LMHead(size, vocab, group=parallel.tensor, **where) if last else OtherStage()

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        inputs_embeds: torch.Tensor | None = None,
        intermediate: IntermediateTensors | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, metadata, inputs_embeds, intermediate)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return self.tied_logits(hidden)

    def embedding(self) -> TokenEmbedding:
        return self.model.embed_tokens


class MistralDecoderLayer(LlamaDecoderLayer):
    """A token sees the last `sliding_window` tokens, itself included; None (v0.2 and later): all."""

    def make_attention(self, hf_config: Any, layer_idx: int, **where: Any) -> LlamaAttention:
        return LlamaAttention(hf_config, layer_idx, sliding_window=hf_config.sliding_window, **where)


class MistralForCausalLM(LlamaForCausalLM):
    """Llama with sliding-window attention in every layer."""

    layer_class = MistralDecoderLayer
