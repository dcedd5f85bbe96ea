"""predict and reveal: what is shown with and without widgets, and that nothing is given away before time."""

from __future__ import annotations

import json
from typing import Any

import IPython.display
import ipywidgets
import pytest

from course_lib.teaching import catalogue, predict, reveal
from course_lib.teaching.learner.session import current_session
from tests.teaching.tiny_lesson import Notebook

WIDGET = "application/vnd.jupyter.widget-view+json"
WHYS = ("Because of", "It is squared", "It does.")


@pytest.fixture
def shown(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is displayed."""
    bundles: list[dict[str, Any]] = []
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def choices() -> dict[str, str]:
    return current_session().store.read().questions


def widgets_in(bundle: dict[str, Any]) -> tuple[ipywidgets.RadioButtons, ipywidgets.HTML]:
    box = ipywidgets.widget._instances[bundle[WIDGET]["model_id"]]
    return box.children[1], box.children[2]


def test_one_output_for_widgets_html_and_plain_text(shown: list) -> None:
    predict("01.a")
    [bundle] = shown
    assert bundle["text/plain"] == (
        "2 < 3 & more?\nA  twice\nB  four times\nC  never\n"
        'To record your prediction, run predict("01.a", "A") with your letter.'
    )
    assert (
        "<b>2 &lt; 3 &amp; more?</b>" in bundle["text/html"] and "<li>four times</li>" in bundle["text/html"]
    )
    buttons, _ = widgets_in(bundle)
    assert buttons.value is None and [label for label, _ in buttons.options] == [
        "A  twice",
        "B  four times",
        "C  never",
    ]


def test_no_explanation_is_anywhere_before_the_answer_is_revealed(shown: list, capsys) -> None:
    predict("01.a")
    predict("01.a", "C")
    buttons, said = widgets_in(shown[0])
    buttons.value = "A"
    states = [json.dumps(widget.get_state(), default=str) for widget in ipywidgets.widget._instances.values()]
    everything = "\n".join([json.dumps(shown[0]), capsys.readouterr().out, said.value, *states])
    assert not [why for why in WHYS if why in everything]
    reveal("01.a")
    assert "Because of" in capsys.readouterr().out


def test_choosing_records_and_says_so_and_a_later_show_remembers(shown: list) -> None:
    predict("01.a")
    buttons, said = widgets_in(shown[0])
    buttons.value = "A"
    assert choices() == {"01.a": "A"} and said.value == "Your prediction is A: twice."
    buttons.value = "B"
    assert choices() == {"01.a": "B"}
    predict("01.a")
    assert widgets_in(shown[1])[0].value == "B"


def test_predicting_without_widgets(shown: list, capsys) -> None:
    predict("01.a", " b ")
    assert choices() == {"01.a": "B"} and capsys.readouterr().out == "Your prediction is B: four times.\n"
    predict("01.a", "D")
    assert capsys.readouterr().out == "question 01.a has the choices A, B, C.\n"
    assert choices() == {"01.a": "B"} and shown == []


@pytest.mark.parametrize("text", ["Tell me a joke.", "What is it?", "No!", "And so on…"])
def test_a_choice_that_is_a_sentence_gets_no_second_full_stop(shown: list, capsys, text: str) -> None:
    path = catalogue.lesson("01").exercises
    path.write_text(path.read_text().replace("twice", text))
    predict("01.a", "A")
    assert capsys.readouterr().out == f"Your prediction is A: {text}\n"


@pytest.mark.parametrize(
    "predicted, told",
    [
        (None, "The answer is B (four times). It is squared.\n"),
        ("Z", "The answer is B (four times). It is squared.\n"),  # of an older edition
        ("B", "You predicted B (four times), and so it is. It is squared.\n"),
        ("A", "You predicted A (twice). Because of <b>.\nThe answer is B (four times). It is squared.\n"),
    ],
)
def test_reveal(shown: list, capsys, predicted: str | None, told: str) -> None:
    if predicted:
        current_session().store.record_choice("01.a", predicted)
    predict("01.a")
    reveal("01.a")
    assert capsys.readouterr().out == told


def test_a_choice_that_cannot_be_recorded_is_told_in_the_widget(shown: list) -> None:
    predict("01.a")
    current_session().store.work.write_text("in the way")
    buttons, said = widgets_in(shown[0])
    buttons.value = "A"
    assert said.value.startswith("your progress cannot be written")


@pytest.mark.parametrize("function", [predict, reveal])
def test_an_unknown_question_is_told(shown: list, capsys, function) -> None:
    function("01.b")
    assert capsys.readouterr().out == 'there is no question "01.b": lesson 01 has 01.a.\n'
