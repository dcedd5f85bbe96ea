"""Rotary position embedding (RoPE), neox style: dimension i is rotated together with i + D/2.

Owns the table of cosines and sines, one row per position, computed in float32 and stored in the model's
dtype. A forward pass gathers its rows once (`RotaryEmbedding`), every layer rotates queries and keys
together (`apply_rotary`). Frequencies follow transformers' `modeling_rope_utils.py` to the bit, with one
exception: `dynamic` re-scales with the *current* length there, which would contradict keys already in
the cache, so here the length is fixed: `max_model_len`. vLLM: `model_executor/layers/rotary_embedding/`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from course_lib.errors import UnsupportedModelError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


class RotaryEmbedding(nn.Module):
    """positions [T] (int32 or int64, below `max_model_len`) -> (cos, sin), each [T, 1, D].

    The first half of `sin` carries the minus sign of the rotation, so that `apply_rotary` needs three
    operations.
    """

    def __init__(
        self, hf_config: Any, *, max_model_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        inv_freq, scale = inverse_frequencies(hf_config, max_model_len)
        angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * inv_freq
        table = torch.cat((angles.cos() * scale, angles.sin() * scale), dim=-1)
        self.register_buffer("cos_sin", table.to(dtype).to(device), persistent=False)  # [positions, D]

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate every head: x [T, heads, D], cos and sin [T, 1, D] of `RotaryEmbedding` -> [T, heads, D]."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def rope_parameters(hf_config: Any) -> dict[str, Any]:
    """The RoPE settings of a config in transformers 5's spelling, whichever spelling it has.

    `rope_parameters` is transformers 5's; `rope_scaling` (with `type` or `rope_type`) beside `rope_theta`
    is what older config.json files hold. UnsupportedModelError for a type this engine does not compute.
    """
    found = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    params = dict(found)
    if any(isinstance(value, dict) for value in params.values()):
        raise UnsupportedModelError(
            f"config.json: RoPE settings per layer type ({', '.join(params)}) are not supported; "
            "one setting for all layers is."
        )
    params["rope_type"] = params.get("rope_type") or params.get("type") or "default"
    params["rope_theta"] = params.get("rope_theta") or getattr(hf_config, "rope_theta", None) or 10000.0
    if params["rope_type"] not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"config.json: RoPE type {params['rope_type']!r} is not supported; "
            f"supported are {', '.join(ROPE_TYPES)}."
        )
    partial = params.get("partial_rotary_factor") or getattr(hf_config, "partial_rotary_factor", None) or 1.0
    if partial != 1.0:
        raise UnsupportedModelError(
            f"config.json: partial_rotary_factor={partial} is not supported; "
            "the supported architectures rotate whole heads (1.0)."
        )
    return params


def inverse_frequencies(hf_config: Any, max_model_len: int) -> tuple[torch.Tensor, float]:
    """Radians per position of each rotated pair, float32 [D / 2], and the factor on cos and sin (yarn)."""
    params = rope_parameters(hf_config)
    dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    rope_type, theta = params["rope_type"], params["rope_theta"]
    if rope_type == "dynamic":
        theta = _ntk_theta(theta, _number(params, "factor"), dim, hf_config, max_model_len)
    inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope_type == "linear":
        return inv_freq / _number(params, "factor"), 1.0
    if rope_type == "llama3":
        return _llama3(inv_freq, params, _original_length(hf_config, params)), 1.0
    if rope_type == "yarn":
        return _yarn(params, theta, dim, hf_config)
    return inv_freq, 1.0


def _number(params: dict[str, Any], key: str) -> float:
    value = params.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UnsupportedModelError(
            f"config.json: RoPE type {params['rope_type']!r} needs {key!r} as a positive number, "
            f"found {value!r}; take config.json from the model's publisher again."
        )
    return value


def _original_length(hf_config: Any, params: dict[str, Any]) -> int:
    """Context length before scaling; a top-level value wins over the one among the RoPE settings."""
    top_level = getattr(hf_config, "original_max_position_embeddings", None)
    inside = params.get("original_max_position_embeddings")
    return top_level or inside or hf_config.max_position_embeddings


def _ntk_theta(theta: float, factor: float, dim: int, hf_config: Any, max_model_len: int) -> float:
    """NTK-aware base for a context of `max_model_len`; unchanged up to max_position_embeddings."""
    trained = hf_config.max_position_embeddings
    stretch = factor * max(max_model_len, trained) / trained - (factor - 1)
    return theta * stretch ** (dim / (dim - 2))


def _llama3(inv_freq: torch.Tensor, params: dict[str, Any], original: int) -> torch.Tensor:
    """Llama 3.1: divide long wavelengths by `factor`, keep short ones, interpolate in between."""
    factor, low, high = (_number(params, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, between)
    return torch.where(wavelength < original / high, inv_freq, scaled)


def _yarn(params: dict[str, Any], theta: float, dim: int, hf_config: Any) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate slow dimensions, keep fast ones, sharpen attention by a factor."""
    original = _original_length(hf_config, params)
    factor = hf_config.max_position_embeddings / original
    if params.get("factor") is not None:
        factor = _number(params, "factor")

    def dimension_turning(turns: float) -> float:  # which pair makes so many turns in the original context
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_turning(params.get("beta_fast") or 32)
    high = dimension_turning(params.get("beta_slow") or 1)
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp below would divide by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    wavelength = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)  # over 2 pi
    keep = 1 - ramp
    inv_freq = (1.0 / (factor * wavelength)) * (1 - keep) + (1.0 / wavelength) * keep
    return inv_freq, _yarn_attention_factor(params, factor)


def _yarn_attention_factor(params: dict[str, Any], factor: float) -> float:
    if params.get("attention_factor") is not None:
        return float(params["attention_factor"])

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, mscale_all_dim = params.get("mscale"), params.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1)
