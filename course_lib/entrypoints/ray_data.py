"""Batch inference over a data set: Ray Data brings the rows, engines in Ray actors answer them.

Owns the contract of `ray.data.llm`, whose own engine stage needs the vllm package, for this engine:
a script changes its import and nothing else.

    from course_lib.entrypoints.ray_data import build_llm_processor, vLLMEngineProcessorConfig

Invariant: one row in, one row out. A processor only adds steps to a data set's plan; nothing runs
until the data set is consumed (`take`, `write_parquet`, …), and each consumption runs everything
again. Ray's processor spreads a row's template, tokens and text over actors of their own; here one
actor does all of it (`ray_stage.py`), so that two CPUs are enough. Ray is imported on first use.

Ray: `python/ray/llm/_internal/batch/processor`; vLLM: `examples/offline_inference/batch_llm_inference.py`.
"""

from __future__ import annotations

import inspect
import os
import pickle
import reprlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from course_lib.engine_args import EngineArgs
from course_lib.entrypoints.ray_config import EngineProcessorConfig, vLLMEngineProcessorConfig
from course_lib.entrypoints.ray_stage import ERROR_COLUMN, ROW_COLUMN, EngineStage

if TYPE_CHECKING:
    from ray.data import Dataset

RowFunction = Callable[[dict[str, Any]], dict[str, Any]]


class Processor:
    """Data set in, data set out: preprocess, engine, postprocess. Made by `build_llm_processor`."""

    def __init__(
        self, config: EngineProcessorConfig, preprocess: RowFunction | None, postprocess: RowFunction | None
    ) -> None:
        self.config = config
        self.preprocess = _packing(preprocess)
        self.postprocess = _unpacking(postprocess, config.should_continue_on_error)

    def __call__(self, dataset: Dataset) -> Dataset:
        """Add the steps to the data set's plan. Nothing runs yet.

        Raises:
            TypeError: not a Ray data set.
            ValueError: Ray has too few CPUs or GPUs for the engines, which would wait for ever.
        """
        import ray
        from ray.data import ActorPoolStrategy, Dataset

        if not isinstance(dataset, Dataset):
            raise TypeError(f"a processor takes a ray.data.Dataset, not {type(dataset).__name__}")
        config = self.config
        least, most = config.concurrency
        available = ray.cluster_resources()
        on_gpu = available.get("GPU", 0) >= 1 and config.engine_kwargs.get("device", "auto") != "cpu"
        for kind, needed in {"CPU": least + 1, "GPU": least if on_gpu else 0}.items():
            if available.get(kind, 0) < needed:
                raise ValueError(
                    f"concurrency={least} needs {needed} {kind}s (one per engine, and a CPU for the steps "
                    f"around them), and this Ray has {available.get(kind, 0):g}: lower it, or start Ray with "
                    f"more, as ray.init(num_{kind.lower()}s={needed})"
                )
        threads = os.environ.get("OMP_NUM_THREADS", "")
        return (
            dataset.map(self.preprocess)
            .map_batches(
                EngineStage,
                fn_constructor_kwargs={
                    "model_source": config.model_source,
                    "engine_kwargs": config.engine_kwargs,
                    "template": config.chat_template_stage,
                    "detokenize": config.detokenize_stage,
                    "continue_on_error": config.should_continue_on_error,
                    "num_threads": int(threads) if threads.isdigit() else None,
                    "num_engines": most,
                },
                batch_size=config.batch_size,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    min_size=least,
                    max_size=most,
                    max_concurrent_calls_per_actor=config.max_concurrent_batches,
                ),
                num_cpus=1,
                num_gpus=1 if on_gpu else None,
                runtime_env=config.runtime_env,
            )
            .map(self.postprocess)
        )


def build_llm_processor(
    config: EngineProcessorConfig,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
) -> Processor:
    """A function from data set to data set that has an engine answer every row.

    Args:
        preprocess: row -> the columns to add: `messages` (or `prompt`, see `chat_template_stage`) and
            `sampling_params`, a dict; None: the rows have them.
        postprocess: answered row -> the row to keep. The answered row has the columns of the data set and
            of `preprocess` (except `sampling_params`) and `prompt`, `prompt_token_ids`,
            `num_input_tokens`, `generated_text`, `generated_tokens`, `num_generated_tokens`, `logprobs`,
            `prompt_logprobs`, `metrics`, `request_id`, `batch_uuid`, `time_taken_llm` (seconds), `params`
            and `__inference_error__`; None: keep all.

    Raises:
        TypeError, ValueError: an argument is wrong, or the engine's arguments do not fit the model.
        CourseError: the model cannot be found or read.
    """
    if not isinstance(config, EngineProcessorConfig):
        raise TypeError(f"config must be an EngineProcessorConfig, not {type(config).__name__}")
    for name, function in (("preprocess", preprocess), ("postprocess", postprocess)):
        if function is not None and (not callable(function) or inspect.isclass(function)):
            raise TypeError(f"{name} must be a function from row to row, not {function!r}")
    # Here, where the message is plain, and once, before several engines fetch a model side by side.
    EngineArgs(model=config.model_source, **config.engine_kwargs).create_engine_config()
    return Processor(config, preprocess, postprocess)


# The name in newer versions of Ray.
build_processor = build_llm_processor


# ---- rows on their way through Ray -------------------------------------------------------------------

# Between the steps a row travels pickled, with what to call it in an error, in one column: Arrow would
# give all rows' `sampling_params` the same keys, filling up with None, and turn lists into arrays.


def _packing(function: RowFunction | None) -> RowFunction:
    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        label = f"row {reprlib.repr(row)}"
        answer = {} if function is None else _call("preprocess", function, dict(row), label)
        return {ROW_COLUMN: pickle.dumps((label, {**row, **answer}))}

    return preprocess


def _unpacking(function: RowFunction | None, with_errors: bool) -> RowFunction:
    def postprocess(row: dict[str, Any]) -> dict[str, Any]:
        label, answered = pickle.loads(row[ROW_COLUMN])
        if function is None or answered[ERROR_COLUMN]:
            return answered
        kept = _call("postprocess", function, answered, label)
        return {**kept, ERROR_COLUMN: ""} if with_errors else kept

    return postprocess


def _call(name: str, function: RowFunction, row: dict[str, Any], label: str) -> dict[str, Any]:
    """The user's function on a row; what goes wrong in it is raised with the row's name."""
    try:
        result = function(row)
    except Exception as error:
        error.add_note(f"in {name}, {label}")
        raise
    if not isinstance(result, dict):
        raise TypeError(f"{name} must return a dict, not {result!r:.80} ({label})")
    return result


