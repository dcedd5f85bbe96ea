"""What an engine is built from: frozen, resolved, checked.

`EngineArgs` (what a person types) resolves once into an `EngineConfig` (what the rooms read). Here
every number is final and every combination is one that works; nothing below looks at defaults,
environment variables or "auto" again. Dtypes are names ("float32"), so that reading a configuration
does not load torch.

vLLM: `vllm/config/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


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
    def eos_token_ids(self) -> tuple[int, ...]:
        """All end-of-sequence ids; generation_config.json wins over config.json, as in vLLM."""
        value = self.generation_defaults.get("eos_token_id", getattr(self.hf_config, "eos_token_id", None))
        if value is None:
            return ()
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, in bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


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
    device: str  # "cpu" or "cuda"
    attention_backend: str  # "torch" or "triton"
    shrink_to_fit: bool  # max_model_len was not asked for: lower it if the cache is too small
    log_stats: bool
    debug: bool  # check all invariants after every step
