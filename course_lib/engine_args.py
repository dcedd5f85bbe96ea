"""What a person may say about an engine, and its one resolution into an `EngineConfig`.

Names, defaults and meanings are vLLM's. An argument that is accepted works; one this engine does
not have yet is refused by name with what to use instead, and a misspelt one is answered with the
nearest real name. Nothing is accepted and ignored.

vLLM: `vllm/engine/arg_utils.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_lib.config import (
    DTYPE_BYTES,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    read_generation_defaults,
    read_hf_config,
    upcycle,
)
from course_lib.parallel.config import resolve_parallel
from course_lib.parallel.replicas import BALANCINGS, DATA_BACKENDS

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Arguments of vLLM that come with later lessons: name -> (the value that works, why, what to do).
_LATER: dict[str, tuple[Any, str]] = {
    "quantization": (None, "weights run in float32, float16 or bfloat16; choose with dtype="),
    "enable_lora": (False, "adapters cannot be loaded; merge the adapter into the weights first"),
    "max_loras": (1, "adapters cannot be loaded; leave it out"),
    "max_lora_rank": (16, "adapters cannot be loaded; leave it out"),
    "speculative_config": (None, "there is no speculative decoding yet; leave it out"),
    "kv_transfer_config": (None, "the cache cannot be moved between engines yet; leave it out"),
    "limit_mm_per_prompt": (None, "prompts are text only; leave it out"),
    "mm_processor_kwargs": (None, "prompts are text only; leave it out"),
    "cpu_offload_gb": (0, "weights stay on one device; leave it at 0"),
    "swap_space": (0, "preempted requests are recomputed, never swapped; leave it at 0"),
    "worker_extension_cls": (None, "the runner cannot be extended from outside yet; leave it out"),
    "trust_remote_code": (False, "code from checkpoints is never run; leave it False"),
}

_DTYPES = ("auto", "float32", "float", "float16", "half", "bfloat16")
_DTYPE_ALIASES = {"float": "float32", "half": "float16"}
_DEFAULT_UTILIZATION = 0.9
_MOST_TOKENS = 1 << 24  # of a request or of a step: more than any model takes
_MOST_SLOTS = 2**31 - 1  # tokens in the cache: their numbers are 32 bits wide
_MOST_TABLE_ENTRIES = 1 << 32  # max_num_seqs * max_model_len: the token table's cells
# Integers: name -> (lowest, highest). Those with a default of None may be None, and so may the seed.
_RANGES: dict[str, tuple[int, int]] = {
    "max_model_len": (1, _MOST_TOKENS),
    "num_gpu_blocks_override": (1, _MOST_SLOTS),
    "kv_cache_memory_bytes": (1, 2**63 - 1),
    "max_num_seqs": (1, 1 << 16),
    "max_num_batched_tokens": (1, _MOST_TOKENS),
    "long_prefill_token_threshold": (0, _MOST_TOKENS),
    "max_logprobs": (-1, 2**31 - 1),
    "block_size": (1, 256),
    "tensor_parallel_size": (1, 1 << 10),
    "pipeline_parallel_size": (1, 1 << 10),
    "data_parallel_size": (1, 1 << 10),
    "upcycle_experts": (2, 1 << 10),
    "seed": (0, 2**64 - 1),  # what torch's generators take
}


@dataclass
class EngineArgs:
    """Arguments of an engine. See the README's table for meanings; units: tokens and bytes."""

    model: str = DEFAULT_MODEL
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    task: str = "auto"
    runner: str = "auto"
    dtype: str = "auto"
    seed: int | None = 0
    max_model_len: int | None = None
    block_size: int = 16
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = _DEFAULT_UTILIZATION
    swap_space: float = 0
    cpu_offload_gb: float = 0
    max_num_seqs: int | None = None  # None: 256, or max_num_batched_tokens if that is less
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    scheduling_policy: str = "fcfs"
    max_logprobs: int = 20
    enforce_eager: bool = False  # False permits CUDA graphs of decode steps
    disable_log_stats: bool = False
    device: str = "auto"
    attention_backend: str = "auto"
    load_format: str = "auto"
    hf_overrides: dict[str, Any] | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    data_parallel_backend: str = "mp"  # where the replicas run
    data_parallel_balancing: str = "least_loaded"  # which replica is given the next request
    distributed_executor_backend: str | None = None
    enable_expert_parallel: bool = False
    upcycle_experts: int | None = None  # make each MLP of a dense model into so many experts
    quantization: str | None = None
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    speculative_config: dict[str, Any] | None = None
    kv_transfer_config: dict[str, Any] | None = None
    limit_mm_per_prompt: dict[str, int] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    worker_extension_cls: str | None = None

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineArgs:
        """Like the constructor, but an unknown name is answered with the nearest real one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f". Known arguments: {', '.join(known)}"
                raise TypeError(f"unknown argument {name!r}{hint}")
        return cls(**kwargs)

    # ---- command line ---------------------------------------------------------------------------

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add one `--option` per field, as `vllm serve` spells them."""
        for field in dataclasses.fields(EngineArgs):
            option = "--" + field.name.replace("_", "-")
            if field.name in _CHOICES:
                parser.add_argument(option, choices=_CHOICES[field.name], default=field.default)
            elif isinstance(field.default, bool):
                parser.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default)
            else:
                parser.add_argument(option, type=_cli_type(field.type), default=field.default)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EngineArgs:
        """Pick this class's fields out of parsed arguments."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(args, name) for name in names if hasattr(args, name)})

    # ---- resolution -----------------------------------------------------------------------------

    def create_engine_config(self) -> EngineConfig:
        """Check everything, resolve every "auto", find the model.

        Raises:
            ValueError, TypeError: an argument is out of range, of the wrong type or not supported.
            CourseError: the model cannot be found, read or run.
        """
        self._refuse_later_arguments()
        self._check_types_and_ranges()
        device = _resolve_device(self.device)
        if device == "cpu" and self.gpu_memory_utilization != _DEFAULT_UTILIZATION:
            raise ValueError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} means nothing on a CPU: set "
                f"kv_cache_memory_bytes"
            )
        model = self._resolve_model(device)
        batched = self.max_num_batched_tokens
        num_seqs = self.max_num_seqs or min(256, batched or 256)
        if batched is None:
            batched = 2048 if device == "cpu" else 8192
            batched = max(batched, num_seqs)
            if not self.enable_chunked_prefill:
                batched = max(batched, model.max_model_len)
        if batched < num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={batched} is below max_num_seqs={num_seqs}: each running "
                f"request needs one token a step; raise the first or lower the second"
            )
        if not self.enable_chunked_prefill and batched < model.max_model_len:
            raise ValueError(
                f"max_num_batched_tokens={batched} is below max_model_len={model.max_model_len} while "
                f"enable_chunked_prefill=False: a long prompt could never be scheduled; raise it, lower "
                f"max_model_len, or enable chunked prefill"
            )
        if num_seqs * model.max_model_len > _MOST_TABLE_ENTRIES:
            raise ValueError(
                f"max_num_seqs={num_seqs} requests of max_model_len={model.max_model_len} tokens need a table "
                f"of more than {_MOST_TABLE_ENTRIES} tokens: lower one of them"
            )
        return EngineConfig(
            model=model,
            cache=CacheConfig(
                block_size=self.block_size,
                num_blocks_override=self.num_gpu_blocks_override,
                memory_bytes=self.kv_cache_memory_bytes,
                gpu_memory_utilization=self.gpu_memory_utilization,
                enable_prefix_caching=self.enable_prefix_caching,
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=num_seqs,
                max_num_batched_tokens=batched,
                max_model_len=model.max_model_len,
                enable_chunked_prefill=self.enable_chunked_prefill,
                long_prefill_token_threshold=self.long_prefill_token_threshold,
                policy=self.scheduling_policy,
            ),
            parallel=resolve_parallel(
                tensor_parallel_size=self.tensor_parallel_size,
                pipeline_parallel_size=self.pipeline_parallel_size,
                data_parallel_size=self.data_parallel_size,
                backend=self.distributed_executor_backend,
                data_backend=self.data_parallel_backend,
                balancing=self.data_parallel_balancing,
                enable_expert_parallel=self.enable_expert_parallel,
                num_heads=model.hf_config.num_attention_heads,
                num_kv_heads=model.num_kv_heads,
                num_layers=model.num_layers,
                num_experts=model.num_experts,
            ),
            device=device,
            attention_backend=_resolve_attention_backend(self.attention_backend, device),
            enforce_eager=self.enforce_eager,
            shrink_to_fit=self.max_model_len is None,
            log_stats=not self.disable_log_stats,
            debug=os.environ.get("COURSE_DEBUG", "0") not in ("", "0"),
        )

    def _refuse_later_arguments(self) -> None:
        for name, (works, remedy) in _LATER.items():
            value = getattr(self, name)
            if value != works:
                raise ValueError(f"{name}={value!r} is not supported: {remedy}")

    def _check_types_and_ranges(self) -> None:
        for name in ("skip_tokenizer_init", "enable_prefix_caching", "enable_chunked_prefill", "disable_log_stats",
                     "enforce_eager", "enable_expert_parallel"):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and (name == "seed" or getattr(EngineArgs, name) is None):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, not {value!r}")
            if not low <= value <= high and name != "block_size":
                raise ValueError(f"{name}={value} is out of range: it must be from {low} to {high}")
        if not 1 <= self.block_size <= 256 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size={self.block_size} must be a power of two from 1 to 256, such as 16")
        if (self.num_gpu_blocks_override or 0) * self.block_size > _MOST_SLOTS:
            raise ValueError(
                f"num_gpu_blocks_override={self.num_gpu_blocks_override} is out of range: with block_size="
                f"{self.block_size} it must be at most {_MOST_SLOTS // self.block_size}"
            )
        if self.long_prefill_token_threshold and not self.enable_chunked_prefill:
            raise ValueError(
                f"long_prefill_token_threshold={self.long_prefill_token_threshold} cuts prompts into chunks, "
                f"which enable_chunked_prefill=False forbids: leave one of them out"
            )
        if self.revision is not None and (not isinstance(self.revision, str) or not self.revision):
            raise TypeError(f"revision must be a branch, tag or commit, not {self.revision!r}")
        utilization = self.gpu_memory_utilization
        number = isinstance(utilization, (int, float)) and not isinstance(utilization, bool)
        if not number or not math.isfinite(utilization) or not 0 < utilization <= 1:
            raise ValueError(f"gpu_memory_utilization={utilization!r} must be above 0 and at most 1")
        if self.hf_overrides is not None and not isinstance(self.hf_overrides, dict):
            raise TypeError("hf_overrides must be a dict of config.json entries to replace")

    def _resolve_model(self, device: str) -> ModelConfig:
        from course_lib.model_store.resolve import resolve_model

        if not isinstance(self.model, (str, Path)) or not str(self.model):
            raise TypeError(f"model must be a folder or a model id such as {DEFAULT_MODEL!r}, not {self.model!r}")
        path = resolve_model(str(self.model), revision=self.revision)
        tokenizer_path = path if self.tokenizer is None else resolve_model(str(self.tokenizer))
        hf_config = read_hf_config(path, self.hf_overrides)
        if self.upcycle_experts is not None:
            upcycle(hf_config, self.upcycle_experts)
        return ModelConfig(
            model=str(self.model),
            path=path,
            tokenizer_path=tokenizer_path,
            hf_config=hf_config,
            generation_defaults=read_generation_defaults(path),
            dtype=_resolve_dtype(self.dtype, hf_config, device),
            max_model_len=self._resolve_max_model_len(hf_config),
            seed=self.seed or 0,
            max_logprobs=self.max_logprobs,
            load_format=self.load_format,
            skip_tokenizer_init=self.skip_tokenizer_init,
        )

    def _resolve_max_model_len(self, hf_config: Any) -> int:
        trained = getattr(hf_config, "max_position_embeddings", None)
        rope = getattr(hf_config, "rope_parameters", None) or {}
        if trained and rope.get("rope_type") == "yarn" and "original_max_position_embeddings" in rope:
            trained = max(trained, int(rope["original_max_position_embeddings"] * rope["factor"]))
        if self.max_model_len is None:
            return trained or 2048
        if trained and self.max_model_len > trained:
            raise ValueError(
                f"max_model_len={self.max_model_len} is beyond the {trained} positions the model was trained "
                f"for: lower it, or extend the model with hf_overrides (rope_parameters, max_position_embeddings)"
            )
        return self.max_model_len


# The asynchronous engine takes the same arguments.
AsyncEngineArgs = EngineArgs

_CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("auto", "generate"),
    "runner": ("auto", "generate"),
    "dtype": _DTYPES,
    "scheduling_policy": ("fcfs", "priority"),
    "device": ("auto", "cpu", "cuda"),
    "attention_backend": ("auto", "torch", "triton"),
    "load_format": ("auto", "safetensors", "dummy"),
    "data_parallel_backend": DATA_BACKENDS,
    "data_parallel_balancing": BALANCINGS,
}


class FlexibleArgumentParser(argparse.ArgumentParser):
    """An argument parser that takes `--max_model_len` and `--max-model-len` alike, as vLLM's does."""

    def parse_known_args(self, args=None, namespace=None):
        import sys

        def dashed(arg: str) -> str:
            if not arg.startswith("--"):
                return arg
            option, equals, value = arg.partition("=")
            return option.replace("_", "-") + equals + value

        raw = sys.argv[1:] if args is None else args
        return super().parse_known_args([dashed(arg) for arg in raw], namespace)


def _cli_type(annotation: str) -> Any:
    if "dict" in annotation:
        return json.loads
    if "int" in annotation:
        return int
    return float if "float" in annotation else str


def _resolve_device(device: str) -> str:
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            return "cuda"
        if device == "cuda":
            raise ValueError('device="cuda": torch finds no CUDA device here; use device="cpu" or "auto"')
    return "cpu"


def _resolve_attention_backend(name: str, device: str) -> str:
    if name == "auto":
        return "triton" if device == "cuda" else "torch"
    if name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            'attention_backend="triton" on a CPU runs in Triton\'s interpreter: set TRITON_INTERPRET=1 in the '
            'environment before Python starts, or use attention_backend="torch"'
        )
    return name


def _resolve_dtype(name: str, hf_config: Any, device: str) -> str:
    """ "auto": the checkpoint's own type on a GPU; on a CPU float32, the only one that is both exact and
    quick at every batch size there."""
    name = _DTYPE_ALIASES.get(name, name)
    if name != "auto":
        return name
    if device == "cpu":
        return "float32"
    stored = str(getattr(hf_config, "dtype", None)).removeprefix("torch.")
    return stored if stored in DTYPE_BYTES and stored != "float32" else "bfloat16"
