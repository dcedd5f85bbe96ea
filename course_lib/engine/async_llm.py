"""The asynchronous engine: many coroutines, one core.

The core steps in a thread of its own; everything that touches text (tokenizing, detokenizing, stop
strings) runs in the event loop, as does the delivery to the coroutines. Between the two there are
only messages: commands down a queue, each step's news up into the loop.

A stop string is therefore found while the core may already run the next step; the surplus token is
dropped. If the core fails, every waiting coroutine gets the error and the engine refuses new work.

vLLM: `vllm/v1/engine/async_llm.py`, `core_client.py`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable
from functools import partial
from typing import Any

from course_lib.config import EngineConfig
from course_lib.core.kv_events import KVListener
from course_lib.core.messages import EngineCoreOutput
from course_lib.engine.core_client import CoreClient, make_core
from course_lib.engine.frontend import Frontend
from course_lib.engine.tokenizer import load_tokenizer
from course_lib.engine_args import EngineArgs
from course_lib.errors import EngineDeadError
from course_lib.outputs import RequestOutput
from course_lib.prompts import PromptType
from course_lib.sampling_params import RequestOutputKind, SamplingParams


class OutputStream:
    """Outputs of one request on their way to one coroutine.

    A slow reader finds the outputs it missed merged into one: memory does not grow with its delay.
    """

    def __init__(self, delta: bool) -> None:
        self._delta = delta
        self._ready = asyncio.Event()
        self._output: RequestOutput | None = None
        self._error: Exception | None = None

    def put(self, output: RequestOutput) -> None:
        if self._output is None:
            self._output = output
        else:
            self._output.add(output, aggregate=self._delta)
        self._ready.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._ready.set()

    async def get(self) -> RequestOutput:
        await self._ready.wait()
        self._ready.clear()
        output, self._output = self._output, None
        if output is None:
            raise self._error
        if self._error is not None:
            self._ready.set()
        return output


class AsyncLLM:
    """Construct with `from_engine_args`. Belongs to the event loop of its first `generate`."""

    def __init__(self, config: EngineConfig) -> None:
        self._thread: threading.Thread | None = None
        tokenizer = load_tokenizer(config.model)
        if config.parallel.replica is not None and config.parallel.in_lock_step:
            raise ValueError(
                "VLLM_DP_SIZE in the environment: replicas that share experts and are started one by one serve lists "
                "of prompts (LLM); for AsyncLLM start one process with data_parallel_size="
            )
        self._core = make_core(config)
        self.config = self._core.config
        self._frontend = Frontend(self.config, tokenizer)
        self._streams: dict[str, OutputStream] = {}
        self._answers: set[asyncio.Future[bool]] = set()
        # What the core's thread is to do next; None tells it to end.
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> AsyncLLM:
        """Resolve the arguments, load the model, allocate the cache."""
        return cls(engine_args.create_engine_config())

    # ---- what callers do ------------------------------------------------------------------------

    async def generate(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams,
        request_id: str,
        lora_request: Any = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield outputs as they come, shaped by `sampling_params.output_kind`; the last is finished.

        Leaving the loop early, or cancelling the task, aborts the request.

        Raises:
            TypeError, ValueError: something is wrong with the request; others are not affected.
            EngineDeadError: the engine has failed or was shut down.
        """
        self._start()
        prepared = self._frontend.prepare(
            request_id, prompt, sampling_params, lora_request=lora_request, priority=priority
        )
        requests = self._frontend.register(prepared)
        stream = OutputStream(sampling_params.output_kind is RequestOutputKind.DELTA)
        self._streams[request_id] = stream
        for request in requests:
            self._command(partial(self._core.add_request, request))
        try:
            while True:
                output = await stream.get()
                if output.finished:
                    del self._streams[request_id]
                yield output
                if output.finished:
                    return
        finally:
            if self._streams.get(request_id) is stream:
                await self.abort(request_id)
                self._streams.pop(request_id, None)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests; their generators yield a last output with finish reason "abort"."""
        outputs = self._frontend.output_processor
        for one in [request_id] if isinstance(request_id, str) else list(request_id):
            core_ids = outputs.core_ids(one)
            last = outputs.abort(one)
            if core_ids:
                self._command(partial(self._core.abort_requests, core_ids))
            if last is not None and one in self._streams:
                self._streams[one].put(last)

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False (and nothing done) while requests are running."""
        self._start()
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)
        loop, core = self._loop, self._core

        def reset() -> None:
            done = core.reset_prefix_cache()
            loop.call_soon_threadsafe(lambda: answer.done() or answer.set_result(done))

        self._command(reset)
        return await answer

    def subscribe_kv_events(self, listener: KVListener) -> None:
        """Have `listener(events)` called, in the core's thread, after each step that changed the prefix cache.

        Raises:
            ValueError: prefix caching is off.
            RuntimeError: the engine has begun to serve; the events of its first steps are gone.
        """
        if self._thread is not None:
            raise RuntimeError("this AsyncLLM serves already: subscribe to its KV events before the first request")
        self._core.subscribe_kv_events(listener)

    async def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        return self._frontend.get_tokenizer()

    async def get_model_config(self) -> Any:
        return self.config.model

    async def check_health(self) -> None:
        """Raise EngineDeadError if the engine can no longer serve."""
        if self._error is not None:
            raise self._dead()
        self._core.check_health()

    @property
    def is_running(self) -> bool:
        return self._error is None

    @property
    def errored(self) -> bool:
        return self._error is not None

    def shutdown(self) -> None:
        """Stop the core's thread and its processes; unfinished requests get an EngineDeadError. Idempotent."""
        if self._error is None:
            self._error = RuntimeError("the engine was shut down")
        self._command(None)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._core.shutdown()
        self._fail_streams()

    # ---- in the event loop ----------------------------------------------------------------------

    def _start(self) -> None:
        """Start the core's thread on first use. Raises EngineDeadError, or RuntimeError in a foreign loop."""
        if self._error is not None:
            raise self._dead()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._thread = threading.Thread(
                target=_run_core,
                args=(self._core, self._commands, loop, weakref.ref(self)),
                name="engine-core",
                daemon=True,
            )
            self._thread.start()
        elif loop is not self._loop:
            raise RuntimeError("this AsyncLLM belongs to another event loop: make one engine per loop")

    def _command(self, command: Callable[[], None] | None) -> None:
        self._commands.put(command)
        self._core.wake()  # it may be waiting for replicas that have nothing to say

    def _deliver(self, news: list[EngineCoreOutput]) -> None:
        try:
            processed = self._frontend.output_processor.process(news)
        except Exception as error:  # nobody would wake the waiting coroutines otherwise
            self._die(error)
            self._command(None)
            return
        if processed.requests_to_abort:
            self._command(partial(self._core.abort_requests, processed.requests_to_abort))
        for output in processed.request_outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put(output)

    def _dead(self) -> EngineDeadError:
        error = EngineDeadError(f"the engine has stopped: {self._error}")
        error.__cause__ = self._error
        return error

    def _die(self, error: BaseException) -> None:
        self._error = self._error or error
        self._fail_streams()

    def _fail_streams(self) -> None:
        self._frontend.forget_all()
        for stream in self._streams.values():
            stream.fail(self._dead())
        for answer in list(self._answers):
            if not answer.done():
                answer.set_exception(self._dead())

    def __del__(self) -> None:
        if self._thread is not None:  # an engine that was not shut down ends its thread when it is forgotten
            self._command(None)


# ---- in the core's thread, which must not keep the AsyncLLM alive -----------------------------------


def _run_core(
    core: CoreClient,
    commands: queue.SimpleQueue[Callable[[], None] | None],
    loop: asyncio.AbstractEventLoop,
    owner: weakref.ref[AsyncLLM],
) -> None:
    """Step until told to end; each step's news, and the error that ends it, go to `owner` in its loop."""

    def post(call: Callable[[AsyncLLM], None]) -> None:
        def run() -> None:
            engine = owner()
            if engine is not None:
                call(engine)

        loop.call_soon_threadsafe(run)

    try:
        while _take_commands(core, commands):
            news = core.step()
            if news:
                post(lambda engine, news=news: engine._deliver(news))
    except BaseException as error:
        try:
            post(lambda engine, error=error: engine._die(error))
        except RuntimeError:  # the loop is closed: nobody is left to hear
            engine = owner()
            if engine is not None:
                engine._error = error


def _take_commands(core: CoreClient, commands: queue.SimpleQueue[Callable[[], None] | None]) -> bool:
    """Carry out all waiting commands; sleep while there is nothing at all to do. False: end."""
    while not (core.has_work and commands.empty()):
        command = commands.get()
        if command is None:
            return False
        command()
    return True
