"""Which class runs a checkpoint: the one place that knows the architectures by name.

Modules are imported only when their architecture is asked for. vLLM: `model_executor/models/registry.py`.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any

from course_lib.errors import UnsupportedModelError
from course_lib.models.causal_lm import CausalLM

# architecture -> module that defines the class of that name
ARCHITECTURES = {
    "LlamaForCausalLM": "course_lib.models.llama",
    "MistralForCausalLM": "course_lib.models.llama",
    "MixtralForCausalLM": "course_lib.models.mixtral",
    "GraniteMoeForCausalLM": "course_lib.models.granitemoe",
    "Qwen2ForCausalLM": "course_lib.models.qwen2",
    "Qwen2MoeForCausalLM": "course_lib.models.qwen2_moe",
    "Qwen3ForCausalLM": "course_lib.models.qwen3",
    "UpcycledLlamaForCausalLM": "course_lib.models.upcycled",  # in no file: `upcycle_experts` asks for it
}


def resolve_model_class(hf_config: Any) -> type[CausalLM]:
    """The class for the first supported entry of `hf_config.architectures`.

    UnsupportedModelError names what the checkpoint asks for, the nearest supported name and the list.
    """
    wanted = list(getattr(hf_config, "architectures", None) or ())
    for name in wanted:
        if name in ARCHITECTURES:
            return getattr(import_module(ARCHITECTURES[name]), name)
    supported = ", ".join(ARCHITECTURES)
    if not wanted:
        raise UnsupportedModelError(
            f'config.json names no architecture; add for example "architectures": ["LlamaForCausalLM"]. '
            f"Supported are {supported}."
        )
    near = get_close_matches(wanted[0], ARCHITECTURES, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UnsupportedModelError(
        f"architecture {', '.join(wanted)} is not supported.{hint} Supported are {supported}; choose a "
        "checkpoint whose config.json names one of them."
    )
