"""Lesson 02 as a learner meets it: in JupyterLab, in a real browser.

`COURSE_SCREENSHOTS=folder` keeps pictures of it, in the light theme and in the dark one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="Playwright is in requirements.txt; the browser tests need it")
from playwright.sync_api import Locator, Page, expect, sync_playwright

from course_lib.teaching.catalogue import lesson
from course_lib.teaching.lessons.lesson_source import solution_of, stub_of

LESSON = lesson("02")
EXERCISE = "02.1"
RUN_MS, LOOK_MS = 180_000, 30_000
WRONG = "    return positions % block_size\n"
MISTAKE = "restart"

pytestmark = pytest.mark.slow


@pytest.fixture
def page(chromium_path: str, lab_address: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1100})
        page.set_default_timeout(LOOK_MS)
        expect.set_options(timeout=LOOK_MS)
        page.goto(lab_address)
        yield page
        browser.close()


def picture(page: Page, name: str) -> None:
    """Keep a screenshot, if somebody wants to look."""
    if folder := os.environ.get("COURSE_SCREENSHOTS"):
        page.wait_for_timeout(500)  # smooth scrolling
        page.screenshot(path=Path(folder) / f"{name}.png")


def menu(page: Page, *items: str) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{items[0]}$")).click()
    for item in items[1:]:
        page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{item}$")).first.click()


def cell(page: Page, text: str) -> Locator:
    """The code cell whose source has `text`, scrolled into view."""
    found = page.locator(".jp-Notebook .jp-CodeCell", has=page.locator(".cm-content", has_text=text)).first
    found.scroll_into_view_if_needed()
    return found


def replace_source(page: Page, where: Locator, source: str) -> None:
    where.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(source)


def run(page: Page, where: Locator) -> None:
    """Run a cell to its end."""
    before = where.locator(".jp-InputPrompt").inner_text()
    where.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    prompt = where.locator(".jp-InputPrompt")
    expect(prompt).not_to_have_text(before)
    expect(prompt).to_have_text(re.compile(r"\[\d+\]"), timeout=RUN_MS)


def wrong_answer() -> str:
    """The stub with a line that people write first."""
    stub = stub_of(LESSON, EXERCISE)
    place = re.search(r"^ +\.\.\..*\n?", stub, re.MULTILINE)
    return stub[: place.start()] + WRONG + stub[place.end() :]


def test_a_lesson_from_home_page_to_passed_exercise(page: Page, lab_address: str) -> None:
    home = page.locator(".jp-MarkdownViewer")
    expect(home).to_contain_text(LESSON.title)
    picture(page, "home_before")
    home.get_by_role("link", name=LESSON.title).first.click()
    notebook = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
    status = notebook.locator(".jp-Notebook-ExecutionIndicator")
    expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=RUN_MS)  # the kernel is there
    expect(status).to_have_attribute("data-status", "idle")
    picture(page, "lesson_unsolved")

    # every cell runs, with nothing solved
    menu(page, "Run", "Run All Cells")
    expect(status).to_have_attribute("data-status", "busy")
    expect(status).to_have_attribute("data-status", "idle", timeout=RUN_MS)
    expect(notebook.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']")).to_have_count(0)
    check = cell(page, f'check("{EXERCISE}")')
    expect(check.locator(".jp-OutputArea-output")).to_contain_text("not done yet")

    # the explorer follows its slider
    explorer = notebook.locator(".jp-CodeCell", has=page.locator(".noUi-handle")).first
    explorer.scroll_into_view_if_needed()
    facts = explorer.locator("[role=status]")
    before = facts.inner_text()
    explorer.locator(".noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    expect(facts).not_to_have_text(before)
    picture(page, "explorer_light")

    # a wrong answer is told its mistake, a right one passes
    exercise = cell(page, f'@exercise("{EXERCISE}"')
    replace_source(page, exercise, wrong_answer())
    run(page, exercise)
    run(page, check)
    told = check.locator(".jp-OutputArea-output")
    expect(told).to_contain_text("not right yet")
    expect(told).to_contain_text(MISTAKE)
    picture(page, "mistake_light")
    replace_source(page, exercise, solution_of(LESSON, EXERCISE))
    run(page, exercise)
    run(page, check)
    expect(told).to_contain_text(f"{EXERCISE} · passed")
    picture(page, "passed_light")

    menu(page, "Settings", "Theme", "JupyterLab Dark")
    picture(page, "passed_dark")
    explorer.scroll_into_view_if_needed()
    picture(page, "explorer_dark")

    # the next day, the home page knows
    page.goto(lab_address)
    expect(home).to_contain_text(re.compile(r"1 of \d+ exercises"))
    expect(home).to_be_visible()
    picture(page, "home_after_dark")
