"""What can be imported where, each in a fresh process: without Triton, and with the interpreter set late."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NO_TRITON = "import sys; sys.modules['triton'] = None\n"  # importing it now raises ImportError
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no wheel for this platform"
)


def _run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )


def test_reference_needs_no_triton_and_kernels_triton_says_what_to_do():
    code = NO_TRITON + (
        "import kernels, kernels.reference\n"
        "try:\n    import kernels.triton\n"
        "except ImportError as error:\n    print(error)\n"
    )
    result = _run(code)
    assert result.returncode == 0, result.stderr
    assert "exists for Linux only" in result.stdout and "torch attention backend" in result.stdout


def test_import_kernels_is_cheap():
    result = _run("import sys, kernels\nprint('torch' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


@needs_triton
def test_interpreter_switched_on_too_late_is_an_error():
    """Triton's own library would be compiled, ours interpreted; Triton's message for that helps nobody."""
    result = _run("import triton, os\nos.environ['TRITON_INTERPRET'] = '1'\nimport kernels.triton")
    assert "TRITON_INTERPRET=1 was set after something had imported triton" in result.stderr


@needs_triton
def test_compiled_kernels_refuse_cpu_tensors():
    code = (
        "import torch, kernels.triton as kt\n"
        "x = torch.zeros(1, 1, 16); cache = torch.zeros(1, 1, 1, 16)\n"
        "kt.reshape_and_cache(x, x, cache, cache, torch.zeros(1, dtype=torch.int64))\n"
    )
    assert "ValueError: key is on cpu: compiled Triton kernels need a GPU" in _run(code).stderr
