"""Predictions: `predict("01.a")` before the cell that shows the result, `reveal("01.a")` after it.

Owns how a question is shown: one output that holds the widget, HTML and plain text, so that it can be read
where there are no widgets. Invariant: why a choice is right or wrong is in no output before `reveal`.
"""

from __future__ import annotations

from html import escape
from string import ascii_uppercase
from typing import Any

from course_lib.errors import CourseError
from course_lib.teaching.checking.exercise_file import Choice, Question
from course_lib.teaching.learner.saying import say
from course_lib.teaching.learner.session import current_session, find_file, told


@told
def predict(question_id: str, choice: str | None = None) -> None:
    """Show a question and record the choice that is made; or record `choice` ("A", "B", …) at once."""
    question = _find(question_id)
    if choice is None:
        from IPython.display import display

        display(_bundle(question, current_session().store.read().questions.get(question_id)), raw=True)
    else:
        say(_record(question, str(choice).strip().upper()))


@told
def reveal(question_id: str) -> None:
    """Print the answer, and what is wrong with the prediction if it was another."""
    question = _find(question_id)
    choices = _lettered(question)
    predicted = current_session().store.read().questions.get(question_id)
    [(letter, right)] = [(letter, choice) for letter, choice in choices.items() if choice.right]
    if predicted == letter:
        say(f"You predicted {letter} ({right.text}), and so it is. {right.why}")
        return
    if predicted in choices:
        say(f"You predicted {predicted} ({choices[predicted].text}). {choices[predicted].why}")
    say(f"The answer is {letter} ({right.text}). {right.why}")


def _find(question_id: str) -> Question:
    lesson, file = find_file(question_id)
    if question_id not in file.questions:
        raise CourseError(
            f'there is no question "{question_id}": lesson {lesson.number} has {", ".join(file.questions)}.'
        )
    return file.questions[question_id]


def _lettered(question: Question) -> dict[str, Choice]:
    return dict(zip(ascii_uppercase, question.choices, strict=False))


def _record(question: Question, letter: str) -> str:
    """Record a choice; the sentence that confirms it."""
    choices = _lettered(question)
    if letter not in choices:
        raise CourseError(f"question {question.id} has the choices {', '.join(choices)}.")
    current_session().store.record_choice(question.id, letter)
    text = choices[letter].text
    return f"Your prediction is {letter}: {text}" + ("" if text.endswith((".", "?", "!", "…")) else ".")


def _bundle(question: Question, predicted: str | None) -> dict[str, Any]:
    """The question as a display bundle."""
    import ipywidgets as widgets

    choices = _lettered(question)
    call = f'predict("{question.id}", "A")'
    said = widgets.HTML(f"Your prediction is {predicted}." if predicted in choices else "")
    buttons = widgets.RadioButtons(
        options=[(f"{letter}  {choice.text}", letter) for letter, choice in choices.items()],
        value=predicted if predicted in choices else None,
        layout=widgets.Layout(width="auto"),
    )

    def choose(change: dict[str, Any]) -> None:
        try:
            said.value = escape(_record(question, change["new"]))
        except CourseError as error:
            said.value = escape(str(error))

    buttons.observe(choose, names="value")
    box = widgets.VBox([widgets.HTML(f"<b>{escape(question.text)}</b>"), buttons, said])
    items = "".join(f"<li>{escape(choice.text)}</li>" for choice in choices.values())
    lines = [f"{letter}  {choice.text}" for letter, choice in choices.items()]
    return {
        **box._repr_mimebundle_(),
        "text/html": (
            f'<p><b>{escape(question.text)}</b></p><ol type="A">{items}</ol>'
            f"<p>To record your prediction, run <code>{escape(call)}</code> with your letter.</p>"
        ),
        "text/plain": "\n".join(
            [question.text, *lines, f"To record your prediction, run {call} with your letter."]
        ),
    }
