"""From a model's name to a folder in Hugging Face's format.

Owns the cache on disk. Invariant: a folder in the cache is complete (it appears by one rename) and
its manifest lists every file. vLLM: `vllm/transformers_utils/`, `vllm/model_executor/model_loader/`
(the downloading half).
"""

from course_lib.model_store.resolve import COURSE_MODEL, resolve_model

__all__ = ["COURSE_MODEL", "resolve_model"]
