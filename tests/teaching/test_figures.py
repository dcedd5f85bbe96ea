"""How figures reach a notebook."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from ipywidgets.widgets.widget import _instances
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from course_lib.teaching.explorers.figures import MAX_BYTES, explore, png_bytes, show
from course_lib.teaching.explorers.style import LINE, PAPER, SERIES, canvas, course_style, marks, shorten

pytestmark = pytest.mark.filterwarnings("error")
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The bundles displayed, each with its metadata."""
    calls: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def display(bundle: dict[str, Any], *, metadata: dict[str, Any], raw: bool) -> None:
        assert raw
        calls.append((bundle, metadata))

    monkeypatch.setattr("IPython.display.display", display)
    return calls


def line(height: float) -> Figure:
    with course_style():
        figure, axes = pyplot.subplots()
        axes.plot([0, 1], [0, height])
    return figure


def colour(hexadecimal: str) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in to_rgb(hexadecimal))


def test_a_picture_is_small_opaque_and_bordered() -> None:
    png = png_bytes(line(1))
    image = Image.open(io.BytesIO(png))
    assert len(png) < MAX_BYTES and image.mode == "P" and image.width == 945
    pixels = np.asarray(image.convert("RGB")).astype(int)
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert np.abs(edge - colour(LINE)).max() <= 4
    assert np.abs(pixels[2, 2] - colour(PAPER)).max() <= 4


def test_colours_survive_the_palette() -> None:
    figure, axes = canvas(2.0)
    for i, one in enumerate(SERIES):
        axes.add_patch(pyplot.Rectangle((i, 0.5), 0.1, 0.1, facecolor=one))
    pixels = np.asarray(Image.open(io.BytesIO(png_bytes(figure))).convert("RGB")).astype(int)
    for i, one in enumerate(SERIES):
        assert np.abs(pixels[round(0.55 * 105), round((i + 0.05) * 105)] - colour(one)).max() <= 8


def test_show_gives_picture_and_words_and_closes_the_figure(shown: list) -> None:
    figure = line(1)
    show(figure, alt="A line that rises.")
    ((bundle, metadata),) = shown
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"] == "A line that rises."
    assert metadata == {"image/png": {"alt": "A line that rises."}}
    assert not pyplot.fignum_exists(figure.number)


def test_figures_that_nobody_could_read_are_refused(shown: list) -> None:
    with pytest.raises(ValueError, match="alt is empty"):
        show(Figure(), alt=" ")
    noise = Figure()
    noise.figimage(np.random.default_rng(0).random((400, 400, 3)))
    with pytest.raises(ValueError, match="at most 40 are allowed"):
        show(noise, alt="Noise.")
    assert not shown


def test_an_explorer_follows_its_slider(shown: list) -> None:
    drawn: list[int | None] = []

    def draw(position: int | None) -> Figure:
        drawn.append(position)
        return canvas(1 + (position or 0))[0]

    explore(draw, lambda position: f'at <{position}> "now"', name="step", count=3, start=1)
    ((bundle, metadata),) = shown
    assert drawn == [None, 1]
    assert bundle["text/plain"] == metadata["image/png"]["alt"] == 'at <None> "now"'
    controls, picture, facts = _instances[bundle[WIDGET]["model_id"]].children
    play, slider = controls.children
    assert (slider.min, slider.max, slider.value, slider.description, play.max) == (0, 2, 1, "step", 2)
    assert 'alt="at &lt;1&gt; &quot;now&quot;"' in picture.value
    before = picture.value
    slider.value = 2
    assert drawn == [None, 1, 2] and picture.value != before and "at &lt;2&gt;" in facts.value


def test_requests_are_marked_by_letters_that_never_repeat() -> None:
    look = marks(map(str, range(800)))
    letters = [look[str(i)].letter for i in (0, 25, 26, 51, 52, 701, 702)]
    assert letters == ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]
    assert len({mark.letter for mark in look.values()}) == 800
    assert shorten("chatcmpl-0123456789/1", 12) == "chatc…6789/1" and shorten("short") == "short"


def test_the_style_ends_with_its_block() -> None:
    before = pyplot.rcParams["axes.facecolor"]
    with course_style():
        assert pyplot.rcParams["axes.facecolor"] == PAPER
    assert pyplot.rcParams["axes.facecolor"] == before
