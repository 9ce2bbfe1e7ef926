"""Prompts out of files (.txt, .json, .jsonl, .csv), folders, or named sets on the hub."""

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import hf_hub_download

from engine.errors import UserError
from engine.hub import quiet
from engine.paths import not_a_path

KEYS = ("prompt", "text", "caption")  # what data sets call a prompt, the first that is there
LONGEST_PROMPT = 20_000  # characters; a text encoder reads some hundred words


# ---------------------------------------------------------------------------------------------------- prompts
class NamedSet(NamedTuple):
    """A set of prompts on the hub: the repository of the data set, and its files."""
    repository: str
    files: list


# The paper trains on the one and evaluates on the other (4.1, 4.2).
PROMPTS = {
    "hpdv2": NamedSet("ymhao/HPDv2", ["train.json"]),
    "hpdv2-benchmark": NamedSet("zhwang/HPDv2", ["benchmark/anime.json", "benchmark/concept-art.json",
                                                 "benchmark/paintings.json", "benchmark/photo.json"])}


class Prompt(NamedTuple):
    """A prompt, and the category it belongs to: the name of its file among several, or ""."""
    text: str
    category: str


def fetched_set(name, flag):
    """The local JSON files of a named set of PROMPTS, fetched from the hub. Raises UserError."""
    repository, files = PROMPTS[name]
    quiet()
    try:
        return [Path(hf_hub_download(repository, file, repo_type="dataset")) for file in files]
    except Exception as error:
        raise UserError(f"{flag} {name}: {repository} cannot be fetched ({type(error).__name__}); give a "
                        f"text file, one prompt a line, or a folder of its .json files") from error


def text_of(file, flag):
    """A file's text, UTF-8 with or without a byte order mark. Raises UserError."""
    if not file.is_file():  # reading from a pipe would wait for ever
        raise UserError(f"{flag} {file}: not a file")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{flag} {file}: cannot be read: {error.strerror}") from error
    if "\0" in text:
        raise UserError(f"{flag} {file}: holds a NUL character; it is not a text file")
    return text


def check_prompts(prompts, flag):
    """Raise UserError for a prompt that no text encoder reads."""
    for text in prompts:
        if "\0" in text or not is_unicode(text):
            raise UserError(f"{flag}: {text[:80]!r} is no text: it holds what is not a character")
        if len(text) > LONGEST_PROMPT:
            raise UserError(f"{flag}: a prompt of {len(text)} characters, which begins {text[:80]!r}; "
                            f"{LONGEST_PROMPT} are the most")


def is_unicode(text):
    """Whether a text holds nothing but characters: JSON and the command line may give halves of one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def prompts_of_json(file, flag):
    """The prompts of a JSON file: a list of them, or of objects with a "prompt"; blank ones are left out.
    Raises UserError."""
    try:
        entries = json.loads(text_of(file, flag))
        found = [entry if isinstance(entry, str) else entry["prompt"] for entry in entries]
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{flag} {file}: not a JSON list of prompts") from error
    if not isinstance(entries, list) or not all(isinstance(text, str) and "\0" not in text for text in found):
        raise UserError(f"{flag} {file}: not a JSON list of prompts")
    return [text for text in found if text.strip()]


def lines_of_jsonl(file, flag):
    """[(number, value)] of the lines of a .jsonl file, blank ones left out. Raises UserError for a line that
    is not JSON."""
    found = []
    # Not splitlines: JSON leaves a line break of Unicode, which it knows, as it is in a text.
    for number, line in enumerate(text_of(file, flag).split("\n"), 1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{flag} {file}: line {number} is not JSON; mend it, or take it "
                                "out") from error
    return found


def prompt_in(value):
    """The prompt of an object, under the first of KEYS that it has; None without one that is a text."""
    for key in KEYS:
        if isinstance(value.get(key), str):
            return value[key]
    return None


def prompts_of_jsonl(file, flag):
    """The prompts of a .jsonl file: a line is a text, or an object with one of KEYS. Raises UserError."""
    prompts = []
    for number, value in lines_of_jsonl(file, flag):
        text = prompt_in(value) if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise UserError(f'{flag} {file}: line {number} is no prompt; it must be a text, or an object '
                            'with a "prompt", "text" or "caption"')
        prompts.append(text)
    return prompts


def separator_of(header):
    """What separates the columns of a .csv file, from its first line: the one that yields a column called as
    one of KEYS; a comma if none does."""
    for separator in (",", ";", "\t"):
        if set(KEYS) & {name.strip(' "').lower() for name in header.split(separator)}:
            return separator
    return ","


def prompts_of_csv(file, flag):
    """The prompts of a .csv file: the column that its first row calls one of KEYS, in upper or lower case; or
    every row of a file of one column. Raises UserError."""
    text = text_of(file, flag)
    reader = csv.reader(io.StringIO(text), strict=True, delimiter=separator_of(text.split("\n")[0]))
    rows = []
    try:
        for row in reader:
            if row:
                rows.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(f"{flag} {file}: line {reader.line_num} is no row of a .csv file ({error}); mend it, "
                        "or take it out") from error
    if not rows:
        return []
    _, header = rows[0]
    names = [name.strip().lower() for name in header]
    known = [names.index(key) for key in KEYS if key in names]
    if not known and len(header) > 1:
        raise UserError(f"{flag} {file}: line 1 names no column prompt, text or caption; add such a header "
                        "(a prompt with a comma in it stands in quotes)")
    for number, row in rows:
        if len(row) != len(header):
            raise UserError(f"{flag} {file}: line {number} has {len(row)} columns, and the first one "
                            f"{len(header)}; a prompt with a comma in it stands in quotes")
    if known:
        return [row[known[0]] for _, row in rows[1:]]
    return [row[0] for _, row in rows]


def prompts_of_text(file, flag):
    """The lines of a text file. Raises UserError."""
    return text_of(file, flag).splitlines()


READERS = {".json": prompts_of_json, ".jsonl": prompts_of_jsonl, ".csv": prompts_of_csv}


def read_prompts_by_category(source, flag="--prompts"):
    """[`Prompt`] of a file, all of category "": a .json, .jsonl or .csv file, or UTF-8 text, one a line;
    blank ones are left out. Of a folder of .json files, a category each; or of a named set of PROMPTS,
    fetched from the hub.

    Raises UserError.
    """
    prompts = prompts_in(source, flag)
    check_prompts([prompt.text for prompt in prompts], f"{flag} {source}")
    return prompts


def prompts_in(source, flag):
    """`read_prompts_by_category`, before it is looked at."""
    why = not_a_path(source)
    if why:
        raise UserError(f'{flag} "{source[:80]}": must be a path, and it {why}')
    path = Path(source)
    if source in PROMPTS or path.is_dir():
        files = fetched_set(source, flag) if source in PROMPTS else sorted(path.glob("*.json"))
        prompts = []
        for file in files:
            prompts += [Prompt(text, file.stem) for text in prompts_of_json(file, flag)]
        if not prompts:
            raise UserError(f"{flag} {source}: no prompt in it (a folder of .json files, lists of prompts)")
        return prompts
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file (a text file, one prompt a line, a .json, .jsonl or "
                        f".csv), and not one of {', '.join(PROMPTS)}")
    read = READERS.get(path.suffix.lower(), prompts_of_text)
    texts = [text.strip() for text in read(path, flag)]
    if not any(texts):
        raise UserError(f"{flag} {path}: no prompt in it, every line is blank")
    return [Prompt(text, "") for text in texts if text]


def read_prompts(source, flag="--prompts"):
    """The texts of `read_prompts_by_category`; of a named set, each once."""
    texts = [prompt.text for prompt in read_prompts_by_category(source, flag)]
    return list(dict.fromkeys(texts)) if source in PROMPTS else texts
