"""Rotary frequencies under every spelling of the config, and the layers' own promises."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from course_lib.errors import UnsupportedModelError
from course_lib.layers.activation import silu_and_mul
from course_lib.layers.norm import QKNorm, RMSNorm
from course_lib.layers.rotary import ROPE_TYPES, RotaryEmbedding, apply_rotary, inverse_frequencies

WHERE = dict(dtype=torch.float32, device="cpu")
SETTINGS = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 2.0},
    "llama3": dict(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 2048},
}


def config_of(kind, spelling, **more):
    """The same RoPE settings in transformers 5's spelling or in one of the two older ones."""
    common = dict(hidden_size=512, num_attention_heads=8, max_position_embeddings=8192, **more)
    settings = SETTINGS[kind]
    if spelling == "rope_parameters":
        return SimpleNamespace(
            **common, rope_parameters={"rope_type": kind, "rope_theta": 5e5, **settings}
        )
    scaling = {spelling: kind, **settings} if kind != "default" else None
    return SimpleNamespace(**common, rope_theta=5e5, rope_scaling=scaling)


def test_the_settings_cover_every_supported_type():
    assert set(SETTINGS) == set(ROPE_TYPES)


@pytest.mark.parametrize("length", [100, 20_000])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_type", "type"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_frequencies_equal_transformers_bit_for_bit(kind, spelling, length):
    theirs = LlamaConfig(
        hidden_size=512,
        num_attention_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": kind, "rope_theta": 5e5, **SETTINGS[kind]},
    )
    compute = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    expected, expected_scale = compute(theirs, seq_len=length)
    inv_freq, scale = inverse_frequencies(config_of(kind, spelling), max_model_len=length)
    assert torch.equal(inv_freq, expected)
    assert scale == expected_scale


@pytest.mark.parametrize(
    "options",
    [
        {"beta_fast": 16},
        {"beta_slow": 3},
        {"truncate": False},
        {"attention_factor": 1.25},
        {"mscale": 0.7, "mscale_all_dim": 1.3},
        {"factor": None},
        {"factor": 0.5},
        {"beta_fast": 2, "beta_slow": 2, "truncate": False},
    ],
    ids=str,
)
def test_every_option_of_yarn_acts_as_in_transformers(options):
    settings = {"rope_type": "yarn", "rope_theta": 5e5, **SETTINGS["yarn"], **options}
    theirs = LlamaConfig(hidden_size=512, num_attention_heads=8, max_position_embeddings=16384)
    theirs.rope_parameters = dict(settings)
    expected, expected_scale = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    ours = SimpleNamespace(
        hidden_size=512, num_attention_heads=8, max_position_embeddings=16384, rope_parameters=settings
    )
    inv_freq, scale = inverse_frequencies(ours, max_model_len=64)
    assert torch.equal(inv_freq, expected)
    assert scale == pytest.approx(expected_scale)


def test_original_length_beside_the_rope_settings_wins():
    """Some configs keep original_max_position_embeddings at the top level, as transformers knows."""
    inside = config_of("yarn", "rope_parameters")
    outside = config_of("yarn", "rope_parameters", original_max_position_embeddings=1024)
    outside.rope_parameters["original_max_position_embeddings"] = 4096
    inside.rope_parameters["original_max_position_embeddings"] = 1024
    assert torch.equal(inverse_frequencies(inside, 64)[0], inverse_frequencies(outside, 64)[0])


def test_no_rope_settings_at_all_is_the_default():
    bare = SimpleNamespace(hidden_size=512, num_attention_heads=8, max_position_embeddings=64)
    expected = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(inverse_frequencies(bare, 64)[0], expected)


@pytest.mark.parametrize("kind", ["longrope", "su", "mrope"])
def test_unknown_rope_type_names_the_supported(kind):
    config = config_of("default", "rope_parameters")
    config.rope_parameters["rope_type"] = kind
    with pytest.raises(UnsupportedModelError) as caught:
        RotaryEmbedding(config, max_model_len=8, **WHERE)
    assert all(word in str(caught.value) for word in [kind, "config.json", *ROPE_TYPES])


@pytest.mark.parametrize("value", [None, "2", True, 0, -1.0])
def test_missing_or_senseless_factor(value):
    config = config_of("linear", "rope_parameters")
    config.rope_parameters["factor"] = value
    with pytest.raises(UnsupportedModelError, match="'linear' needs 'factor'"):
        inverse_frequencies(config, 8)


def test_partial_rotation_and_settings_per_layer_type_are_refused():
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor=0.5"):
        inverse_frequencies(config_of("default", "type", partial_rotary_factor=0.5), 8)
    nested = config_of("default", "rope_parameters")
    nested.rope_parameters = {"full_attention": {"rope_type": "default"}}
    with pytest.raises(UnsupportedModelError, match="full_attention"):
        inverse_frequencies(nested, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_equals_transformers(dtype):
    config = LlamaConfig(hidden_size=512, num_attention_heads=8, max_position_embeddings=4096)
    positions = torch.tensor([0, 1, 7, 4095, 3])
    qk = torch.randn(5, 12, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    rotary = RotaryEmbedding(config, max_model_len=4096, dtype=dtype, device="cpu")
    ours = apply_rotary(qk, *rotary(positions))
    cos, sin = LlamaRotaryEmbedding(config)(qk, positions[None])
    theirs, _ = apply_rotary_pos_emb(qk[None], qk[None], cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(ours, theirs[0], atol=1e-6 if dtype == torch.float32 else 4e-2, rtol=0)


def test_a_position_beyond_the_table_is_an_error():
    rotary = RotaryEmbedding(config_of("default", "type"), max_model_len=8, **WHERE)
    with pytest.raises((IndexError, RuntimeError)):
        rotary(torch.tensor([8]))


def test_rms_norm_equals_transformers_and_adds_the_residual():
    generator = torch.Generator().manual_seed(0)
    x, residual, weight = (torch.randn(*shape, generator=generator) for shape in [(9, 96), (9, 96), (96,)])
    ours, theirs = RMSNorm(96, 1e-5, **WHERE), LlamaRMSNorm(96, 1e-5)
    ours.weight.data.copy_(weight)
    theirs.weight.data.copy_(weight)
    kept = residual.clone()
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=0)
        expected_sum = x + residual
        out, total = ours(x.clone(), residual)
        torch.testing.assert_close(out, theirs(expected_sum), atol=1e-6, rtol=0)
    assert torch.equal(total, expected_sum)
    assert torch.equal(residual, kept)


def test_rms_norm_of_large_halves_does_not_overflow():
    """300 squared is beyond float16; the mean of squares must be taken in float32."""
    norm = RMSNorm(64, 1e-6, dtype=torch.float16, device="cpu")
    norm.weight.data.fill_(1)
    out = norm(torch.full((2, 64), 300.0, dtype=torch.float16))
    torch.testing.assert_close(out, torch.ones_like(out), atol=1e-3, rtol=0)


def test_head_norm_gives_queries_and_keys_their_own_weight():
    qk = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
    norm = QKNorm(16, 3, 2, 1e-6, **WHERE)
    parts = dict(norm.parts())
    weights = {"q_norm.weight": torch.linspace(1, 2, 16), "k_norm.weight": torch.linspace(-3, 4, 16)}
    for name, weight in weights.items():
        parts[name].fill(weight)
    for heads, weight in zip((slice(0, 3), slice(3, 5)), weights.values(), strict=True):
        single = LlamaRMSNorm(16, 1e-6)
        single.weight.data.copy_(weight)
        torch.testing.assert_close(norm(qk)[:, heads], single(qk[:, heads]).detach(), atol=1e-6, rtol=0)


def test_gated_activation_leaves_its_input_alone():
    gate_up = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    before = gate_up.clone()
    gate, up = before[:, :5], before[:, 5:]
    torch.testing.assert_close(silu_and_mul(gate_up), gate * torch.sigmoid(gate) * up)
    assert torch.equal(gate_up, before)
