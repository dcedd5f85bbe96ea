"""What every language model of this engine can do besides its own forward pass.

Owns the mapping from checkpoint to parameters: a tensor that belongs nowhere, has the wrong shape or
comes twice is an error that names it. Whether *all* tensors came is for the loader to decide, because
a trainer may send a few at a time. vLLM: the `load_weights` methods of `model_executor/models/*`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import nn

from course_lib.attention.layer import Attention
from course_lib.attention.metadata import AttentionMetadata
from course_lib.errors import CorruptModelError, UnsupportedModelError
from course_lib.layers.cpu_matmul import can_pack, linear, pack
from course_lib.layers.few_rows_weight import FewRowsWeight, four_bit_form, half_form
from course_lib.layers.linear import Linear, MergedLinear
from course_lib.layers.weights import WeightSlot, checkpoint_slots

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TIED_HEAD = "lm_head.weight"


class CausalLM(nn.Module):
    """Base of the architectures; a subclass builds the layers and defines the three methods below."""

    def __init__(self) -> None:
        super().__init__()
        self.packed_head: torch.Tensor | None = None
        self.few_rows_head: FewRowsWeight | None = None

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One flat batch of T tokens -> final-normed hidden states [T, hidden] in the model's dtype.

        `input_ids` and `positions` are [T] int32 or int64. `inputs_embeds` [T, hidden] takes the place
        of the embedding look-up and is not modified.
        """
        raise NotImplementedError(type(self).__name__)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, hidden] (the rows that sample) -> logits [N, vocab] in the model's dtype."""
        raise NotImplementedError(type(self).__name__)

    def embedding_weight(self) -> torch.Tensor:
        """The token embedding table [vocab, hidden]."""
        raise NotImplementedError(type(self).__name__)

    def tied_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits by the embedding table itself, hidden [N, hidden] -> [N, vocab]."""
        head = self.embedding_weight() if self.packed_head is None else self.packed_head
        return linear(hidden, head, few_rows=self.few_rows_head)

    def pack_weights(self) -> None:
        """Lay the weights of all matrix products out for this CPU; does nothing where that is not possible.

        A tied head gets a packed copy of the table, whose plain rows the embedding still looks up.
        """
        table = self.embedding_weight()
        if not can_pack(table.dtype, table.device):
            return
        if TIED_HEAD not in self.slots:
            self.packed_head = pack(table)
            self.few_rows_head = four_bit_form(table) or half_form(table)
        self.__dict__.pop("slots", None)  # they would keep every plain weight alive beside its packed one
        for module in self._linears():
            module.few_rows = four_bit_form(module.weight)
            module.weight = nn.Parameter(pack(module.weight), requires_grad=False)

    def unpack_weights(self) -> None:
        """Undo `pack_weights`, so that weights can be read as matrices or replaced."""
        for module in self._linears():
            if module.weight.is_mkldnn:
                module.weight = nn.Parameter(module.weight.to_dense(), requires_grad=False)
            module.few_rows = None
        self.packed_head = self.few_rows_head = None
        self.__dict__.pop("slots", None)

    def _linears(self) -> Iterator[Linear | MergedLinear]:
        return (module for module in self.modules() if isinstance(module, Linear | MergedLinear))

    def attention_layers(self) -> list[Attention]:
        """The attention layers in layer order; the runner binds a KV cache to each."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    @cached_property
    def slots(self) -> dict[str, WeightSlot]:
        """Every checkpoint tensor the model needs, by name."""
        return checkpoint_slots(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy checkpoint tensors into the (fused) parameters, cast to the model's dtype.

        Returns the names that were used. Two kinds of tensor are known to be redundant and are skipped:
        old checkpoints' `rotary_emb.inv_freq`, and a stored copy of the tied head. CorruptModelError for
        an unknown, repeated or misshapen tensor; UnsupportedModelError for one that is not float.
        """
        was_packed = self.packed_head is not None or any(module.weight.is_mkldnn for module in self._linears())
        if was_packed:
            self.unpack_weights()
        filled: set[str] = set()
        tied_head: torch.Tensor | None = None
        for name, tensor in weights:
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name == TIED_HEAD and TIED_HEAD not in self.slots:
                tied_head = tensor.clone()
                continue
            self._check_tensor(name, tensor, filled)
            self.slots[name].fill(tensor)
            filled.add(name)
        table = self.embedding_weight()
        if tied_head is not None and any(self.slots[name].parameter is table for name in filled):
            self._check_tied_head(tied_head)
        if was_packed:
            self.pack_weights()
        return filled

    def _check_tensor(self, name: str, tensor: torch.Tensor, filled: set[str]) -> None:
        if name not in self.slots:
            raise CorruptModelError(
                f"unexpected tensor {name!r}: {type(self).__name__} has no place for it with this "
                "config.json; config.json and weights belong to different models, or it is an adapter."
            )
        if name in filled:
            raise CorruptModelError(f"tensor {name!r} is in two files; download the checkpoint again.")
        if tensor.dtype not in FLOAT_DTYPES:
            raise UnsupportedModelError(
                f"tensor {name!r} is {tensor.dtype}, a quantized checkpoint; use one in float16, bfloat16 "
                "or float32."
            )
        expected = self.slots[name].shape
        if tuple(tensor.shape) != expected:
            raise CorruptModelError(
                f"tensor {name!r} has shape {list(tensor.shape)}, but config.json asks for {list(expected)}; "
                "config.json and weights belong to different models."
            )

    def _check_tied_head(self, head: torch.Tensor) -> None:
        """A stored head that is not the embedding means that config.json is wrong about the tie."""
        table = self.embedding_weight()
        if head.shape != table.shape or not torch.equal(head.to(table), table):
            raise CorruptModelError(
                f"tensor {TIED_HEAD!r} differs from the embedding, but config.json ties them; "
                'set "tie_word_embeddings": false in config.json.'
            )
