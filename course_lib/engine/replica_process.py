"""One replica: an engine core that steps by itself, and a loop around it that obeys a front.

The loop takes messages between steps, never during one. It does not wait for the front: what a step produces is
sent, and the next step begins. A step that raises leaves the core empty and usable, and the error goes to the front,
as it would go to the caller of a core in this process; when the core's own workers are dead, the replica ends.

Replicas that share experts step together: see `coordinator` for when, and `joint_passes` for what a pass is. There
any error is the end, as the others wait in the middle of a layer.

vLLM: `EngineCoreProc.run_engine_core`, `DPEngineCoreProc` in `vllm/v1/engine/core.py`.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import time
from collections.abc import Callable
from typing import Any

from course_lib.config import EngineConfig
from course_lib.core.messages import EngineCoreOutput
from course_lib.engine.coordinator import WaveMember
from course_lib.engine.core import EngineCore
from course_lib.engine.joint_passes import Agreement, run_one_pass
from course_lib.engine.replica_messages import (
    AbortRequests,
    AddRequest,
    Alone,
    Answer,
    Call,
    Failed,
    News,
    Ready,
    Reset,
    StartWave,
    WaveComplete,
)
from course_lib.engine.stat_logger import StepStats
from course_lib.errors import EngineDeadError
from course_lib.executor.portable import Failure
from course_lib.executor.worker_process import NamedLines
from course_lib.parallel.child_process import Inbox, listen_to_parent

Send = Callable[[bytes], None]
_SAY_SOMETHING_S = 1.0  # a replica at work is not silent for longer, except for the length of one step


def run_replica(inbox: Inbox, send: Send) -> None:
    """Build the core from the first message, an `EngineConfig`; then serve until the inbox yields None."""

    def tell(message: object) -> None:
        send(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    first = inbox.get()
    if first is None:
        return
    config: EngineConfig = pickle.loads(first)
    try:
        agreement = Agreement(config.parallel) if config.parallel.in_lock_step else None
        core = EngineCore(config)
    except Exception as error:
        tell(Failed(Failure.of(error, "start"), fatal=True))
        return
    tell(Ready(core.config.scheduler.max_model_len))
    try:
        _Replica(core, inbox, tell, agreement).run()
    finally:
        core.shutdown()
        if agreement is not None:
            agreement.close()


class _Replica:
    def __init__(
        self, core: EngineCore, inbox: Inbox, tell: Callable[[object], None], agreement: Agreement | None
    ) -> None:
        self.core = core
        self.inbox = inbox
        self.tell = tell
        self.agreement = agreement
        self.member = WaveMember()  # used in lock step only
        self._last_report = 0.0
        self._carry_out: dict[type, Callable[[Any], None]] = {
            AddRequest: self._add,
            AbortRequests: lambda message: core.abort_requests(message.request_ids),
            Reset: lambda message: core.reset(),
            Call: self._call,
            StartWave: lambda message: self.member.on_start(message.wave),
        }

    def run(self) -> None:
        """Until the front says so or is gone, or this replica cannot go on."""
        step = self._step if self.agreement is None else self._step_with_all
        try:
            while self._take_messages():
                step()
        except EngineDeadError as error:
            self.tell(Failed(Failure.of(error, "step"), fatal=True))

    def _take_messages(self) -> bool:
        """Carry out all waiting messages; sleep while there is nothing to do. False: end."""
        while not (self._is_busy and self.inbox.empty()):
            message = self.inbox.get()
            if message is None:
                return False
            message = pickle.loads(message)
            self._carry_out[type(message)](message)
        return True

    @property
    def _is_busy(self) -> bool:
        return self.core.has_work if self.agreement is None else self.member.running

    # ---- messages -------------------------------------------------------------------------------

    def _add(self, message: AddRequest) -> None:
        try:
            self.core.add_request(pickle.loads(message.request))
        except Exception as error:  # it carries a function whose module cannot be imported here
            output = EngineCoreOutput(message.request_id, [], "abort", f"{type(error).__name__}: {error}")
            self.tell(News([output], None))
            return
        if self.agreement is not None and self.member.on_request(message.wave):
            self.tell(Alone(self.member.wave))

    def _call(self, message: Call) -> None:
        try:
            args = pickle.loads(message.args)
            answer = Answer(message.number, getattr(self.core, message.method)(*args))
            pickle.dumps(answer)
        except Exception as error:
            answer = Answer(message.number, Failure.of(error, message.method))
        self.tell(answer)

    # ---- steps ----------------------------------------------------------------------------------

    def _step(self) -> None:
        try:
            news = self.core.step()
        except EngineDeadError:
            raise
        except Exception as error:
            self.core.executor.check_health()  # raises EngineDeadError: there is nothing to go on with
            self.tell(Failed(Failure.of(error, "step"), fatal=False))
            return
        self._report(news)

    def _step_with_all(self) -> None:
        member, core = self.member, self.core
        try:
            self._report(run_one_pass(core, core.step))
            if member.after_pass() and member.agreed(self.agreement.anybody(core.has_work)):
                if core.config.parallel.replica.rank == 0:
                    self.tell(WaveComplete(member.wave - 1))
        except Exception as error:
            raise EngineDeadError(f"a step in lock step has failed: {error}") from error

    def _report(self, news: list[EngineCoreOutput]) -> None:
        stats, now = StepStats.of(self.core) if self.core.config.log_stats else None, time.monotonic()
        if news or stats is not None or now - self._last_report > _SAY_SOMETHING_S:
            self.tell(News(news, stats))
            self._last_report = now


def main(name: str, descriptor: str) -> None:
    """The program of a replica's process."""
    inbox, connection = listen_to_parent(descriptor)
    sys.stdout = sys.stderr = io.TextIOWrapper(NamedLines(name), "utf-8", "replace", write_through=True)
    try:
        run_replica(inbox, connection.send_bytes)
    except OSError:  # the front is gone
        pass
    os._exit(0)  # what libraries do at the end of Python takes long, and sometimes waits for a replica that is gone


if __name__ == "__main__":
    main(*sys.argv[1:])
