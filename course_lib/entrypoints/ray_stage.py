"""The engine inside a Ray actor: pickled rows in, pickled answered rows out.

Owns one `AsyncLLM` and what turns a row into a request and its output into columns, which are those of
Ray's vLLM stage. Invariant: rows keep their order within a batch, and a batch's rows join whatever the
engine is running, so that batches overlap. Runs in the actor's process; imports nothing of Ray.

Ray: `python/ray/llm/_internal/batch/stages/vllm_engine_stage.py`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import time
import uuid
from typing import TYPE_CHECKING, Any

from course_lib.bootstrap.process import usable_cores
from course_lib.engine_args import EngineArgs
from course_lib.entrypoints.chat import render_chat
from course_lib.errors import CourseError, EngineDeadError
from course_lib.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    import pyarrow

    from course_lib.engine.async_llm import AsyncLLM
    from course_lib.outputs import RequestOutput
    from course_lib.prompts import PromptType

ROW_COLUMN = "__row"
ERROR_COLUMN = "__inference_error__"
_PROMPT_IN_ERROR = 500  # characters
_LATER_COLUMNS = ("multimodal_data", "mm_processor_kwargs", "multimodal_uuids", "tokenization_kwargs")


class EngineStage:
    """One engine, called with one batch after the other, or several at once.

    Args:
        template: "enabled", and optionally "chat_template" and "chat_template_kwargs".
        num_threads: of PyTorch; None: this machine's cores, shared among the engines.
        num_engines: engines that may run beside each other.
    """

    def __init__(
        self,
        *,
        model_source: str,
        engine_kwargs: dict[str, Any],
        template: dict[str, Any],
        detokenize: bool,
        continue_on_error: bool,
        num_threads: int | None,
        num_engines: int,
    ) -> None:
        self._engine_args = {"model": model_source, "disable_log_stats": True, **engine_kwargs}
        self._engine: AsyncLLM | None = None
        self._template = template
        self._detokenize = detokenize
        self._continue_on_error = continue_on_error
        self._num_threads = num_threads or max(1, usable_cores() // num_engines)
        self._num_requests = 0

    async def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """Answer a batch: a table with the one column `ROW_COLUMN` of pickled pairs, what to call a row in an
        error and the row.

        Raises:
            ValueError, TypeError, CourseError: the first row that cannot be answered, named; or the engine
                cannot start.
            EngineDeadError: the engine has failed; no row can be answered any more.
        """
        import pyarrow

        if self._engine is None:
            self._engine = self._start()
        batch_uuid = uuid.uuid4().hex
        rows = [pickle.loads(packed) for packed in batch[ROW_COLUMN].to_pylist()]
        answers = await asyncio.gather(*(self._answer(label, row) for label, row in rows))
        packed = [
            pickle.dumps((label, {**answer, "batch_uuid": batch_uuid}))
            for (label, _), answer in zip(rows, answers, strict=True)
        ]
        return pyarrow.table({ROW_COLUMN: pyarrow.array(packed, pyarrow.large_binary())})

    def _start(self) -> AsyncLLM:
        """The engine. Made by the first call and not by the constructor, because Ray reports an actor whose
        constructor fails in several screens and one whose call fails in one."""
        import torch

        from course_lib.engine.async_llm import AsyncLLM

        # Ray set OMP_NUM_THREADS to the number of CPUs that the actor asked for: one.
        torch.set_num_threads(self._num_threads)
        return AsyncLLM.from_engine_args(EngineArgs(**self._engine_args))

    async def _answer(self, label: str, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its answer, or with its error if the run is to go on."""
        try:
            return await self._generate(row)
        except EngineDeadError:
            raise
        except (TypeError, ValueError, CourseError) as error:
            if not self._continue_on_error:
                raise type(error)(f"{label}: {error}").with_traceback(error.__traceback__) from None
            return _failed(row, f"{type(error).__name__}: {error}")

    async def _generate(self, row: dict[str, Any]) -> dict[str, Any]:
        self._refuse_columns(row)
        row = dict(row)
        params = _sampling_params(row.pop("sampling_params", None))
        prompt = await self._prompt(row)
        request_id = self._num_requests
        self._num_requests += 1
        start = time.perf_counter()
        async for output in self._engine.generate(prompt, params, str(request_id)):
            pass  # FINAL_ONLY: there is one
        columns = _columns(output)
        if self._detokenize and not params.detokenize:
            tokenizer = await self._engine.get_tokenizer()
            text = tokenizer.decode(columns["generated_tokens"], skip_special_tokens=True)
            columns["generated_text"] = text
        return {
            **row,
            **columns,
            "request_id": request_id,
            "time_taken_llm": time.perf_counter() - start,
            "params": str(params),
            ERROR_COLUMN: "",
        }

    def _refuse_columns(self, row: dict[str, Any]) -> None:
        for name in _LATER_COLUMNS:
            if row.get(name) is not None:
                raise ValueError(f"column {name!r}: prompts are text only; remove the column")
        model = self._engine_args["model"]
        if row.get("model") not in (None, model):
            raise ValueError(
                f"column 'model' asks for {row['model']!r}: this engine runs {model!r} and has no adapters; "
                f"remove or rename the column"
            )

    async def _prompt(self, row: dict[str, Any]) -> PromptType:
        """What the engine is to continue; takes `prompt` and `tokenized_prompt` out of the row."""
        text, token_ids = row.pop("prompt", None), row.pop("tokenized_prompt", None)
        if not self._template["enabled"]:
            if token_ids is not None:
                return {"prompt_token_ids": token_ids}
            if text is None:
                raise ValueError("there is neither 'prompt' (text) nor 'tokenized_prompt' (ids): give one")
            return text
        messages = row.get("messages")
        if messages is None:
            raise ValueError("there are no 'messages': give some, or 'prompt' and chat_template_stage=False")
        messages = messages.tolist() if hasattr(messages, "tolist") else messages
        if not isinstance(messages, (list, tuple)):
            raise TypeError(f"'messages' must be a list of messages, not {messages!r:.80}")
        # A conversation that ends with the assistant's words has them continued.
        last = messages[-1] if messages else None
        prefill = isinstance(last, dict) and last.get("role") == "assistant"
        return render_chat(
            await self._engine.get_tokenizer(), messages, chat_template=self._template.get("chat_template"),
            add_generation_prompt=not prefill, continue_final_message=prefill,
            template_kwargs=self._template.get("chat_template_kwargs"),
        )  # fmt: skip


def _sampling_params(values: Any) -> SamplingParams:
    if not isinstance(values, dict):
        raise TypeError(f"'sampling_params' must be a dict, such as {{'max_tokens': 64}}, not {values!r:.80}")
    params = SamplingParams(**values)
    if params.n != 1:
        raise ValueError(f"sampling_params: n={params.n}: a row holds one answer; repeat the row instead")
    params.output_kind = RequestOutputKind.FINAL_ONLY
    return params


def _columns(output: RequestOutput) -> dict[str, Any]:
    (answer,) = output.outputs
    return {
        "prompt": output.prompt or "",
        "prompt_token_ids": output.prompt_token_ids,
        "num_input_tokens": len(output.prompt_token_ids),
        "generated_tokens": answer.token_ids,
        "generated_text": answer.text,
        "num_generated_tokens": len(answer.token_ids),
        "metrics": None if output.metrics is None else dataclasses.asdict(output.metrics),
        "logprobs": _plain(answer.logprobs),
        "prompt_logprobs": _plain(output.prompt_logprobs),
    }


def _plain(logprobs: list[dict[int, Any] | None] | None) -> list[dict[int, dict[str, Any]] | None] | None:
    """Log-probabilities as plain dicts: that is what a reader without this package can unpickle."""
    if logprobs is None:
        return None
    return [one and {token: dataclasses.asdict(entry) for token, entry in one.items()} for one in logprobs]


def _failed(row: dict[str, Any], error: str) -> dict[str, Any]:
    """The row with the columns of an answered one, and nothing in them but the error."""
    prompt = row.get("prompt")
    return {
        **{name: value for name, value in row.items() if name != "sampling_params"},
        "prompt": prompt[:_PROMPT_IN_ERROR] if isinstance(prompt, str) else "",
        "prompt_token_ids": None,
        "num_input_tokens": 0,
        "generated_tokens": [],
        "generated_text": "",
        "num_generated_tokens": 0,
        "metrics": None,
        "logprobs": None,
        "prompt_logprobs": None,
        "request_id": -1,
        "time_taken_llm": -1.0,
        "params": "",
        ERROR_COLUMN: error,
    }
