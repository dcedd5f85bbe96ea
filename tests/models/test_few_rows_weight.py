"""The second form of a weight for few rows: found only where it is exact, used only where it is meant to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from course_lib.layers.cpu_matmul import linear
from course_lib.layers.few_rows_weight import (
    FourBitWeight,
    HalfWeight,
    StoredHalfWeight,
    as_stored_half,
    four_bit_form,
    half_form,
    stored_half_form,
)
from course_lib.models.loader import load_model, read_tensors
from kernels.cpu import compiled_kernels

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="no fast kernels on this processor"
)


def on_a_grid(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Values as a Q4_1 file gives them: groups of 32 on 16 points, the ends taken; in float16, then bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (outputs, inputs // 32, 32), generator=generator)
    q[..., 5], q[..., 9] = 0, 15
    step = torch.rand(outputs, inputs // 32, 1, generator=generator) * 0.02 + 0.001
    low = -step * 15 * torch.rand(outputs, inputs // 32, 1, generator=generator)
    return (q * step.half() + low.half()).half().view(outputs, inputs).bfloat16()


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=80, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_a_weight_on_a_grid_is_multiplied_in_four_bits(rows: int) -> None:
    weight = on_a_grid(48, 96)
    form = four_bit_form(weight)
    assert form is not None and form.nibbles.nbytes == 48 * 96 // 2
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x.double() @ weight.double().T
    error = (form.multiply(x).double() - exact).norm() / exact.norm()
    assert error < 5e-3  # rounding the result to bfloat16 alone is 2e-3


def test_groups_of_one_value_are_on_every_grid() -> None:
    weight = on_a_grid(32, 64)
    weight[:, :32] = 0.5
    weight[3] = 0
    form = four_bit_form(weight)
    assert form is not None
    columns = form.multiply(torch.eye(64)[:8].bfloat16())
    torch.testing.assert_close(columns, weight[:, :8].T, atol=2e-3, rtol=0)


@pytest.mark.parametrize("row", [0, 40])  # among the first that are looked at, and behind them
def test_one_value_off_the_grid_is_enough_to_refuse(row: int) -> None:
    weight = on_a_grid(48, 96)
    group = weight[row, :32]
    group[7] = group.min() + (group.max() - group.min()) * 0.37
    assert four_bit_form(weight) is None


@pytest.mark.parametrize(
    "weight",
    [torch.randn(48, 96).bfloat16(), on_a_grid(48, 96).float(), on_a_grid(48, 96)[:, :90], on_a_grid(50, 96)],
    ids=["random", "float32", "inputs", "outputs"],
)
def test_other_weights_have_no_four_bit_form(weight: torch.Tensor) -> None:
    assert four_bit_form(weight) is None


def test_a_half_copy_serves_one_row_where_onednn_multiplies(packed_by: str) -> None:
    weight, x = torch.randn(50, 36).bfloat16(), torch.randn(1, 36).bfloat16()
    form = half_form(weight)
    if packed_by == "own product":
        assert form is None
        return
    assert form is not None
    exact = (x.double() @ weight.double().T).bfloat16()
    torch.testing.assert_close(form.multiply(x), exact, atol=1e-2, rtol=1e-2)
    assert half_form(weight * 1e6) is None and half_form(weight.float()) is None


needs_kernels = pytest.mark.skipif(compiled_kernels() is None, reason="the CPU kernels are not compiled")


@needs_kernels
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_float16_values_in_float32_are_multiplied_as_such(unpacked_float32: None, rows: int) -> None:
    weight, x = torch.randn(50, 36).half().float(), torch.randn(rows, 36)
    weight[0, :4] = torch.tensor([0, 2.0**-24, -(2.0**-15), 65504])  # zero, the smallest, one without exponent, the largest
    form = stored_half_form(weight)
    assert form is not None and torch.equal(form.matrix.float(), weight)
    torch.testing.assert_close(form.multiply(x), (x.double() @ weight.double().T).float())
    assert torch.equal(form.multiply(x.t().contiguous().t()), form.multiply(x))


@needs_kernels
@pytest.mark.parametrize("value", [1 + 2.0**-11, 65536.0, float("inf"), 2.0**-25])
def test_one_value_that_is_no_float16_is_enough_to_refuse(value: float) -> None:
    weight = torch.zeros(300, 1000)
    weight[290, 7] = value
    assert as_stored_half(weight) is None and as_stored_half(weight[:290]) is not None
    assert stored_half_form(torch.zeros(3, 4).bfloat16()) is None


@needs_kernels
def test_a_float32_model_has_the_form_and_makes_it_again_for_new_weights(unpacked_float32: None, tmp_path: Path) -> None:
    source = tiny_llama().half().float()
    odd = source.model.layers[0].mlp.down_proj.weight
    odd.data[0, 0] = 1 / 3
    source.save_pretrained(tmp_path)
    model = load_model(tmp_path, source.config, torch.float32, CPU)
    hidden = torch.randn(3, 64)
    plain_logits, mlp = model.compute_logits(hidden), model.model.layers[0].mlp
    plain = mlp(hidden)
    model.pack_weights()
    assert isinstance(model.few_rows_head, StoredHalfWeight) and isinstance(mlp.gate_up_proj.few_rows, StoredHalfWeight)
    assert mlp.down_proj.few_rows is None
    torch.testing.assert_close(model.compute_logits(hidden), plain_logits)
    torch.testing.assert_close(mlp(hidden), plain)
    model.load_weights((name, tensor[()] * 0) for name, tensor in read_tensors(tmp_path / "model.safetensors"))
    assert not model.compute_logits(hidden).any() and not mlp.gate_up_proj(hidden).any()
    assert isinstance(mlp.gate_up_proj.few_rows, StoredHalfWeight)
    model.unpack_weights()
    assert mlp.gate_up_proj.few_rows is None and model.few_rows_head is None


def test_the_form_is_used_up_to_its_most_rows() -> None:
    weight = torch.randn(16, 32).bfloat16()
    marked = HalfWeight(torch.zeros(16, 32, dtype=torch.float16))
    assert not linear(torch.ones(1, 32).bfloat16(), weight, few_rows=marked).any()
    assert linear(torch.ones(2, 32).bfloat16(), weight, few_rows=marked).any()
    assert linear(torch.ones(0, 32).bfloat16(), weight, few_rows=marked).shape == (0, 16)
    bias = torch.arange(16).bfloat16()
    assert torch.equal(linear(torch.ones(1, 32).bfloat16(), weight, bias, marked)[0], bias)


def test_a_model_makes_the_forms_when_packed_and_again_for_new_weights(packed_by: str, tmp_path: Path) -> None:
    source = tiny_llama()
    down = source.model.layers[0].mlp.down_proj.weight
    down.data = on_a_grid(64, 96).to(down)
    source.save_pretrained(tmp_path)
    model = load_model(tmp_path, source.config, torch.bfloat16, CPU)
    hidden = torch.randn(3, 64).bfloat16()
    plain_logits = model.compute_logits(hidden[:1])
    model.pack_weights()
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp.down_proj.few_rows, FourBitWeight) and mlp.gate_up_proj.few_rows is None
    assert isinstance(model.few_rows_head, HalfWeight) == (packed_by == "oneDNN")
    assert mlp.down_proj.few_rows.most_rows == (8 if packed_by == "oneDNN" else 4)
    torch.testing.assert_close(model.compute_logits(hidden[:1]), plain_logits, atol=2e-2, rtol=2e-2)
    model.load_weights((name, tensor[()] * 0) for name, tensor in read_tensors(tmp_path / "model.safetensors"))
    assert not model.compute_logits(hidden[:1]).any() and not mlp.down_proj(torch.ones(1, 96).bfloat16()).any()
    model.unpack_weights()
    assert mlp.down_proj.few_rows is None and model.few_rows_head is None
