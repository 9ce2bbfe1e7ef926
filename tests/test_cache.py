"""Claims about engine/cache.py, and about the embeddings that flow.encode_prompts keeps in it."""

import multiprocessing
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import flow
import flux
from engine.data import cache, digests
from engine.data.cache import Cache
from engine.model.folder import Model

PROMPTS = ["a red circle", "a blue square above a white circle", "a red circle"]


def entries(folder):
    return sorted(path for path in folder.iterdir() if cache.ENTRY.fullmatch(path.name))


def of_prompts(folder):
    """The entries that are embeddings: what is known of files is an entry too."""
    return [path for path in entries(folder) if "txt" in load_file(path)]


@pytest.fixture
def kept(tmp_path):
    return Cache(tmp_path / "deep" / "cache")


def test_what_was_put_comes_back_bit_for_bit(kept):
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.tensor(True), "c": torch.randn(4, 3).T}
    key = kept.key("a prompt", "a model")
    assert kept.get(key) is None and not kept.folder.exists()
    kept.put(key, tensors)
    found = Cache(kept.folder).get(key)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert found["a"].dtype == torch.bfloat16 and kept.get(kept.key("a prompt", "another")) is None


@pytest.mark.parametrize("harm", ["a bit", "cut", "empty", "another's", "text"])
def test_a_damaged_entry_is_told_and_computed_again(kept, capsys, harm):
    kept.put(kept.key(1), {"a": torch.zeros(1000)})
    path = kept.path(kept.key(1))
    whole = path.read_bytes()
    if harm == "a bit":
        path.write_bytes(whole[:-9] + b"\1" + whole[-8:])
    elif harm == "cut":
        path.write_bytes(whole[:-9])
    elif harm == "another's":
        kept.put(kept.key(2), {"a": torch.ones(1000)})
        shutil.copy(kept.path(kept.key(2)), path)
    else:
        path.write_bytes(b"" if harm == "empty" else b"no tensors here")
    assert kept.get(kept.key(1)) is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{path}: damaged" in said and "computed again" in said
    kept.put(kept.key(1), {"a": torch.zeros(1000)})
    assert kept.get(kept.key(1)) is not None


def test_what_was_not_used_for_longest_goes_first_and_nothing_of_others(tmp_path):
    kept = Cache(tmp_path, most=3 * 4300)
    (tmp_path / "weights.safetensors").write_bytes(b"x" * 10_000)
    half = tmp_path / f".{kept.key(0)}.safetensors.123"
    half.write_bytes(b"x")
    os.utime(half, (1, 1))
    for n in range(3):
        kept.put(kept.key(n), {"a": torch.zeros(1000)})
        os.utime(kept.path(kept.key(n)), (100 + n, 100 + n))
    kept.get(kept.key(0))  # used just now
    kept.put(kept.key(3), {"a": torch.zeros(1000)})
    kept.trim()
    assert entries(tmp_path) == sorted(kept.path(kept.key(n)) for n in (0, 2, 3))
    assert (tmp_path / "weights.safetensors").exists() and not half.exists()


def test_half_of_the_disk_is_left_to_others(tmp_path, monkeypatch):
    kept = Cache(tmp_path)
    for n in range(4):
        kept.put(kept.key(n), {"a": torch.zeros(1000)})
        os.utime(kept.path(kept.key(n)), (100 + n, 100 + n))
    size = kept.path(kept.key(0)).stat().st_size
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, size))
    kept.trim()
    assert entries(tmp_path) == sorted(kept.path(kept.key(n)) for n in (2, 3))  # of five, all that there is


def test_a_full_disk_is_told_once_and_ends_nothing(kept, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_whole", full)
    for n in range(3):
        kept.put(kept.key(n), {"a": torch.zeros(3)})
    assert capsys.readouterr().out.count("No space left on device; nothing more is cached there") == 1
    assert kept.get(kept.key(0)) is None


def fill(folder, most, seed):
    """What two runs do at once: both put and take the same entries, in a folder that is too small for all."""
    kept = Cache(folder, most)
    for n in torch.randint(20, (100,), generator=torch.Generator().manual_seed(seed)).tolist():
        found = kept.get(kept.key(n))
        assert found is None or found["a"].unique().tolist() == [n]
        kept.put(kept.key(n), {"a": torch.full((1000,), float(n))})


def test_two_runs_at_once_do_each_other_no_harm(tmp_path, capfd):
    processes = [multiprocessing.get_context("fork").Process(target=fill, args=(tmp_path, 10 * 4300, seed))
                 for seed in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0] and "damaged" not in capfd.readouterr().out
    assert 0 < len(entries(tmp_path)) <= 12
    assert all(cache.ENTRY.fullmatch(path.name) for path in tmp_path.iterdir())


def test_an_entry_that_is_removed_between_the_two_times_it_is_opened_is_not_there(kept, monkeypatch, capsys):
    def opens(*arguments):
        raise RuntimeError("unable to open file: No such file or directory (2)")  # as torch says it

    kept.put(kept.key(1), {"a": torch.zeros(1)})
    monkeypatch.setattr(cache, "safe_open", opens)
    assert kept.get(kept.key(1)) is None and capsys.readouterr().out == ""


def test_files_that_look_as_they_did_are_hashed_once_for_all_runs(kept, tmp_path, monkeypatch):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "weights").write_bytes(b"1234")
    known = digests.known_digest([tmp_path / "encoder"], kept)
    assert known == digests.digest_of_files([tmp_path / "encoder"])
    (tmp_path / "encoder" / "weights").write_bytes(b"12345")
    other = digests.known_digest([tmp_path / "encoder"], kept)
    assert other != known
    monkeypatch.setattr(digests, "digest_of_files", lambda places: 1 / 0)
    assert digests.known_digest([tmp_path / "encoder"], Cache(kept.folder)) == other


# ------------------------------------------------------------------------------------------------- embeddings
def equal(a, b):
    return torch.equal(a.txt, b.txt) and torch.equal(a.pooled, b.pooled) and a.truncated == b.truncated


def test_embeddings_are_the_same_from_the_cache_which_spares_the_encoders(kept, monkeypatch):
    long = "a red circle " * 20
    plain = flow.encode_prompts(Model("miniature"), [*PROMPTS, long])
    assert plain.truncated == 1
    first = flow.encode_prompts(Model("miniature"), [*PROMPTS, long], cache=kept)
    assert len(of_prompts(kept.folder)) == 3  # a text is there once
    monkeypatch.setattr(flux.Flux, "text_encoders", lambda *arguments: 1 / 0)
    again = flow.encode_prompts(Model("miniature"), [*PROMPTS, long], cache=kept)
    assert equal(first, plain) and equal(again, plain)


@pytest.mark.parametrize("cache", ["on", "off"])
def test_one_process_of_a_machine_loads_the_text_encoders(kept, monkeypatch, cache):
    """For the prompts of all. It hands out to each what it asked for, and nothing to one that needs none."""
    loaded = []
    load = flux.Flux.text_encoders
    monkeypatch.setattr(flux.Flux, "text_encoders", lambda *arguments: loaded.append(arguments) or load(*arguments))
    handed = []

    def from_the_first_here(function):
        if not handed:
            handed.extend(function())
        return handed.pop(0)

    asked = [["another machine's"]] * 2 + [[], PROMPTS[:1], PROMPTS[1:]]

    def process(rank):
        world = SimpleNamespace(neighbours=3, rank=rank, local=rank - 2, device="cpu", dtype=torch.float32,
                                gather=lambda value: asked, from_the_first_here=from_the_first_here)
        return flow.encode_here(Model("miniature"), asked[rank], world, kept if cache == "on" else Cache())

    none, *both = [process(rank) for rank in (2, 3, 4)]
    assert len(loaded) == 1 and none is None
    alone = [flow.encode_prompts(Model("miniature"), prompts) for prompts in asked[3:]]
    assert all(equal(a, b) for a, b in zip(both, alone, strict=True))


def test_only_what_is_missing_is_encoded(kept, monkeypatch):
    flow.encode_prompts(Model("miniature"), PROMPTS[:1], cache=kept)
    encoded = []
    encode = flux.Flux.encode_text

    def noted(pipe, prompt, most):
        encoded.append(prompt)
        return encode(pipe, prompt, most)

    monkeypatch.setattr(flux.Flux, "encode_text", noted)
    flow.encode_prompts(Model("miniature"), PROMPTS, cache=kept)
    assert set(encoded) == {PROMPTS[1]}


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "dtype"])
def test_another_encoder_has_other_embeddings(kept, tmp_path, part):
    model = tmp_path / "model"
    shutil.copytree("miniature", model, ignore=shutil.ignore_patterns("*.py", "reward*", "judge", ".build"))
    flow.encode_prompts(Model(model), PROMPTS, cache=kept)
    dtype = torch.bfloat16 if part == "dtype" else torch.float32
    if part != "dtype":
        (model / part / "note").write_text("other")
    flow.encode_prompts(Model(model), PROMPTS, dtype=dtype, cache=kept)
    assert len(of_prompts(kept.folder)) == 4
    (model / "vae" / "note").write_text("other")  # what makes no embedding does not matter
    flow.encode_prompts(Model(model), PROMPTS, dtype=dtype, cache=kept)
    assert len(of_prompts(kept.folder)) == 4


def test_the_home_is_used_for_full_size_models_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder_of("auto", is_full_size=True) == tmp_path / "srpo"
    assert cache.folder_of("auto", is_full_size=False) is None
    assert cache.folder_of(None, is_full_size=True) is None
    assert cache.folder_of(str(tmp_path / "new"), is_full_size=False) == str(tmp_path / "new")
    assert not list(tmp_path.iterdir()) and not flow.is_full_size(Model("miniature"))
