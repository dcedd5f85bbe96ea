"""What is installed, as JSON on standard output; run by `doctor` in the environment's interpreter.

Runs as a script in another process, so a broken PyTorch cannot take the doctor down with it.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "numpy",
    "jupyterlab",
    "ipywidgets",
    "jupytext",
    "pytest",
    "hypothesis",
    "nbval",
    "matplotlib",
)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `kernels`
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": {},
        "import_errors": {},
        "cuda_devices": [],
    }
    for name in PACKAGES:
        try:
            facts["versions"][name] = version(name)
        except PackageNotFoundError:
            facts["versions"][name] = None
    for name in ("torch", "triton", "transformers"):
        if facts["versions"][name] is None:
            continue
        try:
            module = import_module(name)
        except Exception as error:  # whatever a broken binary raises is the finding
            facts["import_errors"][name] = f"{type(error).__name__}: {error}"
            continue
        if name == "torch":
            facts["threads"] = module.get_num_threads()
            facts["cpu_capability"] = module.backends.cpu.get_cpu_capability()
            facts["cuda_build"] = module.version.cuda
            build = import_module("kernels.cpu.build")
            facts["cpu_kernels"] = str(build.library_path()) if build.library_path().exists() else None
            for index in range(module.cuda.device_count()):
                device = module.cuda.get_device_properties(index)
                facts["cuda_devices"].append(f"{device.name}, {device.total_memory / 1e9:.0f} GB")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
