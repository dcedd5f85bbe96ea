"""Names of models: folders, the course model, hub ids, and everything that is none of these."""

from __future__ import annotations

import subprocess
import sys

import pytest

from course_lib.bootstrap.places import REPO_ROOT
from course_lib.errors import ModelNotFoundError, UnsupportedModelError
from course_lib.model_store import COURSE_MODEL, resolve, resolve_model


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No hub, and an empty hub cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_importing_it_is_cheap():
    program = (
        "import sys, course_lib.model_store; print([m for m in ('torch', 'numpy', 'transformers') if m in"
        " sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=REPO_ROOT, capture_output=True, text=True
    )
    assert answer.stdout == "[]\n", answer.stderr


def test_folder_is_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


def test_course_model_comes_from_the_wheel_unless_a_revision_is_named(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(resolve, "ensure_course_model", lambda progress: tmp_path)
    monkeypatch.setattr(resolve, "_from_hub", lambda name, revision: asked.append((name, revision)))
    assert resolve_model(COURSE_MODEL) == tmp_path
    resolve_model(COURSE_MODEL, revision="main")
    assert asked == [(COURSE_MODEL, "main")]


def test_folder_without_config(tmp_path):
    with pytest.raises(ModelNotFoundError, match="has no config.json: model takes a folder"):
        resolve_model(tmp_path)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ModelNotFoundError, match="GGUF"):
        resolve_model(tmp_path)


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(UnsupportedModelError, match="is a file"):
        resolve_model(tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["./models/llama", "/no/such/folder", "~/nothing-here", "a/b/c"])
def test_missing_folder(name):
    with pytest.raises(ModelNotFoundError, match="There is no folder"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["", "  ", b"bytes"])
def test_no_name_at_all(name):
    with pytest.raises(ModelNotFoundError, match="must name a folder or a hub id"):
        resolve_model(name)


def test_unreachable_hub_names_the_offline_choice(offline):
    with pytest.raises(ModelNotFoundError, match=f"could not be reached .*use '{COURSE_MODEL}'"):
        resolve_model("some-org/some-model")


@pytest.mark.parametrize(
    "name", ["huggingfacetb/smollm2-135m-instruct", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M"]
)
def test_nearly_the_course_model(offline, name):
    with pytest.raises(ModelNotFoundError, match=f"did you mean '{COURSE_MODEL}'"):
        resolve_model(name)


def test_not_a_hub_id(offline):
    with pytest.raises(ModelNotFoundError, match="neither a folder nor a hub id"):
        resolve_model("what is this?")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("RepositoryNotFoundError", "has no model"),
        ("GatedRepoError", "accepted its licence"),
        ("RevisionNotFoundError", "no revision 'v9'"),
    ],
)
def test_what_the_hub_answers(monkeypatch, error, words):
    import huggingface_hub
    import huggingface_hub.errors as errors

    kind = getattr(errors, error)

    def refuse(*arguments, **settings):
        raise kind.__new__(kind)  # its constructor wants a live response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelNotFoundError, match=words):
        resolve_model("org/name", revision="v9")
