"""Claims about engine/contents.py: what a run reads is compared by content, and hashed once."""

import shutil

import pytest

from engine.data import digests
from engine.errors import UserError
from engine.run import contents


def of(folder, prompts=("a fox",)):
    return contents.Contents({"--prompts": list(prompts)}, {"--model": [folder]})


@pytest.fixture
def begun(tmp_path):
    """A folder, and the result of a run that began with it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"\0" * 1000)
    run = of(tmp_path / "model")
    run.begin()
    return tmp_path / "model", run.result()


def test_a_model_that_was_moved_is_the_same(begun, tmp_path):
    folder, then = begun
    shutil.move(folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "weights").touch()
    of(tmp_path / "elsewhere").compare(then)


@pytest.mark.parametrize("what", ["a byte", "a name", "a file more", "a prompt"])
def test_what_has_changed_is_named(begun, what):
    folder, then = begun
    prompts = ["a fox"]
    if what == "a byte":
        (folder / "weights").write_bytes(b"\0" * 999 + b"\1")
    elif what == "a name":
        (folder / "weights").rename(folder / "heights")
    elif what == "a file more":
        (folder / "more").write_bytes(b"")
    else:
        prompts = ["a dog"]
    with pytest.raises(UserError, match="--prompts is not" if what == "a prompt" else "--model is not"):
        of(folder, prompts).compare(then)


def test_what_was_learnt_from_and_is_gone_is_named(begun):
    folder, then = begun
    with pytest.raises(UserError, match="--model is not"):
        contents.Contents({"--prompts": ["a fox"]}, {}).compare(then)


def test_files_that_look_as_they_did_are_not_hashed_again(begun, monkeypatch):
    folder, then = begun
    monkeypatch.setattr(digests, "digest_of_files", lambda places: 1 / 0)
    of(folder).compare(then)
