"""What may cross to another process, and how refusals read."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import MixtralConfig

from course_lib import EngineArgs
from course_lib.errors import EngineDeadError
from course_lib.executor.portable import Failure, _plain, pack, plain_config
from tests.executor import sabotage


def test_plain_settings_read_like_the_real_ones(wide_model_path: Path) -> None:
    config = EngineArgs(model=str(wide_model_path), device="cpu").create_engine_config()
    plain = plain_config(config)
    assert plain.scheduler == config.scheduler and plain.model.path == config.model.path
    real, copy = config.model.hf_config, pickle.loads(pickle.dumps(plain)).model.hf_config
    assert type(copy).__module__ == "types"
    for name in ("architectures", "num_key_value_heads", "rope_parameters", "rms_norm_eps", "model_type", "dtype"):
        assert getattr(copy, name) == getattr(real, name)
    assert not hasattr(copy, "no_such_setting")
    assert plain.model.num_kv_heads == config.model.num_kv_heads == 2
    experts = _plain(MixtralConfig(num_local_experts=4))
    assert experts.num_experts == experts.num_local_experts == 4  # one of them is a synonym that the class knows


def test_what_cannot_be_imported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    value = (sabotage.pid, (1, {"x": [2]}), {})
    assert pickle.loads(pack(value, "this")) == value

    def local() -> None: ...

    class Notebook:
        pass

    Notebook.__module__, Notebook.__qualname__ = "__main__", "Notebook"
    monkeypatch.setattr(sys.modules["__main__"], "Notebook", Notebook, raising=False)
    for bad in (local, lambda: 0, Notebook, [Notebook()], sys):
        with pytest.raises(ValueError, match=r"collective_rpc: other processes .* a \.py file"):
            pack(bad, "collective_rpc")


class _Odd(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def _failure(error: BaseException) -> Failure:
    try:
        raise error
    except BaseException as raised:
        return pickle.loads(pickle.dumps(Failure.of(raised, "execute_model")))


@pytest.mark.parametrize(
    ("raised", "arrives", "says"),
    [
        (ValueError("too big"), ValueError, "too big"),
        (_Odd(1, 2), EngineDeadError, "_Odd: 1 and 2"),  # cannot be unpickled
        (SystemExit(3), EngineDeadError, "SystemExit: 3"),  # would end this process
        (OSError(ModuleType("unpicklable")), EngineDeadError, "OSError"),
    ],
)
def test_errors_arrive_with_their_traceback(raised: BaseException, arrives: type, says: str) -> None:
    failure = _failure(raised)
    error: Any = failure.error("worker rank 1")
    assert type(error) is arrives and says in str(error)
    assert error.__notes__[0].startswith("raised by worker rank 1:\nTraceback") and "_failure" in error.__notes__[0]
