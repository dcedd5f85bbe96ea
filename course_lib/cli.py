"""The command line: `python3 -m course_lib COMMAND`.

Owns parsing and dispatch. Invariant: `--help`, of the whole and of every command, works on a bare
Python: a command's module is loaded when the command is chosen, and heavy imports happen inside its
`run`, after the set-up. To add a command, add a line to `COMMANDS`. vLLM: `vllm/entrypoints/cli/main.py`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from course_lib.errors import CourseError

PROGRAM = "python3 -m course_lib"
INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """Where a command lives and what must be ready before it runs."""

    summary: str
    module: str
    function: str  # the module has add_<function>_arguments(parser) and run_<function>(args) -> exit status
    needs: tuple[str, ...] = ("torch", "transformers", "safetensors")  # modules; () = runs without the set-up
    course_model: bool = False  # fetch the course model first
    passes_on: bool = False  # run_<function>(args, extra): unknown arguments are somebody else's
    mine: bool = False  # has --mine: run it with the learner's passed exercises in the engine


COMMANDS = {
    "lab": Command(
        "open the lessons in JupyterLab",
        "course_lib.teaching.commands",
        "lab",
        needs=("torch", "transformers", "gguf", "jupyterlab", "jupytext", "ipywidgets", "matplotlib"),
        course_model=True,
    ),
    "check": Command(
        "check all exercises of a lesson",
        "course_lib.teaching.commands",
        "check",
        needs=("torch", "transformers", "gguf", "ipykernel", "nbval"),
        course_model=True,
    ),
    "progress": Command(
        "show what you have done and what comes next", "course_lib.teaching.commands", "progress", needs=()
    ),
    "test": Command(
        "run the tests",
        "course_lib.bootstrap.testing",
        "test",
        needs=("torch", "transformers", "gguf", "pytest", "hypothesis"),
        course_model=True,
        passes_on=True,
    ),
    "doctor": Command(
        "say what is installed, what is wrong and how to fix it", "course_lib.cli", "doctor", needs=()
    ),
    "generate": Command("complete a prompt", "course_lib.entrypoints.cli_generate", "generate", mine=True),
    "chat": Command(
        "hold a conversation in the terminal", "course_lib.entrypoints.cli_generate", "chat", mine=True
    ),
    "bench": Command("measure speed, against transformers if asked", "course_lib.bench.cli", "bench"),
    "build": Command(
        "make the notebooks from the lessons' sources (for authors)",
        "course_lib.teaching.building.builder",
        "build",
        needs=("torch", "transformers", "gguf", "jupytext", "nbclient", "ipywidgets", "matplotlib"),
        course_model=True,
    ),
}


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    try:
        return _dispatch(list(argv))
    except CourseError as error:
        print(f"course_lib: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncourse_lib: interrupted; the same command carries on from here.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader (`| head`) has gone: nothing is wrong, and nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(import_module("course_lib").__version__)
        return 0
    command = COMMANDS.get(argv[0])
    if command is None:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"the commands are {', '.join(COMMANDS)}."
        print(f"course_lib: there is no command `{argv[0]}`: {hint}", file=sys.stderr)
        return 2
    run, args, extra = _parse(argv, command)
    if command.needs:
        from course_lib.bootstrap.environment import ensure_environment
        from course_lib.bootstrap.process import raise_on_sigterm

        raise_on_sigterm()
        ensure_environment(argv, command.needs)
    if command.course_model:
        from course_lib.model_store import COURSE_MODEL, resolve_model

        resolve_model(COURSE_MODEL)
    if command.mine and args.mine:
        from course_lib.teaching.learner.patching import my_code

        with my_code(file=sys.stderr):
            return run(args)
    return run(args, extra) if command.passes_on else run(args)


def _parse(argv: list[str], command: Command) -> tuple[Callable[..., int], argparse.Namespace, list[str]]:
    module = import_module(command.module)
    description = command.summary[0].upper() + command.summary[1:] + "."
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {argv[0]}", description=description, allow_abbrev=False)
    getattr(module, f"add_{command.function}_arguments")(parser)
    if command.mine:
        parser.add_argument("--mine", action="store_true", help="run your own passed exercises inside the engine")
    args, extra = (
        parser.parse_known_args(argv[1:]) if command.passes_on else (parser.parse_args(argv[1:]), [])
    )
    return getattr(module, f"run_{command.function}"), args, extra


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        f"usage: {PROGRAM} COMMAND [arguments]",
        "",
        "A small, complete LLM inference engine, and the course that builds it.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        (
            f"`{PROGRAM} COMMAND --help` tells more. The first command sets up what is missing: an"
            " environment in"
        ),
        ".venv and a 270 MB model in ~/.cache/course_lib. COURSE_VENV=off uses this Python as it is.",
    ]
    return "\n".join(lines)


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """`doctor` takes none."""


def run_doctor(args: argparse.Namespace) -> int:
    from course_lib.bootstrap import doctor
    from course_lib.model_store.health import check_models

    return doctor.run_doctor([check_models])
