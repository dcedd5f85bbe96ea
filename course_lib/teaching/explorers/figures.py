"""How a figure reaches a notebook: as a picture with a description, or as an explorer with a slider.

Invariant: every display is one output that carries a PNG and its description as text, so that it can be read
where no kernel runs and by those who cannot see it.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from course_lib.teaching.explorers.style import LINE

MAX_BYTES = 40 * 1024


def png_bytes(figure: Figure) -> bytes:
    """`figure` as a PNG of few colours with a thin border."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline=LINE)
    for colours in (256, 32):  # what is too large must do with less
        file = io.BytesIO()
        image.quantize(colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, "PNG")
        if file.tell() <= MAX_BYTES:
            break
    return file.getvalue()


def show(figure: Figure, alt: str) -> None:
    """Display a matplotlib figure and close it.

    Args:
        figure: best made after `plt.style.use(COURSE_STYLE)`, or inside `with course_style():`.
        alt: what the picture shows, in one or two sentences.

    Raises:
        ValueError: `alt` is empty, or the picture has more than 40 KB.
    """
    from IPython.display import display

    if not alt.strip():
        raise ValueError("alt is empty: say in a sentence what the picture shows")
    png = png_bytes(figure)
    if len(png) > MAX_BYTES:
        raise ValueError(f"figure has {len(png) / 1024:.0f} KB as a PNG, at most 40 are allowed: simplify it")
    pyplot.close(figure)
    display({"image/png": _base64(png), "text/plain": alt}, metadata={"image/png": {"alt": alt}}, raw=True)


def explore(
    draw: Callable[[int | None], Figure],
    describe: Callable[[int | None], str],
    *,
    name: str,
    count: int,
    start: int = 0,
    still: int | None = None,
) -> None:
    """Display a figure with a slider above it, in one output.

    Args:
        draw, describe: the figure and its description, pure functions of the slider's position; of None when
            nothing is singled out.
        name: what the slider counts.
        count: how many positions there are, from 0.
        start: where the slider stands at first.
        still: the position shown where no kernel runs.
    """
    import ipywidgets as widgets

    describe(still)  # what has no position at all is refused in its own words, not in the slider's
    slider = widgets.IntSlider(start, 0, count - 1, description=name, layout=widgets.Layout(width="60%"))
    play = widgets.Play(value=start, min=0, max=count - 1, interval=500)
    widgets.jslink((play, "value"), (slider, "value"))
    explore_controls(
        lambda at: draw(at), lambda at: describe(at), {"at": slider}, widgets.HBox([play, slider]), still={"at": still}
    )  # fmt: skip


def explore_controls(
    draw: Callable[..., Figure],
    describe: Callable[..., str],
    controls: Mapping[str, Any],
    panel: Any,
    *,
    still: Mapping[str, Any] | None = None,
) -> None:
    """Display a figure that follows several controls, in one output.

    Args:
        draw, describe: the figure and its description, pure functions of keyword arguments.
        controls: the widget behind each of these arguments.
        panel: the widget that lays the controls out, above the figure.
        still: the arguments shown where no kernel runs; None: as the controls stand at first.
    """
    import ipywidgets as widgets
    from IPython.display import display

    picture, facts = widgets.HTML(), widgets.HTML()

    def settings() -> dict[str, Any]:
        return {name: control.value for name, control in controls.items()}

    def redraw(_change: Any = None) -> None:
        chosen = settings()
        text = html.escape(describe(**chosen))
        data = _base64(png_bytes(draw(**chosen)))
        picture.value = f'<img alt="{text}" src="data:image/png;base64,{data}" style="max-width: 100%">'
        facts.value = f'<div role="status" style="line-height: 1.5; white-space: pre-line">{text}</div>'

    still = settings() if still is None else still
    alt = describe(**still)
    shown = {"image/png": _base64(png_bytes(draw(**still))), "text/plain": alt}
    for control in controls.values():
        control.observe(redraw, "value")
    redraw()
    explorer = widgets.VBox([panel, picture, facts])
    display(explorer._repr_mimebundle_() | shown, metadata={"image/png": {"alt": alt}}, raw=True)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
