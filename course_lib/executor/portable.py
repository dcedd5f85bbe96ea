"""What may cross the border to another process, and in which form.

Functions and classes cross by name: the other side imports them. So what is defined in a script or a notebook cannot,
and is refused here, with a sentence, before it can fail over there. Errors cross with their traceback as text.

vLLM: `vllm/v1/serial_utils.py`, which can send functions by value (cloudpickle) if told that this is safe.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import traceback
from types import FunctionType, SimpleNamespace
from typing import Any

from course_lib.config import EngineConfig
from course_lib.errors import EngineDeadError


def plain_config(config: EngineConfig) -> EngineConfig:
    """`config` with the model's settings as plain attributes: a worker that reads them need not load transformers,
    which would take it two seconds of its start."""
    model = dataclasses.replace(config.model, hf_config=_plain(config.model.hf_config))
    return dataclasses.replace(config, model=model)


def _plain(settings: Any) -> SimpleNamespace:
    names = {name for name in vars(settings) if not name.startswith("_")}
    names |= {"model_type", "attribute_map", *getattr(settings, "attribute_map", {})}  # what the class adds
    values = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    nested = {name: _plain(value) for name, value in values.items() if hasattr(value, "to_dict")}
    return SimpleNamespace(**{**values, **nested})


def pack(value: Any, what: str) -> bytes:
    """Pickle something that a person has handed in; `what` names it.

    Raises ValueError if the other side could not unpickle it.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{what}: other processes can only be sent what they can import ({error}): put functions and classes "
            f"into a module of their own, a .py file that is imported"
        ) from error
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    """Also notices what belongs to the main module, which is another one over there."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, (type, FunctionType)) and value.__module__ == "__main__":
            raise pickle.PicklingError(f"{value.__qualname__} belongs to the script or notebook itself")
        return NotImplemented


@dataclasses.dataclass(slots=True)
class Failure:
    """An exception on its way to another process."""

    method: str  # of the worker, that has failed
    summary: str  # "ValueError: what it says"
    traceback: str
    pickled: bytes | None  # None if it cannot be

    @classmethod
    def of(cls, error: BaseException, method: str) -> Failure:
        lines = traceback.format_exception(error)
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)  # where one fails whose constructor takes something else than its `args`
        except Exception:
            pickled = None
        return cls(method, f"{type(error).__name__}: {error}", "".join(lines), pickled)

    def error(self, where: str) -> Exception:
        """The exception itself, if it could travel, with a note of where it was raised."""
        error = pickle.loads(self.pickled) if self.pickled else EngineDeadError(self.summary)
        if not isinstance(error, Exception):  # SystemExit, say: it must not end this process, too
            error = EngineDeadError(self.summary)
        error.add_note(f"raised by {where}:\n{self.traceback}")
        return error
