"""Files of texts as people have them: lists and lines of JSON, tables, and lines. What looks like another of these than
its name says is refused."""

import csv
import io
import re
import unicodedata

from engine.errors import UserError, one_line
from engine.files import parsed

KEYS = ("prompt", "text", "caption")  # the keys of a prompt in data sets; the first one that exists is used


def text_of(file, flag):
    """A file's text, UTF-8 with or without byte order marks. Raises UserError."""
    if not file.is_file():  # reading from a pipe would wait forever
        raise UserError(f"{flag} {file}: not a file")
    try:
        text = file.read_text(encoding="utf-8").replace("\ufeff", "")  # joined files have one in the middle, too
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{flag} {file}: cannot be read: {error.strerror}") from error
    if "\0" in text:
        raise UserError(f"{flag} {file}: holds a NUL character; it is not a text file")
    if text.startswith("version https://git-lfs"):
        raise UserError(f"{flag} {file}: stands for a file that Git LFS keeps; run: git lfs pull")
    return text


def is_blank(text):
    """Whether nothing of a text can be seen: it is empty, or all spaces, control and invisible characters."""
    return all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text)


# ------------------------------------------------------------------------------------------------------- JSON
def items_of_json(file, flag):
    """[(number from 1, value)] of a JSON file that holds a list. Raises UserError."""
    text = text_of(file, flag)
    try:
        items = parsed(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {file}: not a JSON list of prompts ({one_line(error)})") from error
    if not isinstance(items, list):
        raise UserError(f"{flag} {file}: not a JSON list of prompts")
    return list(enumerate(items, 1))


def lines_of_jsonl(file, flag):
    """[(line number from 1, value)] of a .jsonl file; blank lines are left out. Raises UserError for a line that is
    not JSON."""
    found = []
    # Not splitlines: it also splits at line breaks such as U+2028, which may stand inside a JSON text.
    for number, line in enumerate(text_of(file, flag).split("\n"), 1):
        if line.strip():
            try:
                found.append((number, parsed(line)))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{flag} {file}: line {number} is not JSON ({one_line(error)}); fix it or "
                                "remove it") from error
    return found


def key_of(name):
    """The name of a column or of a key, in lower case; of KEYS also for their plurals."""
    name = name.strip(' "').lower()
    return name.removesuffix("s") if name.removesuffix("s") in KEYS else name


def prompt_in(value):
    """The prompt of an object: the first value under one of KEYS that is a text; None if there is none."""
    values = {key_of(key): text for key, text in value.items() if isinstance(text, str)}
    return next((values[key] for key in KEYS if key in values), None)


def prompts_of_items(items, where):
    """The prompts of [(number, value)], where a value is a text, or an object with one of KEYS. where: the beginning of
    the message of a UserError, which the number follows."""
    prompts = []
    for number, value in items:
        text = prompt_in(value) if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise UserError(f'{where} {number} is not a prompt; it must be a text, or an object with a "prompt", '
                            '"text" or "caption"')
        prompts.append(text)
    return prompts


def prompts_of_json(file, flag):
    """The prompts of a JSON file that holds a list. Raises UserError."""
    return prompts_of_items(items_of_json(file, flag), f"{flag} {file}: item")


def prompts_of_jsonl(file, flag):
    """The prompts of a .jsonl file. Raises UserError."""
    return prompts_of_items(lines_of_jsonl(file, flag), f"{flag} {file}: line")


# ----------------------------------------------------------------------------------------------------- tables
SEPARATORS = (",", ";", "\t", "|")  # of the columns of a table


def names_in(header, separator):
    """The names of the columns in the first line of a table, as `key_of`."""
    return [key_of(name) for name in header.split(separator)]


def separator_of(header, suffix):
    """The separator of the columns of a table: the one that splits its first line into columns of which one is called
    as one of KEYS. That of the file's suffix is tried first, and stands if none does."""
    own = "," if suffix == ".csv" else "\t"
    for separator in (own, *SEPARATORS):
        if set(KEYS) & set(names_in(header, separator)):
            return separator
    return own


def rows_of_table(file, flag):
    """[(line number, [cell])] of a table with separated columns, .csv or .tsv, its header first. Every row has as many
    cells as the header. Raises UserError."""
    text = text_of(file, flag)
    separator = separator_of(text.lstrip("\n").split("\n")[0], file.suffix.lower())
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator, skipinitialspace=True)
    rows = []
    try:
        for row in reader:
            if row:
                rows.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(f"{flag} {file}: line {reader.line_num} is not a row of a table ({error}); fix it "
                        "or remove it") from error
    for number, row in rows:
        if len(row) != len(rows[0][1]):
            raise UserError(f"{flag} {file}: line {number} has {len(row)} columns, and line 1 has "
                            f"{len(rows[0][1])}; put a prompt that contains a comma in quotes")
    return rows


def lines_of_table(file, flag):
    """[(line number, {name of a column: cell})] of a table. Raises UserError."""
    (_, header), *rows = rows_of_table(file, flag) or [(1, [])]
    names = [key_of(name) for name in header]
    return [(number, dict(zip(names, row, strict=True))) for number, row in rows]


def prompts_of_table(file, flag):
    """The prompts of a table: the column whose header is one of KEYS, as `key_of`. Raises UserError."""
    rows = rows_of_table(file, flag)
    if not rows:
        return []
    header = rows[0][1]
    names = [key_of(name) for name in header]
    known = next((key for key in KEYS if key in names), None)
    if known is None:
        raise UserError(f"{flag} {file}: line 1 names no column prompt, text or caption, it begins "
                        f"{header[0][:20]!r}; add such a header")
    if names.count(known) > 1:
        raise UserError(f"{flag} {file}: line 1 names two columns {known}; rename one")
    return [row[names.index(known)] for _, row in rows[1:]]


# ------------------------------------------------------------------------------------------------------ lines
NOT_LINES = re.compile(r"""[\[{][\[{\s]*(["']|$)|<(!doctype|html|\?xml)|sep=.$""", re.IGNORECASE)
IN_QUOTES = re.compile(r'".*",?')


def prompts_of_text(file, flag):
    """The lines of a text file. Raises UserError for one that looks like something else."""
    # Not splitlines: it also splits at characters such as U+2028, which may stand inside a prompt.
    lines = [line for line in text_of(file, flag).split("\n") if not is_blank(line)]
    must_be_lines(lines, f"{flag} {file}")
    return lines


def must_be_lines(lines, where):
    """Raise UserError if the lines of a text are no prompts: it looks like a table, or like JSON, HTML or XML. where:
    the beginning of its message."""
    first = lines[0].strip() if lines else ""
    if len(lines) > 1 and key_of(first) in KEYS:
        raise UserError(f"{where}: line 1, {first}, names a column; remove it, or name the file .csv")
    if looks_like_a_table(lines):
        raise UserError(f"{where}: looks like a table; name it .csv or .tsv, with a column prompt, text or caption in "
                        "line 1; or remove what is not a prompt")
    if NOT_LINES.match(first) or lines and all(IN_QUOTES.fullmatch(line.strip()) for line in lines):
        raise UserError(f"{where}: holds JSON or the like, its line 1 begins {first[:20]}; name it .json, .jsonl or "
                        ".csv, or give one prompt a line")


def looks_like_a_table(lines):
    """Whether the first of the lines names columns, one of them as one of KEYS, and all others have as many; or whether
    every line has a tab inside."""
    for separator in SEPARATORS:
        names = names_in(lines[0], separator) if lines else []
        if len(names) > 1 and set(KEYS) & set(names) and len(lines) > 1:
            try:
                rows = list(csv.reader(lines, delimiter=separator))
            except csv.Error:
                continue
            if all(len(row) == len(names) for row in rows):
                return True
    return bool(lines) and all("\t" in line.strip() for line in lines)


READERS = {".json": prompts_of_json, ".jsonl": prompts_of_jsonl, ".ndjson": prompts_of_jsonl,
           ".csv": prompts_of_table, ".tsv": prompts_of_table, ".tab": prompts_of_table,
           **dict.fromkeys(["", ".txt", ".text", ".prompt", ".prompts"], prompts_of_text)}
