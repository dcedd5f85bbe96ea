"""`LLM`: prompts in, completions out, all at once.

vLLM: `vllm/entrypoints/llm.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

from tqdm.auto import tqdm

from course_lib.engine.llm_engine import LLMEngine
from course_lib.engine_args import DEFAULT_MODEL, EngineArgs
from course_lib.entrypoints.chat import render_chat
from course_lib.outputs import RequestOutput
from course_lib.prompts import PromptType
from course_lib.sampling_params import RequestOutputKind, SamplingParams


class LLM:
    """An engine for offline use. Keyword arguments are those of `EngineArgs`, which are vLLM's.

    Example:
        llm = LLM()
        print(llm.generate("The capital of France is")[0].outputs[0].text)

    Raises:
        TypeError, ValueError: an argument is unknown, wrong or not supported.
        CourseError: the model cannot be found or read.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **kwargs: Any) -> None:
        kwargs.setdefault("disable_log_stats", True)
        self.llm_engine = LLMEngine.from_engine_args(EngineArgs.from_kwargs(model=model, **kwargs))
        self._request_counter = 0

    # ---- generation -----------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., tqdm] = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt.

        Args:
            prompts: one prompt or several; text, token ids, or prompt dicts.
            sampling_params: one for all, or one per prompt; None: the model's defaults.
            use_tqdm: show a progress bar; or a function that makes one.
            priority: one per prompt; smaller is served first (policy "priority").

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            TypeError, ValueError: something is wrong with a prompt or a parameter. Nothing has run.
        """
        items = _as_list(prompts)
        params = self._params_per_prompt(sampling_params, len(items))
        if priority is not None and len(priority) != len(items):
            raise ValueError(f"priority has {len(priority)} entries for {len(items)} prompts: give one each")
        prepared = []
        for index, (prompt, one) in enumerate(zip(items, params, strict=True)):
            try:
                prepared.append(
                    self.llm_engine.frontend.prepare(
                        str(self._request_counter + index), prompt, _final_only(one),
                        lora_request=lora_request, priority=0 if priority is None else priority[index],
                    )  # fmt: skip
                )
            except (TypeError, ValueError) as error:
                where = f"prompt {index}: " if len(items) > 1 else ""
                raise type(error)(f"{where}{error}") from error
        self._request_counter += len(items)
        try:
            for request in prepared:
                self.llm_engine.enqueue(request)
            return self._run_engine([request.request_id for request in prepared], use_tqdm)
        except BaseException:
            # Ctrl-C between two steps: leave nothing behind that the next call would wait for.
            self.llm_engine.abort_request(request.request_id for request in prepared)
            raise

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., tqdm] = True,
        lora_request: Any = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of conversations.

        Args:
            messages: [{"role": …, "content": …}, …], or a list of such lists.
            chat_template: a Jinja template instead of the model's own.
            add_generation_prompt: end with the header of the assistant's turn.
            continue_final_message: the last message is the start of the answer.
            tools: function descriptions handed to the template.

        Raises:
            TypeError, ValueError: something is wrong with a message or a parameter. Nothing has run.
        """
        if mm_processor_kwargs is not None:
            raise ValueError("mm_processor_kwargs: messages are text only; leave it out")
        if not isinstance(messages, (list, tuple)) or not messages:
            raise TypeError("messages must be a non-empty list of messages, or a list of such lists")
        conversations = messages if isinstance(messages[0], (list, tuple)) else [messages]
        prompts = [
            render_chat(
                self.get_tokenizer(), conversation, chat_template=chat_template,
                content_format=chat_template_content_format, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, tools=tools, template_kwargs=chat_template_kwargs,
            )  # fmt: skip
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """Not yet: comes with the embedding lessons."""
        raise ValueError("LLM.embed: this engine runs generation models only so far; use generate or chat")

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Not yet: comes with the embedding lessons."""
        raise ValueError("LLM.encode: this engine runs generation models only so far; use generate or chat")

    def classify(self, *args: Any, **kwargs: Any) -> Any:
        """Not yet: comes with the embedding lessons."""
        raise ValueError("LLM.classify: this engine runs generation models only so far; use generate or chat")

    def score(self, *args: Any, **kwargs: Any) -> Any:
        """Not yet: comes with the embedding lessons."""
        raise ValueError("LLM.score: this engine runs generation models only so far; use generate or chat")

    # ---- the rest of vLLM's surface -------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given no parameters; yours to change."""
        return self.llm_engine.frontend.get_default_sampling_params()

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False (and nothing done) while requests are running."""
        return self.llm_engine.reset_prefix_cache()

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a method of every model runner (or a function that is given the runner); results by replica and rank.

        Raises ValueError if a function or an argument cannot be sent to the process where a runner lives.
        """
        if timeout is not None:
            raise ValueError("timeout: a call of a runner cannot be cut short; leave it out")
        return self.llm_engine.core.collective_rpc(method, args, kwargs)

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """Run `func(model)` where the model lives; one result for each rank's part of it."""
        return self.collective_rpc(_apply_to_model, args=(func,))

    def sleep(self, *args: Any, **kwargs: Any) -> None:
        """Not yet: comes with the RLHF lessons."""
        raise ValueError("LLM.sleep: weights and cache cannot be put aside yet; delete the LLM instead")

    def wake_up(self, *args: Any, **kwargs: Any) -> None:
        """Not yet: comes with the RLHF lessons."""
        raise ValueError("LLM.wake_up: this engine never sleeps yet; there is nothing to wake")

    def start_profile(self) -> None:
        """Not yet: comes with the profiling lessons."""
        raise ValueError("LLM.start_profile: not available yet; wrap the call in torch.profiler.profile")

    def stop_profile(self) -> None:
        """Not yet: comes with the profiling lessons."""
        raise ValueError("LLM.stop_profile: not available yet; wrap the call in torch.profiler.profile")

    def get_metrics(self) -> Any:
        """Not yet: comes with the metrics lesson."""
        raise ValueError("LLM.get_metrics: not available yet; each RequestOutput has its own .metrics")

    # ---- how it runs ----------------------------------------------------------------------------

    def _params_per_prompt(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, (list, tuple)):
            raise TypeError(f"sampling_params must be a SamplingParams or a list of them, not {params!r}")
        if len(params) != count:
            raise ValueError(
                f"sampling_params has {len(params)} entries for {count} prompts: give one for all, or one each"
            )
        return list(params)

    def _run_engine(self, request_ids: list[str], use_tqdm: bool | Callable[..., tqdm]) -> list[RequestOutput]:
        """Step until nothing is unfinished; outputs in order of submission, since short requests end first."""
        engine = self.llm_engine
        bar = None
        if use_tqdm:
            make_bar = use_tqdm if callable(use_tqdm) else tqdm
            bar = make_bar(
                total=len(request_ids), desc="Processed prompts", dynamic_ncols=True,
                postfix="est. speed input: 0.00 toks/s, output: 0.00 toks/s",
            )  # fmt: skip
        finished: dict[str, RequestOutput] = {}
        prompt_tokens = output_tokens = 0
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if not output.finished:
                        continue
                    finished[output.request_id] = output
                    if bar is not None:
                        prompt_tokens += len(output.prompt_token_ids) * len(output.outputs)
                        output_tokens += sum(len(one.token_ids) for one in output.outputs)
                        elapsed = max(bar.format_dict["elapsed"], 1e-9)
                        bar.postfix = (
                            f"est. speed input: {prompt_tokens / elapsed:.2f} toks/s, "
                            f"output: {output_tokens / elapsed:.2f} toks/s"
                        )
                        bar.update(1)
        finally:
            if bar is not None:
                bar.close()
        return [finished[request_id] for request_id in request_ids]


def _apply_to_model(runner: Any, func: Callable[[Any], Any]) -> Any:
    return func(runner.model)


def _as_list(prompts: PromptType | Sequence[PromptType]) -> list[PromptType]:
    """One prompt or several -> several. A flat list of integers is one prompt of token ids."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(f"prompts must be a prompt or a list of prompts, not {type(prompts).__name__}")
    if prompts and isinstance(prompts[0], Integral):
        return [list(prompts)]
    return list(prompts)


def _final_only(params: SamplingParams) -> SamplingParams:
    """Offline callers see finished outputs only, so intermediate ones are not even built."""
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params must be a SamplingParams or a list of them, not {params!r}")
    params = params.clone()
    params.output_kind = RequestOutputKind.FINAL_ONLY
    return params
