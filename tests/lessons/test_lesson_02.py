"""Lesson 02's wrong kernels, as real ones: in Triton's interpreter, which needs a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from course_lib.bootstrap.places import REPO_ROOT

JUDGE_ALL = """
from course_lib.teaching.catalogue import lesson
from course_lib.teaching.checking.exercise_file import load_exercises
from course_lib.teaching.checking.judging import judge

kernel = load_exercises(lesson("02").exercises).exercises["02.5"]
answers = [*kernel.wrong_answers, *((None, answer) for answer in kernel.accepted_answers)]
assert sum(hasattr(answer, "cell") for _, answer in answers) > 10, "the kernels are missing"
for meant, answer in answers:
    verdict = judge(kernel, answer)
    if (verdict.diagnostic, verdict.passed) != (meant, meant is None):
        print(f"{getattr(answer, 'cell', answer)}\\nshould be told {meant}, but is told: {verdict.text()}")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton for this system")
def test_wrong_kernels_are_told_what_is_wrong() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO_ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", JUDGE_ALL], env=environment, cwd=REPO_ROOT, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr
