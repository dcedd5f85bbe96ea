"""What an engine is built from: frozen, resolved, checked.

`EngineArgs` (what a person types) resolves once into an `EngineConfig` (what the rooms read). Here
every number is final and every combination is one that works; nothing below looks at defaults,
environment variables or "auto" again. Dtypes are names ("float32"), so that reading a configuration
does not load torch. The two JSON files of a model are read and checked here, once.

vLLM: `vllm/config/`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_lib.errors import CorruptModelError, UnsupportedModelError
from course_lib.parallel.config import ParallelConfig
from course_lib.parallel.layout import ParallelLayout, split_evenly
from course_lib.sampling_params import SamplingParams

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

# What generation_config.json may say about sampling, in the words of `SamplingParams`.
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Words that transformers' loader would take for itself instead of as entries of config.json.
_LOADER_WORDS = (
    "trust_remote_code", "code_revision", "revision", "cache_dir", "token", "subfolder", "force_download",
    "local_files_only", "proxies", "return_unused_kwargs", "gguf_file",
)  # fmt: skip
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip


def read_hf_config(folder: Path, overrides: dict[str, Any] | None = None) -> Any:
    """The model's `PretrainedConfig` from config.json, some entries replaced. Runs no code of the folder.

    Raises:
        CorruptModelError: the file is no configuration, or one with impossible sizes.
        UnsupportedModelError: transformers does not know the model, or only by code that comes with it.
        ValueError: the same with `overrides`, which may be the cause; or one that is no entry of config.json.
    """
    from transformers import AutoConfig

    overrides = overrides or {}
    for name in overrides:
        if not isinstance(name, str) or name in _LOADER_WORDS:
            raise ValueError(f"hf_overrides cannot set {name!r}: it is no entry of config.json; leave it out")
    file = folder / "config.json"
    stored = _read_json(file)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **overrides)
        _check_sizes(config)
    except Exception as error:  # wrong types and sizes surface as many kinds, ZeroDivisionError among them
        what = " ".join(str(error).split())
        if "auto_map" in stored and isinstance(error, ValueError):
            raise UnsupportedModelError(
                f"{file} needs code that comes with the checkpoint (auto_map), and code from checkpoints is "
                "never run: use a checkpoint whose architecture transformers knows"
            ) from error
        if overrides:
            raise ValueError(f"hf_overrides={overrides!r} and {file} do not make a model: {what}") from error
        if isinstance(error, ValueError):
            raise UnsupportedModelError(f"{file}: transformers cannot make a model of it: {what}") from error
        raise CorruptModelError(f"{file} is no usable configuration ({what}): fetch it again") from error
    return config


def upcycle(hf_config: Any, num_experts: int) -> None:
    """Turn the configuration of a dense Llama into that of the mixture that `models.upcycled` makes of its weights.

    ValueError for a model that this cannot be done with.
    """
    architectures = getattr(hf_config, "architectures", None) or []
    if "LlamaForCausalLM" not in architectures:
        raise ValueError(
            f"upcycle_experts={num_experts} makes experts of the MLPs of a LlamaForCausalLM, such as the course "
            f"model, and this is {', '.join(architectures) or 'none that config.json names'}: leave it out"
        )
    hf_config.architectures = ["UpcycledLlamaForCausalLM"]
    hf_config.num_local_experts = num_experts
    hf_config.num_experts_per_tok = 2


def read_generation_defaults(folder: Path) -> dict[str, Any]:
    """generation_config.json, checked as far as it is used; {} without one. Raises CorruptModelError."""
    file = folder / "generation_config.json"
    if not file.exists():
        return {}
    defaults = _read_json(file)
    end = defaults.get("eos_token_id")
    ends = end if isinstance(end, list) else [] if end is None else [end]
    try:
        if not all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in ends):
            raise ValueError(f"eos_token_id must be a token id or a list of them, not {end!r}")
        sampling = {name: defaults[name] for name in _SAMPLING_DEFAULTS if defaults.get(name) is not None}
        SamplingParams(**sampling, max_tokens=defaults.get("max_new_tokens") or None)
    except (TypeError, ValueError) as error:
        raise CorruptModelError(f"{file}: {error} Correct or delete the file.") from error
    return defaults


class _BadSizeError(Exception):
    """A size in config.json that no model can have."""


def _check_sizes(config: Any) -> None:
    for name in _SIZES:
        size = getattr(config, name, None)
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise _BadSizeError(f"{name} must be an integer of at least 1, not {size!r}")
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None)
    if heads and kv_heads and heads % kv_heads:
        raise _BadSizeError(f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CorruptModelError(f"{file} is cut off, or no JSON text ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise CorruptModelError(f"{file} must hold a JSON object, not {type(value).__name__}: fetch it again")
    return value


@dataclass(frozen=True)
class ModelConfig:
    """Which weights, in which precision, up to which length."""

    model: str  # as the user named it
    path: Path  # local Hugging Face folder
    tokenizer_path: Path
    hf_config: Any  # transformers.PretrainedConfig of the text model
    generation_defaults: dict[str, Any]  # from generation_config.json
    dtype: str
    max_model_len: int
    seed: int
    max_logprobs: int
    load_format: str
    skip_tokenizer_init: bool

    @property
    def vocab_size(self) -> int:
        return self.hf_config.vocab_size

    @property
    def num_layers(self) -> int:
        return self.hf_config.num_hidden_layers

    @property
    def num_kv_heads(self) -> int:
        kv_heads = getattr(self.hf_config, "num_key_value_heads", None)
        return kv_heads or self.hf_config.num_attention_heads

    @property
    def head_dim(self) -> int:
        head_dim = getattr(self.hf_config, "head_dim", None)
        return head_dim or self.hf_config.hidden_size // self.hf_config.num_attention_heads

    @property
    def num_experts(self) -> int | None:
        """Routed experts per layer; None for a dense model."""
        for name in ("num_local_experts", "num_experts"):  # Mixtral, GraniteMoE; Qwen2-MoE
            if getattr(self.hf_config, name, None):
                return getattr(self.hf_config, name)
        return None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids of the model's files; generation_config.json, if it has any, wins over
        config.json, as in vLLM. Ids beyond the vocabulary, which no model can generate, are left out."""
        value = self.generation_defaults.get("eos_token_id")
        if value is None:
            value = getattr(self.hf_config, "eos_token_id", None)
        ids = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
        return tuple(dict.fromkeys(t for t in ids if 0 <= t < self.vocab_size))

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, in bytes; a rank may hold a part of them."""
        return self.num_layers * self._kv_bytes_per_layer(self.num_kv_heads)

    def kv_heads_per_rank(self, layout: ParallelLayout) -> int:
        """KV heads of one rank: its share, or one that other ranks hold as well where there are fewer than ranks."""
        return max(1, self.num_kv_heads // layout.tensor)

    def kv_bytes_per_token_per_rank(self, layout: ParallelLayout) -> int:
        """Keys and values of one token on a rank of the first stage, which has the most layers, in bytes."""
        num_layers = len(split_evenly(self.num_layers, layout.pipeline)[0])
        return num_layers * self._kv_bytes_per_layer(self.kv_heads_per_rank(layout))

    def _kv_bytes_per_layer(self, num_kv_heads: int) -> int:
        return 2 * num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class CacheConfig:
    """How the paged KV cache is cut and how large it may be."""

    block_size: int  # tokens
    num_blocks_override: int | None
    memory_bytes: int | None  # None: what is free, times the utilization below
    gpu_memory_utilization: float
    enable_prefix_caching: bool


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step, and who goes first."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_chunked_prefill: bool
    long_prefill_token_threshold: int  # 0: no cap
    policy: str  # "fcfs" or "priority"


@dataclass(frozen=True)
class EngineConfig:
    """Everything one engine needs to know."""

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    parallel: ParallelConfig
    device: str  # "cpu" or "cuda"
    attention_backend: str  # "torch" or "triton"
    enforce_eager: bool  # no captured graphs
    shrink_to_fit: bool  # max_model_len was not asked for: lower it if the cache is too small
    log_stats: bool
    debug: bool  # check all invariants after every step
