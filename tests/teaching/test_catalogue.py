"""The catalogue: 43 lessons in order, lines that fit their tables, and no path that vLLM does not have."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

import pytest

from course_lib.bootstrap.places import REPO_ROOT
from course_lib.errors import CourseError
from course_lib.teaching import catalogue
from course_lib.teaching.catalogue import STAGES, Lesson, lesson, lessons

# Paths under vllm/ that go round as the home of a lesson's mechanism -> whether 0.8.5 and 0.32 have them.
IN_CIRCULATION = {
    "engine/llm_engine.py": (True, True),
    "engine/async_llm_engine.py": (True, True),
    "engine/arg_utils.py": (True, True),
    "engine/metrics.py": (True, False),
    "engine/stats.py": (False, False),
    "core/scheduler.py": (True, False),
    "core/block_manager.py": (True, False),
    "core/disaggregated_scheduler.py": (False, False),
    "executor/ray_gpu_executor.py": (False, False),
    "executor/neuron_executor.py": (False, False),
    "executor/tpu_executor.py": (False, False),
    "worker/cache_engine.py": (True, False),
    "worker/worker.py": (True, False),
    "spec_decode/mlp_speculator.py": (False, False),
    "spec_decode/neuron_worker.py": (False, False),
    "spec_decode/neuron_eagle.py": (False, False),
    "utils/tpu_profiler.py": (False, False),
    "utils/simple_profiler.py": (False, False),
    "model_executor/input_metadata.py": (False, False),
    "model_executor/guided_decoding.py": (False, False),
    "model_executor/embeddings.py": (False, False),
    "model_executor/models/llava.py": (True, True),
    "model_executor/models/qwen.py": (True, False),
    "model_executor/models/mistral.py": (False, True),
    "multimodal/prompter.py": (False, False),
    "multimodal/embedding.py": (False, False),
    "multimodal/audio.py": (True, True),
    "multimodal/encoder_decoder.py": (False, False),
    "multimodal/geospatial.py": (False, False),
    "entrypoints/openai/jina.py": (False, False),
    "entrypoints/openai/api_server.py": (True, True),
    "attention/backends/paged_attention.py": (False, False),
    "lora/worker_manager.py": (True, True),
    "config.py": (True, False),
    "rlhf/": (False, False),
    "rlhf/colocate.py": (False, False),
    "rlhf/utils.py": (False, False),
}
# in neither release, yet real once
GONE_EARLY = {
    "executor/ray_gpu_executor.py",
    "executor/neuron_executor.py",
    "executor/tpu_executor.py",
    "model_executor/input_metadata.py",
    "model_executor/guided_decoding.py",
}
# what 0.32 no longer has, besides: a path there must name the release it is from
LEFT_BEHIND = tuple(f"vllm/{gone}/" for gone in ("attention", "core", "executor", "spec_decode", "worker"))
REFERENCE = re.compile(r"([\w./-]+)(?: \((0\.8\.5|0\.9\.2|tpu-inference|vllm-neuron)\))?")


def split(written: str) -> tuple[str, str | None]:
    """The path, and the release or project beside it."""
    match = REFERENCE.fullmatch(written)
    assert match is not None, written
    return match[1], match[2]


def test_all_43_lessons_are_there_in_order() -> None:
    assert [each.number for each in lessons()] == [f"{number:02d}" for number in range(1, 44)]


def test_slugs_are_unique_and_follow_the_titles() -> None:
    assert len({each.slug for each in lessons()}) == 43
    for each in lessons():
        assert each.slug == re.sub(r"[^a-z0-9]+", "_", each.title.lower())


def test_stages_come_one_after_the_other() -> None:
    assert [stage for stage, _ in groupby(each.stage for each in lessons())] == list(STAGES)


@pytest.mark.parametrize("each", lessons(), ids=lambda each: each.name)
def test_lines_fit_their_tables(each: Lesson) -> None:
    assert 45 <= each.minutes <= 120  # an evening; readers needed more than 90 for some
    assert 0 < len(each.builds) <= 90
    assert each.builds[0].isupper() and not each.builds.endswith(".")
    for text in (each.title, each.builds, each.moved, each.note):
        assert text == text.strip() and not set("|\n") & set(text)
    for remark in (each.moved, each.note):
        assert not remark or remark.endswith(".")
        assert remark.count("`") % 2 == 0


@pytest.mark.parametrize("each", lessons(), ids=lambda each: each.name)
def test_vllm_paths_name_a_place_that_has_them(each: Lesson) -> None:
    assert 2 <= len(each.vllm_files) <= 5 and len(set(each.vllm_files)) == len(each.vllm_files)
    for written in each.vllm_files:
        path, where = split(written)
        if where is None:
            assert path.startswith(("vllm/", "tools/"))
            assert not path.startswith(LEFT_BEHIND)
        if where in (None, "0.8.5") and path.removeprefix("vllm/") in IN_CIRCULATION:
            assert IN_CIRCULATION[path.removeprefix("vllm/")][where is None], f"vLLM has no {path}"
    for written in filter(None, (each.vllm_example, each.vllm_example_now)):
        assert split(written)[0].startswith("examples/")
    assert split(each.vllm_example)[1] in (None, "0.9.2")
    assert split(each.vllm_example_now or "examples/")[1] in (None, "tpu-inference")


def test_a_note_says_never_only_of_what_never_was() -> None:
    never = {path for path, (old, new) in IN_CIRCULATION.items() if not old and not new} - GONE_EARLY
    said = {path for each in lessons() for path in re.findall(r"`vllm/(\S+)` never existed", each.note)}
    assert said == never


@pytest.mark.parametrize("asked", [8, "8", "08", " 08 ", "08_eagle"])
def test_a_lesson_is_found_by_number_and_by_name(asked: str | int) -> None:
    assert lesson(asked).name == "08_eagle"


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("eagel", "08_eagle"), ("08_eagel", "08_eagle"), ("Basic", "01_basic"), ("lora", None)],
)
def test_an_unknown_lesson_is_told_what_there_is(asked: str, meant: str | None) -> None:
    with pytest.raises(CourseError, match="by number, 01 to 43, or by name, such as 01_basic") as caught:
        lesson(asked)
    assert (f"Did you mean {meant}?" in str(caught.value)) is (meant is not None)


@pytest.mark.parametrize("asked", [0, 44, "", "-1", "1.5"])
def test_numbers_outside_the_course_are_refused(asked: str | int) -> None:
    with pytest.raises(CourseError, match="There is no lesson"):
        lesson(asked)


def test_a_lesson_knows_its_files(tmp_path: Path) -> None:
    each = lesson("08")
    where = "stage2_performance/08_eagle"
    assert each.source == REPO_ROOT / f"solutions/{where}.py"
    assert each.solution_notebook == REPO_ROOT / f"solutions/{where}.ipynb"
    assert each.notebook == REPO_ROOT / f"notebooks/{where}.ipynb"
    assert each.exercises == REPO_ROOT / f"exercises/{where}.py"
    assert each.work_copy(tmp_path) == tmp_path / f"{where}.ipynb"


def test_a_lesson_is_written_once_its_source_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "REPO_ROOT", tmp_path)
    each = lesson("08")
    assert not each.is_written
    each.source.parent.mkdir(parents=True)
    each.source.write_text("# %%\n")
    assert each.is_written
