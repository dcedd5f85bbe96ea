"""with my_code(): whose code the engine runs, what the badge says, and that nothing of it stays behind."""

from __future__ import annotations

import functools
import inspect
import io
import signal
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import course_lib.core.block_pool
import course_lib.sampling.draw
import course_lib.sampling.sampler
from course_lib import LLMEngine, SamplingParams, cli
from course_lib.core.block_pool import BlockPool
from course_lib.teaching import catalogue, check, my_code, patched
from course_lib.teaching.checking.exercise_file import Exercise
from course_lib.teaching.learner import patching
from course_lib.teaching.learner.patching import Patches, Place
from course_lib.teaching.learner.session import current_session
from tests.teaching.tiny_lesson import Notebook

DRAW = "course_lib.sampling.draw:draw"
CALLED = "Of the parts you can replace, this run called "


def everything() -> dict[str, Any]:
    """Every attribute of every module of the engine and of every class in them."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("course_lib", "kernels") and "teaching" not in name:
            for attribute, value in vars(module).items():
                found[f"{name}:{attribute}"] = value
                if isinstance(value, type):
                    found |= {f"{name}:{attribute}.{key}": each for key, each in vars(value).items()}
    return found


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    before = everything()
    yield
    after = everything()
    assert [name for name in before if after.get(name) is not before[name]] == []
    new = [
        name for name in after.keys() - before.keys() if not name.endswith(".__slotnames__")
    ]  # copy's cache
    assert [
        name for name in new if name.rpartition(".")[0] in before
    ] == []  # no attribute was added to a class


@pytest.fixture
def solved(notebook: Notebook, capsys: pytest.CaptureFixture[str]) -> Notebook:
    notebook.run("SHIFT = 0")
    notebook.answer("01.1", "return probs.argmax(dim=-1) + SHIFT")
    notebook.answer("01.2", "return 2 * layers")
    check("01.1")
    check("01.2")
    assert capsys.readouterr().out.count("passed") == 2
    return notebook


def replacing(target: str, adapt: Any = None) -> Exercise:
    exercise = Exercise("01.7", "Any", target, stars=1, minutes=1, importance="core", hints=("a", "b", "c"))
    if adapt:
        exercise.adapt(adapt)
    return exercise


def tokens(engine: LLMEngine, **params: Any) -> list[list[int]]:
    for name, prompt in (("a", [5, 6, 7]), ("b", [9, 8])):
        engine.add_request(name, prompt, SamplingParams(max_tokens=6, ignore_eos=True, **params))
    done = {}
    while engine.has_unfinished_requests():
        done |= {
            output.request_id: output.outputs[0].token_ids for output in engine.step() if output.finished
        }
    return [done["a"], done["b"]]


def test_the_engine_runs_what_passed(solved: Notebook, tiny_engine: LLMEngine, capsys) -> None:
    greedy = tokens(tiny_engine, temperature=0)
    drawn = tokens(tiny_engine, temperature=2.0, seed=1)
    with my_code():
        mine = tokens(tiny_engine, temperature=2.0, seed=1)
        config = tiny_engine.config.model
        assert (
            config.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
        )  # keys and values, layers, heads, head size, float32
    assert mine == greedy != drawn  # our draw takes the likeliest
    assert capsys.readouterr().out == (
        f"{CALLED}2: your code ran in 2, the course's in 0.\n"
        "  01.1  course_lib.sampling.draw:draw                     6 calls\n"
        "  01.2  course_lib.config:ModelConfig.kv_bytes_per_token  1 call\n"
    )
    assert tokens(tiny_engine, temperature=2.0, seed=1) == drawn


def test_before_any_pass_the_course_serves_and_is_counted(notebook: Notebook, tiny_engine, capsys) -> None:
    with my_code():
        drawn = tokens(tiny_engine, temperature=2.0, seed=1)
    assert capsys.readouterr().out == f"{CALLED}1: your code ran in 0, the course's in 1.\n"
    assert drawn == tokens(tiny_engine, temperature=2.0, seed=1)


def test_what_is_not_called_is_named(solved: Notebook, capsys) -> None:
    with my_code():
        assert course_lib.sampling.sampler.draw is course_lib.sampling.draw.draw
        course_lib.sampling.sampler.draw(torch.eye(2), {}, None)
    assert capsys.readouterr().out == (
        f"{CALLED}1: your code ran in 1, the course's in 0.\n"
        "  01.1  course_lib.sampling.draw:draw  1 call\n"
        "  yours, but not called: 01.2\n"
    )


def test_an_adapter_that_does_without_the_answer_is_the_course_s_code(solved, monkeypatch, capsys) -> None:
    answer_to = patching._adapted

    def adapted(exercise, place, answer):
        return answer_to(exercise, place, answer) if exercise.id == "01.2" else place.raw

    monkeypatch.setattr(patching, "_adapted", adapted)
    with my_code():
        course_lib.sampling.sampler.draw(torch.eye(2), {}, torch.Generator())
    assert capsys.readouterr().out == (
        f"{CALLED}1: your code ran in 0, the course's in 1.\n  yours, but not called: 01.1, 01.2\n"
    )


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_restored_and_told_after_an_exception(solved: Notebook, capsys, error: type[BaseException]) -> None:
    with pytest.raises(error):
        with my_code():
            raise error
    assert capsys.readouterr().out == f"{CALLED}none.\n  yours, but not called: 01.1, 01.2\n"
    with my_code():
        pass


def test_restored_after_an_interrupt_while_restoring(
    solved: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_back, times = setattr, iter(range(3))

    class Slow(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            put_back(self, name, value) if name != "draw" else vars(self).update(draw=value)
            if name == "draw" and next(times) == 1:
                signal.raise_signal(signal.SIGINT)

    slow = Slow("course_lib._slow")
    vars(slow)["draw"] = course_lib.sampling.draw.draw
    monkeypatch.setitem(sys.modules, "course_lib._slow", slow)
    with pytest.raises(KeyboardInterrupt):
        with my_code():
            assert slow.draw is course_lib.sampling.draw.draw
    assert slow.draw is course_lib.sampling.draw.draw
    assert not current_session().serves_own_code


def test_it_does_not_nest(solved: Notebook) -> None:
    with my_code():
        with pytest.raises(RuntimeError, match="inside a `with my_code"):
            with my_code():
                pass
        with patched(replacing(DRAW), lambda *_: 7):  # but a look may show one answer
            assert course_lib.sampling.sampler.draw() == 7
        assert course_lib.sampling.sampler.draw(torch.eye(2), {}, None).tolist() == [0, 1]
    with my_code():
        pass


def test_answers_that_are_gone_or_broken_leave_it_to_the_course(solved: Notebook, capsys) -> None:
    answers = current_session().store.work / "answers"
    (answers / "01_1.py").unlink()
    (answers / "01_2.py").write_text("import no_such_module")
    with my_code():
        course_lib.sampling.sampler.draw(torch.eye(2), {}, torch.Generator())
    first, second, badge = capsys.readouterr().out.splitlines()
    assert first.startswith("01.1: the course's own code serves. 01_1.py is missing")
    assert second.startswith(
        "01.2: the course's own code serves. 01_2.py does not run by itself (ModuleNotFoundError"
    )
    assert badge == f"{CALLED}1: your code ran in 0, the course's in 1."


def test_the_stored_answer_serves_not_the_notebook(solved: Notebook, capsys) -> None:
    solved.answer("01.1", "return None")  # being rewritten; not checked
    with my_code():
        assert course_lib.sampling.sampler.draw(torch.eye(2), {}, None).tolist() == [0, 1]


def test_a_target_of_a_package_that_is_not_there(solved: Notebook, capsys) -> None:
    path = catalogue.lesson("01").exercises
    path.write_text(
        path.read_text().replace("course_lib.config:ModelConfig", "course_lib.absent:ModelConfig")
    )
    with my_code():
        pass
    assert capsys.readouterr().out == f"{CALLED}none.\n  yours, but not called: 01.1\n"


def test_why_a_kernel_is_not_called_on_a_cpu_is_told(
    solved: Notebook, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    kernels = ModuleType("kernels.triton.probe")
    kernels.Config = type("Config", (), {"kv_bytes_per_token": property(lambda config: 1)})
    monkeypatch.setitem(sys.modules, "kernels.triton", ModuleType("kernels.triton"))
    monkeypatch.setitem(sys.modules, "kernels.triton.probe", kernels)
    path = catalogue.lesson("01").exercises
    path.write_text(path.read_text().replace("course_lib.config:ModelConfig", "kernels.triton.probe:Config"))
    with my_code():
        pass
    assert capsys.readouterr().out.endswith(
        "\n  yours, but not called: 01.1, 01.2 (a Triton kernel: the engine runs those on a GPU)\n"
    )


def test_of_two_answers_to_one_target_the_later_serves(solved: Notebook, capsys) -> None:
    path = catalogue.lesson("01").exercises
    later = catalogue.lesson("02").exercises
    later.write_text(path.read_text().replace('"01.', '"02.'))
    store = current_session().store
    (store.work / "answers" / "02_1.py").write_text("def __answer__(probs): return probs.argmin(dim=-1)")
    store.record_attempt("02.1", "passed", "")
    with my_code():
        assert course_lib.sampling.sampler.draw(torch.eye(2), {}, None).tolist() == [1, 0]
    assert "  02.1  course_lib.sampling.draw:draw  1 call\n" in capsys.readouterr().out


# ---- kinds of targets ----------------------------------------------------------------------------


class Kinds:
    """Stands for an engine's class."""

    unit = 2

    def method(self, x: int, *, y: int = 1) -> int:
        """Of an object."""
        return x * y * self.unit

    @staticmethod
    def static(x: int) -> int:
        return x

    @classmethod
    def of_class(cls, x: int) -> int:
        return x * cls.unit

    @property
    def prop(self) -> int:
        """A property."""
        return self.unit

    @prop.setter
    def prop(self, value: int) -> None:
        self.unit = value

    class Inner:
        @functools.wraps(len)
        def __len__(self) -> int:
            return 3


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("course_lib._probe")
    module.Kinds = Kinds
    monkeypatch.setitem(sys.modules, "course_lib._probe", module)
    return module


@pytest.mark.parametrize(
    "name, use, answer, result",
    [
        ("method", lambda: Kinds().method(3, y=2), lambda self, x, y: (self.unit, x, y), (2, 3, 2)),
        ("static", lambda: (Kinds.static(3), Kinds().static(3)), lambda x: -x, (-3, -3)),
        ("of_class", lambda: (Kinds.of_class(3), Kinds().of_class(3)), lambda cls, x: cls.unit + x, (5, 5)),
        ("prop", lambda: (Kinds().prop, Kinds.prop.__doc__), lambda self: self.unit + 5, (7, "A property.")),
        ("Inner.__len__", lambda: len(Kinds.Inner()), lambda self: 8, 8),
    ],
)
def test_every_kind_of_attribute(probe: ModuleType, name: str, use: Any, answer: Any, result: Any) -> None:
    before = {**vars(Kinds), **vars(Kinds.Inner)}
    was = use()
    with patched(replacing(f"course_lib._probe:Kinds.{name}"), answer):
        assert use() == result
        if name == "prop":
            changed = Kinds()
            changed.prop = 4  # the setter is still there
            assert changed.unit == 4
    assert use() == was
    after = {**vars(Kinds), **vars(Kinds.Inner)}
    assert list(after) == list(before) and all(after[key] is before[key] for key in before)


def test_adapt_gets_the_original_and_may_return_the_whole_property(probe: ModuleType) -> None:
    def adapt(answer: Any, original: Any) -> property:
        return property(lambda self: answer(original(self)))

    with patched(replacing("course_lib._probe:Kinds.prop", adapt), lambda value: value + 40):
        assert Kinds().prop == 42


def test_a_function_is_replaced_wherever_it_was_imported_even_during_the_block(probe: ModuleType) -> None:
    original = course_lib.sampling.draw.draw
    probe.alias = original
    with patched(replacing(DRAW), answer := lambda *_: "mine"):
        assert probe.alias is answer is course_lib.sampling.sampler.draw
        probe.late = course_lib.sampling.draw.draw  # a module that is first imported now
    assert probe.alias is probe.late is original


def test_a_class_is_replaced_and_its_instances_counted(notebook: Notebook, probe: ModuleType, capsys) -> None:
    path = catalogue.lesson("01").exercises
    path.write_text(path.read_text().replace(DRAW, "course_lib._probe:Kinds").replace("@pick.adapt", ""))
    with my_code():
        assert (
            isinstance(Kinds(), Kinds) and Kinds is probe.Kinds
        )  # the course's own: the same class, counted
    assert capsys.readouterr().out == f"{CALLED}1: your code ran in 0, the course's in 1.\n"
    assert "__init__" not in vars(Kinds)
    with patched(replacing("course_lib._probe:Kinds"), Mine := type("Mine", (), {})):
        assert probe.Kinds is Mine
    assert probe.Kinds is Kinds


def test_counting_changes_neither_results_nor_signatures(
    notebook: Notebook, probe: ModuleType, capsys
) -> None:
    path = catalogue.lesson("01").exercises
    path.write_text(path.read_text().replace(DRAW, "course_lib._probe:Kinds.method"))
    signature = inspect.signature(Kinds.method)
    with my_code():
        assert [Kinds().method(x, y=3) for x in range(3)] == [0, 6, 12]
        assert inspect.signature(Kinds.method) == signature and Kinds.method.__doc__ == "Of an object."
        with pytest.raises(TypeError):
            Kinds().method()
    assert capsys.readouterr().out == f"{CALLED}1: your code ran in 0, the course's in 1.\n"


@pytest.mark.parametrize(
    "name", ["BlockPool.no_such", "no_such", "NoPool.free", "BlockPool.__slots__", "BlockPool.__reduce__"]
)
def test_a_target_that_cannot_be_replaced_is_named(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"target 'course_lib.core.block_pool:{name}' is no function, method, prop"
    ):
        with patched(replacing(f"course_lib.core.block_pool:{name}"), len):
            pass


def test_a_failure_while_patching_takes_back_what_was_done(solved: Notebook, capsys) -> None:
    path = catalogue.lesson("01").exercises
    path.write_text(path.read_text().replace("ModelConfig.kv_bytes_per_token", "ModelConfig.no_such"))
    with pytest.raises(ValueError, match="no_such"):
        with my_code():
            pytest.fail("not reached")
    assert not current_session().serves_own_code and capsys.readouterr().out == ""


def test_undo_of_nothing() -> None:
    patches = Patches()
    patches.put(Place.of("course_lib.core.block_pool:BlockPool"), BlockPool)
    patches.undo()
    patches.undo()


# ---- the command line ----------------------------------------------------------------------------


def test_mine_on_the_command_line(solved: Notebook, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def run(args: Any) -> int:
        print(course_lib.sampling.sampler.draw(torch.eye(2), {}, torch.Generator()).tolist())
        return 3

    module = type("module", (), {"add_probe_arguments": lambda parser: None, "run_probe": run})
    monkeypatch.setitem(
        cli.COMMANDS, "probe", cli.Command("a probe", "probe_module", "probe", needs=(), mine=True)
    )
    monkeypatch.setitem(sys.modules, "probe_module", module)
    assert cli.main(["probe", "--mine"]) == 3
    said = capsys.readouterr()
    assert said.out == "[0, 1]\n"
    assert (
        said.err == f"{CALLED}1: your code ran in 1, the course's in 0.\n"
        "  01.1  course_lib.sampling.draw:draw  1 call\n"
        "  yours, but not called: 01.2\n"
    )
    assert cli.main(["probe"]) == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command, has_it", [("generate", True), ("chat", True), ("bench", False)])
def test_which_commands_have_mine(command: str, has_it: bool, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert ("--mine" in capsys.readouterr().out) is has_it


def test_the_badge_goes_where_it_is_told(solved: Notebook, capsys) -> None:
    with my_code(file=(file := io.StringIO())):
        pass
    assert file.getvalue().startswith(f"{CALLED}none.\n") and capsys.readouterr().out == ""
