"""What the course says in a notebook, in lines that fit: JupyterLab breaks longer ones in the middle of words."""

from __future__ import annotations

import re
import textwrap
from typing import TextIO

WIDTH = 96  # characters beside an open file browser in a window of 1,280 pixels


def say(text: str, file: TextIO | None = None) -> None:
    """Print `text` to `file` (standard output), lines longer than WIDTH broken between words, as deep as they began."""
    print("\n".join(fitted for line in text.splitlines() for fitted in _fitted(line)), file=file)


def _fitted(line: str) -> list[str]:
    if len(line) <= WIDTH:
        return [line]
    return textwrap.wrap(
        line,
        WIDTH,
        subsequent_indent=re.match(" *", line)[0],
        expand_tabs=False,
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    )
