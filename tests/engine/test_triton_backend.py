"""The engine on the Triton kernels, in Triton's interpreter: the same tokens as on plain torch.

In a process of its own, because Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton wheels exist for Linux only; the torch backend serves elsewhere")

SCRIPT = """
import sys
from course_lib import LLM, SamplingParams

prompts = [[3, 4, 5], list(range(3, 30)), [7] * 9, list(range(3, 30)) + [9]]
params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (6, 3, 8, 5)]
answers = []
for backend in ("torch", "triton"):
    llm = LLM(model=sys.argv[1], skip_tokenizer_init=True, device="cpu", attention_backend=backend, block_size=4,
              num_gpu_blocks_override=20, max_num_seqs=3, max_num_batched_tokens=16)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    answers.append([output.outputs[0].token_ids for output in outputs])
assert answers[0] == answers[1], answers
print("equal")
"""


def test_triton_and_torch_backends_agree(tiny_model_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_model_path)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    if "interpreter does not work with NumPy" in done.stderr:
        pytest.skip("this Triton's interpreter is older than this NumPy")
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_the_interpreter_must_be_asked_for(tiny_model_path: Path) -> None:
    from course_lib import EngineArgs

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter is on")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        EngineArgs(model=str(tiny_model_path), device="cpu", attention_backend="triton").create_engine_config()
