"""Products on the CPU: packed or plain, either way round, the same; weights can still be read and replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from course_lib.layers.cpu_matmul import is_packed, linear, pack, unpack
from course_lib.layers.fused import packing_kernels
from course_lib.models.loader import load_model, read_tensors

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, LlamaConfig]:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=80, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, tie_word_embeddings=request.param,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path, config


@pytest.mark.parametrize("rows", [0, 1, 3, 64, 300])
def test_packed_products_equal_plain_ones(packed_by: str, rows: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(*shape).bfloat16() for shape in ((50, 36), (50,), (rows, 36)))
    expected = (x.double() @ weight.double().T + bias.double()).bfloat16()
    torch.testing.assert_close(linear(x, pack(weight), bias), expected, atol=2e-2, rtol=2e-2)
    assert torch.equal(unpack(pack(weight), weight.dtype), weight) and unpack(weight, weight.dtype) is weight
    assert pack(weight).is_mkldnn == (packed_by == "oneDNN")
    odd = weight[:, :35].contiguous()  # has no pairs
    assert pack(odd).is_mkldnn
    torch.testing.assert_close(linear(x[:, :35], pack(odd)), linear(x[:, :35], odd), atol=2e-2, rtol=2e-2)


def test_a_packed_model_holds_the_same_weights_and_takes_new_ones(
    packed_by: str, checkpoint: tuple[Path, LlamaConfig]
) -> None:
    path, config = checkpoint
    model = load_model(path, config, torch.bfloat16, CPU)
    plain = {name: parameter.clone() for name, parameter in model.named_parameters()}
    hidden = torch.randn(5, 48).bfloat16()
    logits = model.compute_logits(hidden)
    model.pack_weights()
    assert is_packed(model.model.layers[0].mlp.down_proj.weight)
    torch.testing.assert_close(model.compute_logits(hidden), logits, atol=2e-2, rtol=2e-2)
    model.load_weights((name, tensor[()] * 2) for name, tensor in read_tensors(path / "model.safetensors"))
    assert is_packed(model.model.layers[0].mlp.down_proj.weight)  # packed again
    model.unpack_weights()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain[name] * 2), name


needs_packed_float32 = pytest.mark.skipif(
    packing_kernels(torch.float32) is None, reason="no packed product of float32 on this processor"
)


@needs_packed_float32
def test_float32_is_packed_where_it_is_float16_and_exact(checkpoint: tuple[Path, LlamaConfig]) -> None:
    path, config = checkpoint
    stored = LlamaForCausalLM.from_pretrained(path).half().float()
    odd = stored.model.layers[0].mlp.down_proj.weight
    odd.data[0, 0] = 1 / 3
    stored.save_pretrained(path)
    model = load_model(path, config, torch.float32, CPU)
    plain = {name: parameter.clone() for name, parameter in model.named_parameters()}
    hidden = torch.randn(5, 48)
    logits, mlp = model.compute_logits(hidden), model.model.layers[0].mlp
    inner = mlp(hidden)
    model.pack_weights()
    assert is_packed(mlp.gate_up_proj.weight) and not is_packed(mlp.down_proj.weight) and model.dtype == torch.float32
    torch.testing.assert_close(model.compute_logits(hidden), logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mlp(hidden), inner, atol=1e-6, rtol=1e-5)
    model.load_weights((name, tensor[()] * 2) for name, tensor in read_tensors(path / "model.safetensors"))
    assert is_packed(mlp.gate_up_proj.weight)
    torch.testing.assert_close(model.compute_logits(hidden), 2 * logits, atol=1e-6, rtol=1e-5)
    model.unpack_weights()
    assert all(torch.equal(parameter, plain[name] * 2) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("rows", [0, 1, 2, 64, 128, 129])
@pytest.mark.parametrize("with_bias", [False, True])
def test_either_way_round_gives_the_same_product(rows: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    weight, x, bias = torch.randn(50, 36), torch.randn(rows, 36), torch.randn(50) if with_bias else None
    expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    found = linear(x, weight, bias)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
