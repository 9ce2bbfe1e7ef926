"""Prompts from files (.txt, .json, .jsonl, .csv, .tsv), from folders, or from named data sets on the hub."""

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

from engine.errors import UserError
from engine.files import is_unicode
from engine.hub import quiet
from engine.paths import not_a_path

KEYS = ("prompt", "text", "caption")  # the keys of a prompt in data sets; the first one that exists is used
LONGEST_PROMPT = 20_000  # characters; a text encoder reads at most a few hundred words


# ---------------------------------------------------------------------------------------------------- prompts
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


def text_of(file, flag):
    """A file's text, UTF-8 with or without a byte order mark. Raises UserError."""
    if not file.is_file():  # reading from a pipe would wait forever
        raise UserError(f"{flag} {file}: not a file")
    try:
        text = file.read_text(encoding="utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{flag} {file}: cannot be read: {error.strerror}") from error
    if "\0" in text:
        raise UserError(f"{flag} {file}: holds a NUL character; it is not a text file")
    return text


def check_prompts(prompts, flag):
    """Raise UserError for a prompt that a text encoder cannot read."""
    for text in prompts:
        if "\0" in text or not is_unicode(text):
            raise UserError(f"{flag}: {text[:80]!r} is no text: it holds a NUL or half of a surrogate pair; remove it")
        if len(text) > LONGEST_PROMPT:
            raise UserError(f"{flag}: a prompt of {len(text)} characters, which begins {text[:80]!r}; "
                            f"at most {LONGEST_PROMPT} are allowed")


def items_of_json(file, flag):
    """[(number from 1, value)] of a JSON file that holds a list. Raises UserError."""
    text = text_of(file, flag)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {file}: not a JSON list of prompts") from error
    if not isinstance(items, list):
        raise UserError(f"{flag} {file}: not a JSON list of prompts")
    return list(enumerate(items, 1))


def prompts_of_json(file, flag):
    """The prompts of a JSON file: a list of texts, or of objects with one of KEYS. Blank prompts are left out. Raises
    UserError."""
    found = []
    for _, item in items_of_json(file, flag):
        text = prompt_in(item) if isinstance(item, dict) else item
        if not isinstance(text, str) or "\0" in text:
            raise UserError(f"{flag} {file}: not a JSON list of prompts")
        found.append(text)
    return [text for text in found if text.strip()]


def lines_of_jsonl(file, flag):
    """[(line number from 1, value)] of a .jsonl file; blank lines are left out. Raises UserError for a line that is
    not JSON."""
    found = []
    # Not splitlines: it also splits at line breaks such as U+2028, which may stand inside a JSON text.
    for number, line in enumerate(text_of(file, flag).split("\n"), 1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{flag} {file}: line {number} is not JSON; fix it or "
                                "remove it") from error
    return found


def prompt_in(value):
    """The prompt of an object: the first value under one of KEYS that is a text; None if there is none."""
    for key in KEYS:
        if isinstance(value.get(key), str):
            return value[key]
    return None


def prompts_of_jsonl(file, flag):
    """The prompts of a .jsonl file, in which a line is a text, or an object with one of KEYS. Raises UserError."""
    prompts = []
    for number, value in lines_of_jsonl(file, flag):
        text = prompt_in(value) if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise UserError(f'{flag} {file}: line {number} is not a prompt; it must be a text, or an object '
                            'with a "prompt", "text" or "caption"')
        prompts.append(text)
    return prompts


SEPARATORS = (",", ";", "\t", "|")  # of the columns of a table


def names_in(header, separator):
    """The names of the columns in the first line of a table, in lower case."""
    return [name.strip(' "').lower() for name in header.split(separator)]


def separator_of(header, suffix):
    """The separator of the columns of a table: the first of SEPARATORS that splits its first line into columns of which
    one is called as one of KEYS; otherwise that of the file's suffix."""
    for separator in SEPARATORS:
        if set(KEYS) & set(names_in(header, separator)):
            return separator
    return "," if suffix == ".csv" else "\t"


def prompts_of_table(file, flag):
    """The prompts of a table with separated columns, .csv or .tsv: the column whose header is one of KEYS, in upper or
    lower case; or every row of a file with a single column. Raises UserError."""
    text = text_of(file, flag)
    separator = separator_of(text.split("\n")[0], file.suffix.lower())
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    rows = []
    try:
        for row in reader:
            if row:
                rows.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(f"{flag} {file}: line {reader.line_num} is not a row of a .csv file ({error}); fix it "
                        "or remove it") from error
    if not rows:
        return []
    _, header = rows[0]
    names = [name.strip().lower() for name in header]
    known = [names.index(key) for key in KEYS if key in names]
    if not known and len(header) > 1:
        raise UserError(f"{flag} {file}: line 1 names no column prompt, text or caption; add such a header "
                        "(put a prompt that contains a comma in quotes)")
    if known and names.count(names[known[0]]) > 1:
        raise UserError(f"{flag} {file}: line 1 names two columns {names[known[0]]}; rename one")
    for number, row in rows:
        if len(row) != len(header):
            raise UserError(f"{flag} {file}: line {number} has {len(row)} columns, and line 1 has "
                            f"{len(header)}; put a prompt that contains a comma in quotes")
    if known:
        return [row[known[0]] for _, row in rows[1:]]
    return [row[0] for _, row in rows]


def prompts_of_text(file, flag):
    """The lines of a text file. Raises UserError for one that looks like a table or like JSON."""
    text = text_of(file, flag)
    # Not splitlines: it also splits at characters such as U+2028, which may stand inside a prompt.
    lines = [line for line in text.split("\n") if line.strip()]
    if looks_like_a_table(lines):
        raise UserError(f"{flag} {file}: looks like a table, whose line 1 names a column prompt, text or caption; name "
                        "it .csv or .tsv, or remove that line")
    if lines and lines[0].lstrip()[0] in "[{" and is_json(text, lines):
        raise UserError(f"{flag} {file}: holds JSON; name it .json, or .jsonl if every line is a value")
    return lines


def looks_like_a_table(lines):
    """Whether the first of the lines names columns, one of them as one of KEYS, and all others have as many."""
    for separator in SEPARATORS:
        names = names_in(lines[0], separator) if lines else []
        if len(names) > 1 and set(KEYS) & set(names) and len(lines) > 1:
            try:
                rows = list(csv.reader(lines, delimiter=separator))
            except csv.Error:
                continue
            if all(len(row) == len(names) for row in rows):
                return True
    return False


def is_json(text, lines):
    """Whether a text, or the first of its lines, is a JSON value."""
    for part in (text, lines[0]):
        try:
            json.loads(part)
            return True
        except (ValueError, RecursionError):
            pass
    return False


READERS = {".json": prompts_of_json, ".jsonl": prompts_of_jsonl, ".csv": prompts_of_table,
           ".tsv": prompts_of_table, ".tab": prompts_of_table}


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
    if source in PROMPTS or path.is_dir():
        files = fetched_set(source, flag) if source in PROMPTS else sorted(path.glob("*.json"))
        prompts = []
        for file in files:
            prompts += [Prompt(text, file.stem) for text in prompts_of_json(file, flag)]
        if not prompts:
            raise UserError(f"{flag} {source}: no prompt in it; its .json files must be lists of prompts")
        return prompts
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file (a text file, one prompt a line, a .json, .jsonl, "
                        f".csv or .tsv), and not one of {', '.join(PROMPTS)}")
    read = READERS.get(path.suffix.lower(), prompts_of_text)
    texts = [text.strip() for text in read(path, flag)]
    if not any(texts):
        raise UserError(f"{flag} {path}: no prompt in it, every line is blank")
    return [Prompt(text, "") for text in texts if text]


def read_prompts(source, flag="--prompts"):
    """The texts of `read_prompts_by_category`. In a named set a text may occur more than once; it is returned once."""
    texts = [prompt.text for prompt in read_prompts_by_category(source, flag)]
    return list(dict.fromkeys(texts)) if source in PROMPTS else texts
