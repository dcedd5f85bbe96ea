"""`generate` and `chat` on the command line: one answer, or a conversation, streamed as it comes.

The answer goes to standard output and nothing else does, so it can be piped; everything about the
run goes to standard error.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from course_lib.engine.llm_engine import LLMEngine
    from course_lib.prompts import PromptType

_CHAT_HELP = "/reset forgets the conversation, /quit leaves (so does Ctrl-D); Ctrl-C stops an answer."


def _add_common_arguments(parser: argparse.ArgumentParser, *, max_tokens: int, temperature: float) -> None:
    parser.add_argument("--model", default=None, help="a folder or model id (default: the course model)")
    parser.add_argument(
        "--max-tokens", type=int, default=max_tokens, help=f"longest answer, in tokens (default {max_tokens})"
    )
    parser.add_argument(
        "--temperature", type=float, default=temperature, help=f"0 takes the likeliest token (default {temperature})"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this mass (default 1)")
    parser.add_argument("--top-k", type=int, default=0, help="keep this many likeliest tokens (default 0: all)")
    parser.add_argument("--seed", type=int, default=None, help="makes a random answer repeatable")
    parser.add_argument("--system", default=None, help="system message that opens the conversation")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (default: what suits the device)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--max-model-len", type=int, default=None, help="longest prompt plus answer, in tokens")


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `generate`."""
    parser.add_argument("prompt", help='the text to complete; "-" reads it from standard input')
    parser.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    _add_common_arguments(parser, max_tokens=128, temperature=0.0)


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `chat`."""
    _add_common_arguments(parser, max_tokens=512, temperature=0.2)


def run_generate(args: argparse.Namespace) -> int:
    """Answer once. Returns the exit status."""
    started = time.monotonic()
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    try:
        engine, params = _start(args)
        prompt: PromptType = text
        if args.chat or args.system is not None:
            prompt = _render(engine, _opening(args) + [{"role": "user", "content": text}])
        ready = time.monotonic()
        answer = _Answer(engine, prompt, params)
        for piece in answer:
            print(piece, end="", flush=True)
    except (TypeError, ValueError) as error:
        print(f"course_lib: {error}", file=sys.stderr)
        return 2
    print()
    print(f"[{answer.summary()}, start-up {ready - started:.1f} s]", file=sys.stderr)
    return 0


def run_chat(args: argparse.Namespace) -> int:
    """Converse until the user leaves. Returns the exit status."""
    try:
        import readline  # noqa: F401  (line editing and history for input())
    except ImportError:
        pass
    try:
        engine, params = _start(args)
    except (TypeError, ValueError) as error:
        print(f"course_lib: {error}", file=sys.stderr)
        return 2
    print(f"{engine.config.model.model} on {engine.config.device}. {_CHAT_HELP}", file=sys.stderr)
    conversation = _opening(args)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return 0
        if line in ("/quit", "/exit"):
            return 0
        if line == "/reset":
            conversation = _opening(args)
        elif line.startswith("/"):
            print(_CHAT_HELP, file=sys.stderr)
        elif line:
            _take_turn(engine, params, conversation, line)


def _take_turn(engine: LLMEngine, params: Any, conversation: list[dict[str, str]], line: str) -> None:
    """Ask, print the answer as it comes, and remember both; Ctrl-C keeps what was said so far."""
    turn = [*conversation, {"role": "user", "content": line}]
    said: list[str] = []
    try:
        answer = _Answer(engine, _render(engine, turn), params)
        for piece in answer:
            said.append(piece)
            print(piece, end="", flush=True)
        print()
        print(f"[{answer.summary()}]", file=sys.stderr)
    except KeyboardInterrupt:
        print("\n[stopped]", file=sys.stderr)
    except ValueError as error:
        print(f"course_lib: {error} (in `chat`, /reset starts over)", file=sys.stderr)
        return
    conversation[:] = [*turn, {"role": "assistant", "content": "".join(said)}]


def _start(args: argparse.Namespace) -> tuple[LLMEngine, Any]:
    """The engine and the sampling parameters that the arguments describe."""
    from course_lib import EngineArgs, RequestOutputKind, SamplingParams

    # Parameters first: a wrong one should not cost the seconds of loading a model.
    params = SamplingParams(
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed,
        max_tokens=args.max_tokens, output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    from course_lib import LLMEngine

    named = {} if args.model is None else {"model": args.model}
    engine_args = EngineArgs(
        **named, dtype=args.dtype, device=args.device, max_model_len=args.max_model_len, disable_log_stats=True
    )
    return LLMEngine.from_engine_args(engine_args), params


def _opening(args: argparse.Namespace) -> list[dict[str, str]]:
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def _render(engine: LLMEngine, conversation: list[dict[str, str]]) -> PromptType:
    from course_lib.entrypoints.chat import render_chat

    return render_chat(engine.get_tokenizer(), conversation)


class _Answer:
    """One streamed answer, and what it cost."""

    def __init__(self, engine: LLMEngine, prompt: PromptType, params: Any) -> None:
        self.engine = engine
        self.asked = time.monotonic()
        self.first = self.last = self.asked
        self.num_tokens = 0
        engine.add_request("answer", prompt, params)

    def __iter__(self) -> Iterator[str]:
        try:
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    self.last = time.monotonic()
                    if self.num_tokens == 0:
                        self.first = self.last
                    self.num_tokens += len(output.outputs[0].token_ids)
                    yield output.outputs[0].text
        finally:
            self.engine.abort_request("answer")  # nothing to do unless we were interrupted

    def summary(self) -> str:
        """Tokens, time to first token, tokens/s between the first and the last."""
        rate = ""
        if self.num_tokens > 1:
            rate = f", {(self.num_tokens - 1) / (self.last - self.first):.1f} tokens/s"
        return f"{self.num_tokens} tokens, time to first token {self.first - self.asked:.2f} s{rate}"
