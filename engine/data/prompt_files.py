"""Prompts from files (.txt, .json, .jsonl, .csv, .tsv), from folders, or from named data sets on the hub."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

from engine.data.text_files import READERS, is_blank, prompts_of_json
from engine.errors import UserError
from engine.files import is_unicode
from engine.hub import quiet
from engine.paths import not_a_path

LONGEST_PROMPT = 20_000  # characters; a text encoder reads at most a few hundred words


class NamedSet(NamedTuple):
    """A set of prompts on the hub: the repository of the data set, and its files."""
    repository: str
    files: list


# The paper trains on hpdv2 (section 4.1) and evaluates on hpdv2-benchmark (section 4.2).
PROMPTS = {
    "hpdv2": NamedSet("ymhao/HPDv2", ["train.json"]),
    "hpdv2-benchmark": NamedSet("zhwang/HPDv2", ["benchmark/anime.json", "benchmark/concept-art.json",
                                                 "benchmark/paintings.json", "benchmark/photo.json"])}


class Prompt(NamedTuple):
    """A prompt and its category: the name of its file, if there are several files; otherwise ""."""
    text: str
    category: str


def fetched_set(name, flag):
    """The local JSON files of a named set of PROMPTS, fetched from the hub. Raises UserError."""
    repository, files = PROMPTS[name]
    quiet()
    try:
        folder = Path(snapshot_download(repository, allow_patterns=files, repo_type="dataset"))
        for file in files:
            if not (folder / file).is_file():  # without a network: only some of them were fetched before
                raise FileNotFoundError(file)
        return [folder / file for file in files]
    except Exception as error:
        raise UserError(f"{flag} {name}: {repository} cannot be fetched ({type(error).__name__}); give a "
                        f"text file, one prompt a line, or a folder of its .json files") from error


def check_prompts(prompts, flag):
    """Raise UserError for a prompt that a text encoder cannot read."""
    for text in prompts:
        if "\0" in text or not is_unicode(text):
            raise UserError(f"{flag}: {text[:80]!r} is no text: it holds a NUL or half of a surrogate pair; remove it")
        if len(text) > LONGEST_PROMPT:
            raise UserError(f"{flag}: a prompt of {len(text)} characters, which begins {text[:80]!r}; "
                            f"at most {LONGEST_PROMPT} are allowed")


def read_prompts_by_category(source, flag="--prompts"):
    """A list of `Prompt` from a source; blank prompts are left out. The source is one of:

    a .json, .jsonl, .csv or .tsv file, or UTF-8 text with one prompt a line: every category is "";
    a folder of .json files, or a named set of PROMPTS, fetched from the hub: each file is a category.

    Raises UserError.
    """
    prompts = prompts_in(source, flag)
    check_prompts([prompt.text for prompt in prompts], f"{flag} {source}")
    return prompts


def prompts_in(source, flag):
    """`read_prompts_by_category`, without its check of the prompts."""
    why = not_a_path(source)
    if why:
        raise UserError(f'{flag} "{source[:80]}": must be a path, and it {why}')
    path = Path(source)
    if source in PROMPTS and path.exists():
        raise UserError(f"{flag} {source}: a data set on the hub, and here a file or folder; give ./{source} for this "
                        "one, or rename it")
    if source in PROMPTS or path.is_dir():
        files = fetched_set(source, flag) if source in PROMPTS else files_of(path, flag)
        prompts = []
        for file in files:
            prompts += [Prompt(text, file.stem) for text in prompts_of_json(file, flag) if not is_blank(text)]
        if not prompts:
            raise UserError(f"{flag} {source}: no prompt in it; its .json files must be lists of prompts")
        return prompts
    if not path.is_file():
        why = "not a file" if path.exists() else "no such file"
        raise UserError(f"{flag} {source}: {why} (a text file, one prompt a line, a .json, .jsonl, .csv or .tsv), and "
                        f"not one of {', '.join(PROMPTS)}")
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{flag} {source}: ends in {path.suffix}, which is not read; give a .txt, one prompt a line, "
                        "or a .json, .jsonl, .csv or .tsv")
    texts = [text.strip() for text in read(path, flag)]
    texts = [text for text in texts if not is_blank(text)]
    if not texts:
        raise UserError(f"{flag} {source}: no prompt in it, every line is blank")
    return [Prompt(text, "") for text in texts]


def files_of(folder, flag):
    """The .json files in a folder, sorted. Raises UserError if other files that may hold prompts are in it."""
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    lists = [file for file in files if file.suffix.lower() == ".json"]
    others = [file for file in files if file.suffix and file.suffix.lower() in READERS and file not in lists]
    if others:
        raise UserError(f"{flag} {folder}: {others[0].name} is no .json, and of a folder only these are read; give "
                        "that file, or move it")
    return lists


def read_prompts(source, flag="--prompts"):
    """The texts of `read_prompts_by_category`. In a named set a text may occur more than once; it is returned once."""
    texts = [prompt.text for prompt in read_prompts_by_category(source, flag)]
    return list(dict.fromkeys(texts)) if source in PROMPTS else texts
