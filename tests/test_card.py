"""Claims about what is shared: the model card beside the weights, the metadata in their files, and the upload."""

import re
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open
from test_train import SMALL

import command
import train
from engine import hub
from evaluation import card


class StandIn:
    """A hub's client that keeps what is asked of it. `fails` names the call that fails."""
    calls = []
    fails = None

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            if name == self.fails:
                raise OSError("no network")
        return call


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr(StandIn, "calls", [])
    monkeypatch.setattr(StandIn, "fails", None)
    monkeypatch.setattr(hub, "HfApi", StandIn)
    return StandIn


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--steps", "1", *map(str, argv)])
    train.main()


def test_a_lora_is_shared_with_its_card(client, monkeypatch, tmp_path):
    """The hub's head, the words, the picture, the table and the command; the same words in the files; all of it, and
    nothing else, is uploaded after the run, and only then."""
    out = tmp_path / "run"
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    run(monkeypatch, "--lora", 2, "--save-as", "kohya", "--push-to-hub", "me/mine", "--eval", 2, "--out", out,
        "--prompts", tmp_path / "prompts.txt")
    written = (out / "weights" / "README.md").read_text()
    head = ModelCard(written).data.to_dict()
    assert head == {"library_name": "diffusers", "pipeline_tag": "text-to-image",
                    "tags": ["text-to-image", "flux", "srpo", "lora"]}
    for part in ("# me/mine", '"realistic photo"', "![The same prompts and noise", 'load_lora_weights("me/mine")',
                 "| sgp ", "--lora 2", "max_sequence_length=16", "--prompts prompts.txt"):
        assert part in written, part
    assert str(tmp_path) not in written
    for name in ("pytorch_lora_weights", "kohya"):
        with safe_open(out / "weights" / f"{name}.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["modelspec.architecture"].endswith("/lora") and metadata["srpo.neg"] == "CG render"
        assert metadata["base_model"] == "miniature" and str(tmp_path) not in str(metadata)
    assert [call[0] for call in client.calls] == ["whoami", "create_repo", "upload_folder"]
    assert client.calls[-1][2]["repo_id"] == "me/mine" and client.calls[-1][2]["folder_path"] == out / "weights"
    assert set(client.calls[-1][2]["allow_patterns"]) == {path.name for path in (out / "weights").iterdir()}
    assert (out / "weights_best" / "README.md").exists()


REFUSED = {"no owner": ("mine", None, "is no name on the hub"), "a space": ("me/my own", None, "is no name on the hub"),
           "not logged in": ("me/mine", "whoami", "hf auth login"),
           "no right to write": ("you/yours", "create_repo", "does not let you write there")}


@pytest.mark.parametrize("name", REFUSED)
def test_who_may_not_upload_is_told_before_the_run(name, client, monkeypatch, tmp_path, capsys):
    repository, client.fails, words = REFUSED[name]
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--push-to-hub", repository, "--out", tmp_path / "run")
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and words in said and "\n" not in said and not (tmp_path / "run").exists()


def test_an_upload_that_fails_loses_nothing(client, tmp_path):
    client.fails = "upload_folder"
    with pytest.raises(hub.UserError, match="not uploaded .OSError.; everything is in .*; hf upload me/mine "):
        hub.push("me/mine", tmp_path, ["README.md"])


@pytest.mark.parametrize("argv, head", [
    ("--lora 32", {"base_model": "black-forest-labs/FLUX.1-dev", "base_model_relation": "adapter", "license": "other",
                   "license_name": card.OWN_LICENCE}),
    ("--model black-forest-labs/FLUX.1-schnell", {"base_model": "black-forest-labs/FLUX.1-schnell",
                                                  "base_model_relation": "finetune", "license": "apache-2.0"}),
    ("--model black-forest-labs/FLUX.2-klein-base-4B", {"license": "apache-2.0"})])
def test_a_card_names_its_base_and_its_licence(argv, head):
    a, model = command.read(argv.split())
    written = card.text(a, model, "me/mine", "", [], 19, False)
    data = ModelCard(written).data.to_dict()
    assert head.items() <= data.items() and "max_sequence_length" not in written
    assert card.about(a, model)["modelspec.license"] in (data.get("license_link"), data["license"])
    assert re.search(r"^pipe\((prompt=)?.a prompt., guidance_scale=", written, re.MULTILINE)
    assert ("prompt=" in written) == ("klein" in model.name)  # the first argument of its pipeline is a picture
    heading = f"# {model.name}, {'a LoRA' if a.lora else 'trained'} by SRPO, recipe released"
    for part in (heading, model.family.pipeline, "load_lora_weights" if a.lora else model.family.transformer):
        assert part in written
    assert ("klein" in model.name) == ("klein" in card.about(a, model)["modelspec.architecture"])


def test_a_card_that_train_py_did_not_write_stays(tmp_path, capsys):
    a, model = command.read(["--model", "miniature"])
    (tmp_path / "weights").mkdir()
    Path(tmp_path / "weights" / "README.md").write_text("mine")
    card.write(tmp_path / "weights", a, model, "", [], 1)
    assert (tmp_path / "weights" / "README.md").read_text() == "mine"
    assert "stays as it is" in capsys.readouterr().out


@pytest.mark.parametrize("given, shown", [("runs/mine", "runs/mine/weights"), ("{}/mine", "path/to/mine/weights")])
def test_a_card_loads_the_weights_from_where_they_are(given, shown, monkeypatch, tmp_path):
    """As the run's --out was given, so it is no name on the hub; of an absolute path only the end is shown."""
    a, model = command.read(["--model", "miniature", "--lora", "2"])
    monkeypatch.chdir(tmp_path)
    folder = Path(given.format(tmp_path)) / "weights"
    folder.mkdir(parents=True)
    card.write(folder, a, model, "", [], 1)
    assert f'load_lora_weights("{shown}")' in (folder / "README.md").read_text()
