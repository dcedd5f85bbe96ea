"""A lesson that passes every gate, small enough to build and run in seconds.

It brings its own `exercise`, `check`, `predict` and `reveal`, so that it needs neither a model nor a place in
the catalogue. The tests break one thing in it at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from course_lib.teaching.catalogue import Lesson, lesson

FRONT_MATTER = """\
# ---
# jupyter:
#   course:
#     lesson: "02"
#     objectives: ["Double", "Square", "Sort"]
#     difficulty: 2
#     needs: ["01"]
#     opens: ["course_lib/errors.py"]
#     terms: {"double": "Twice as much."}
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---
"""

CELLS = (
    '''
# %%
import base64

from IPython.display import Image, display

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNgAAAAAgAB9HFkpgAAAABJRU5ErkJggg=="
answers, right = {}, {"02.1": 6, "02.2": 9, "02.3": 3}


def exercise(exercise_id, target=None):
    return lambda answer: answers.setdefault(exercise_id, answer)


def check(exercise_id):
    got = answers[exercise_id](3)
    said = "not done yet" if got is None else "passed" if got == right[exercise_id] else "wrong"
    print(f"{exercise_id} · {said}")


def predict(question_id):
    print("What do you think?")


reveal = predict
'''
    """
# %% [markdown]
# ## The idea
#
# Read [the errors](../../course_lib/errors.py), see [above](#The-idea).
#
# """
    + "word " * 1500
    + '''

# %%
predict("02.a")

# %%
reveal("02.a")

# %%
for _ in range(3):
    display(Image(base64.b64decode(PIXEL)))

# %% tags=["exact"]
print(sorted([3, 1, 2]))

# %% tags=["exercise"]
@exercise("02.1", target="course_lib.errors:CourseError")
def double(x):
    """Twice x."""
    #: solution
    twice = 2 * x  # secret
    return twice
    #: end

# %% tags=["check"]
check("02.1")

# %% tags=["exercise"]
@exercise("02.2")
def square(x):
    #: solution
    return x * x
    #: stub
    squared = None
    return squared
    #: end

# %% tags=["check"]
check("02.2")

# %% tags=["exercise"]
@exercise("02.3")
def same(x):
    #: solution
    return +x
    #: end

# %% tags=["check"]
check("02.3")
''',
)
SOURCE = FRONT_MATTER + "".join(CELLS)

EXERCISES = '''
from course_lib.teaching.checking.exercise_file import Case, Choice, Exercise, Question

HINTS = ("a nudge", "a push", "nearly the code")


def make(exercise_id, stars, right, target=None):
    made = Exercise(
        exercise_id, "Numbers", target=target, stars=stars, minutes=5, importance="core", hints=HINTS
    )
    made.cases(lambda rng: (Case(f"x = {x}", x) for x in (0, 1, 3, rng.randint(4, 9))))
    made.expected(lambda x: right(x))
    made.mistake("one-more", "One too many.")(lambda x: right(x) + 1)
    made.mistake("one-less", "One too few.")(lambda x: right(x) - 1)
    made.symptom("text", "A number, not text.")(lambda failure: isinstance(failure.got, str))
    made.wrong("text")(lambda x: str(right(x)))
    made.accepts(lambda x: right(x))
    return made


double = make("02.1", 1, lambda x: x + x, target="course_lib.errors:CourseError")
square = make("02.2", 1, lambda x: x**2)
same = make("02.3", 2, lambda x: x)


@same.budget("No work is needed.", most=0, unit="loop")
def _(answer):
    return answer.__code__.co_names.count("range")


@same.wasteful
def _(x):
    return len(range(x))


question = Question("02.a", "How many?", [Choice("one", "too few"), Choice("two", "right", right=True)])
'''


@dataclass(frozen=True)
class Miniature(Lesson):
    """A lesson whose files are under `root`, in folders of the usual names."""

    root: Path = Path()

    @property
    def source(self) -> Path:
        return self.root / "solutions" / self.stage / f"{self.name}.py"

    @property
    def notebook(self) -> Path:
        return self.root / "notebooks" / self.stage / f"{self.name}.ipynb"

    @property
    def exercises(self) -> Path:
        return self.root / "exercises" / self.stage / f"{self.name}.py"

    def rewrite(self, old: str, new: str, path: Path | None = None) -> None:
        """Replace text in a file of the lesson, by default its source; the text must be there."""
        path = path or self.source
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{old!r} is not in {path.name}"
        path.write_text(text.replace(old, new), encoding="utf-8")


def write_miniature(root: Path, source: str = SOURCE, exercises: str = EXERCISES) -> Miniature:
    """The lesson's two files under `root`; links lead to the repository's files as from a real lesson."""
    of_course = lesson("02")
    values = {field.name: getattr(of_course, field.name) for field in fields(Lesson)}
    made = Miniature(**values, root=root)
    for path, text in ((made.source, source), (made.exercises, exercises)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    made.notebook.parent.mkdir(parents=True, exist_ok=True)
    (root / "course_lib").mkdir(exist_ok=True)
    (root / "course_lib" / "errors.py").touch()
    return made
