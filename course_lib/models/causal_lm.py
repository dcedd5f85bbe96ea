"""What every language model of this engine can do besides its own forward pass.

Owns the mapping from checkpoint to parameters: a tensor that belongs nowhere, has the wrong shape or
comes twice is an error that names it. Whether *all* tensors came is for the loader to decide, because
a trainer may send a few at a time. A rank that holds a part of the model takes its part of each tensor, and
nothing of those of other pipeline stages. vLLM: the `load_weights` methods of `model_executor/models/*`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from course_lib.attention.layer import Attention
from course_lib.attention.metadata import AttentionMetadata
from course_lib.errors import CorruptModelError, UnsupportedModelError
from course_lib.layers.cpu_matmul import can_pack, is_packed, linear, pack, unpack
from course_lib.layers.embedding import TokenEmbedding
from course_lib.layers.experts import Experts
from course_lib.layers.few_rows_weight import FewRowsWeight, few_rows_form, half_form
from course_lib.layers.linear import Linear
from course_lib.layers.weights import CheckpointTensor, WeightSlot, checkpoint_slots, names_elsewhere
from course_lib.parallel.group import ParallelGroups

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TABLE = "model.embed_tokens.weight"
TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class IntermediateTensors:
    """What one pipeline stage hands to the next: both [T, hidden], in the model's dtype.

    vLLM: `IntermediateTensors` in `vllm/sequence.py`.
    """

    hidden: torch.Tensor  # output of the stage's last block
    residual: torch.Tensor  # the running sum that it has not been added to yet


class CausalLM(nn.Module):
    """Base of the architectures; a subclass builds the layers of its rank and defines the three methods below."""

    def __init__(self, parallel: ParallelGroups) -> None:
        super().__init__()
        self.parallel = parallel
        self.packed_head: torch.Tensor | None = None
        self.few_rows_head: FewRowsWeight | None = None

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        inputs_embeds: torch.Tensor | None = None,
        intermediate: IntermediateTensors | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """One flat batch of T tokens -> final-normed hidden states [T, hidden] in the model's dtype.

        `input_ids` and `positions` are [T] int32 or int64. `inputs_embeds` [T, hidden] takes the place
        of the embedding look-up and is not modified. A pipeline stage other than the first is given
        `intermediate` instead of either, and may overwrite it; one other than the last returns such.
        """
        raise NotImplementedError(type(self).__name__)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, hidden] (the rows that sample) -> logits [N, vocab] in the model's dtype.

        On every rank of the last pipeline stage, which must all call it; other stages have no head.
        """
        raise NotImplementedError(type(self).__name__)

    def embedding(self) -> TokenEmbedding:
        """The token embedding; a stage that needs none has none."""
        raise NotImplementedError(type(self).__name__)

    def embedding_weight(self) -> torch.Tensor:
        """This rank's rows of the token embedding table [vocab, hidden]."""
        return self.embedding().weight

    def tied_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits by the embedding table itself, hidden [N, hidden] -> [N, vocab]."""
        embedding = self.embedding()
        head = embedding.weight if self.packed_head is None else self.packed_head
        return embedding.vocab.gather_logits(linear(hidden, head, few_rows=self.few_rows_head))

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, and its weights are of unless they are packed."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    def pack_weights(self) -> None:
        """Lay the weights of all matrix products out for this CPU; does nothing where that is not possible.

        Packed or not, they get their forms for few rows. A tied head gets a packed copy of the table, whose plain rows
        the embedding still looks up.
        """
        device = next(self.parameters()).device
        packs = can_pack(self.dtype, device)
        if not packs and not (device.type == "cpu" and self.dtype == torch.float32):
            return
        if self.parallel.is_last_stage and TIED_HEAD not in self.slots:
            table = self.embedding_weight()
            self.few_rows_head = few_rows_form(table) or half_form(table)
            self.packed_head = pack(table) if packs else None
        if packs:
            self.__dict__.pop("slots", None)  # they would keep every plain weight alive beside its packed one
        for module in self._linears():
            module.few_rows = few_rows_form(module.weight)
            if packs:
                module.weight = nn.Parameter(pack(module.weight), requires_grad=False)
        for experts in self._experts() if packs else ():
            experts.pack()

    def unpack_weights(self) -> None:
        """Undo `pack_weights`, so that weights can be read as matrices or replaced."""
        for module in self._linears():
            if is_packed(module.weight):
                module.weight = nn.Parameter(unpack(module.weight, self.dtype), requires_grad=False)
            module.few_rows = None
        for experts in self._experts():
            experts.unpack(self.dtype)
        self.packed_head = self.few_rows_head = None
        self.__dict__.pop("slots", None)

    def _linears(self) -> Iterator[Linear]:
        return (module for module in self.modules() if isinstance(module, Linear))

    def _experts(self) -> Iterator[Experts]:
        return (module for module in self.modules() if isinstance(module, Experts))

    def attention_layers(self) -> list[Attention]:
        """This stage's attention layers in layer order; the runner binds a KV cache to each."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    @cached_property
    def slots(self) -> dict[str, WeightSlot]:
        """Every checkpoint tensor that this rank needs (a part of), by name."""
        return checkpoint_slots(self)

    def load_weights(self, weights: Iterable[tuple[str, CheckpointTensor]]) -> set[str]:
        """Copy this rank's parts of whole checkpoint tensors into the (fused) parameters, cast to the model's dtype.

        Returns the names that were used. Tensors of other pipeline stages are left to them. Two kinds of
        tensor are known to be redundant and are skipped: old checkpoints' `rotary_emb.inv_freq`, and a
        stored copy of the tied head. CorruptModelError for an unknown, repeated or misshapen tensor;
        UnsupportedModelError for one that is not float.
        """
        was_packed = (
            self.packed_head is not None
            or self.few_rows_head is not None
            or any(is_packed(module.weight) or module.few_rows is not None for module in self._linears())
            or any(experts.packed for experts in self._experts())
        )
        if was_packed:
            self.unpack_weights()
        filled: set[str] = set()
        tied_head: torch.Tensor | None = None
        elsewhere = names_elsewhere(self)
        for name, tensor in weights:
            if name.endswith("rotary_emb.inv_freq") or name.startswith(elsewhere):
                continue
            if name == TIED_HEAD and TIED_HEAD not in self.slots:
                if TABLE in self.slots:
                    self._check_shape(name, tensor, self.slots[TABLE])
                    tied_head = tensor[self.slots[TABLE].source].clone()
                continue
            self._check_tensor(name, tensor, filled)
            self.slots[name].fill(tensor)
            filled.add(name)
        if tied_head is not None and TABLE in filled:
            self._check_tied_head(tied_head, self.slots[TABLE])
        if was_packed:
            self.pack_weights()
        return filled

    def _check_tensor(self, name: str, tensor: CheckpointTensor, filled: set[str]) -> None:
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
        self._check_shape(name, tensor, self.slots[name])

    @staticmethod
    def _check_shape(name: str, tensor: CheckpointTensor, slot: WeightSlot) -> None:
        if tuple(tensor.shape) != slot.shape:
            raise CorruptModelError(
                f"tensor {name!r} has shape {list(tensor.shape)}, but config.json asks for {list(slot.shape)}; "
                "config.json and weights belong to different models."
            )

    @staticmethod
    def _check_tied_head(head: torch.Tensor, table: WeightSlot) -> None:
        """A stored head that is not the embedding means that config.json is wrong about the tie."""
        own_rows = table.parameter[table.rows]
        if not torch.equal(head.to(own_rows), own_rows):
            raise CorruptModelError(
                f"tensor {TIED_HEAD!r} differs from the embedding, but config.json ties them; "
                'set "tie_word_embeddings": false in config.json.'
            )
