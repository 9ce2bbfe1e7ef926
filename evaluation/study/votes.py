"""The study's key and the raters' files of votes: reading, checking, and the paper's rule for Overall."""

from typing import NamedTuple

from engine.errors import UserError
from engine.files import read_json

LEVELS = ["Excellent", "Good", "Pass", "Fail"]
EXCELLENT, GOOD, PASS, FAIL = range(4)
DIMENSIONS = {"alignment": "Text-image alignment", "realism": "Realism and artifacts",
              "detail": "Subject clarity and detail", "aesthetics": "Aesthetics"}


class Picture(NamedTuple):
    """What the key says of a picture."""
    method: str
    prompt: int
    category: str


class Key(NamedTuple):
    """The key that `build` wrote beside the page."""
    study: str
    methods: list
    pictures: dict  # {name on the page: Picture}


class VoteFile(NamedTuple):
    """The file that one rater saved from the page."""
    annotator: str
    cast: dict  # {picture: {dimension: level's name}}


class Rating(NamedTuple):
    """The level of one rater for one picture in one dimension; "overall" is a dimension too."""
    annotator: str
    picture: str
    method: str
    prompt: int
    category: str
    dimension: str
    level: int  # an index of LEVELS; 0 is Excellent


# --------------------------------------------------------------------------------------------------- reading
def quoted(value):
    """A text from a file, in quotes and shortened; for another value, its type."""
    if not isinstance(value, str):
        return f"something that is no text ({type(value).__name__})"
    return f'"{value}"' if len(value) <= 80 else f'"{value[:79]}…"'


def all_text(values):
    return all(isinstance(value, str) for value in values)


def key_of(data):
    """A JSON value as a `Key`. Raises KeyError, TypeError or AttributeError if it is not a study's key."""
    pictures = {}
    for name, of in data["pictures"].items():
        if type(of["prompt"]) is not int or of["method"] not in data["methods"]:
            raise TypeError
        category = data["prompts"][str(of["prompt"])]["category"]
        pictures[name] = Picture(of["method"], of["prompt"], category)
    key = Key(data["study"], data["methods"], pictures)
    if not isinstance(key.methods, list) or not all_text([key.study, *key.methods]):
        raise TypeError
    if not all_text(picture.category for picture in pictures.values()):
        raise TypeError
    if len(set(key.methods)) < len(key.methods):
        raise TypeError
    return key


def read_key(path):
    """The `Key` in a file that `build` wrote. Raises UserError if it is not a study's key."""
    data = read_json(path)
    try:
        return key_of(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a study's key; python -m evaluation.study writes it beside the "
                        "page") from error


def read_vote_file(path, key):
    """The `VoteFile` of a rater. Raises UserError if the file holds something else, or is of another study."""
    data = read_json(path)
    if not isinstance(data, dict) or not all_text([data.get("study"), data.get("annotator")]):
        raise UserError(f"{path}: not a file of votes from the study's page")
    if not isinstance(data.get("votes"), dict) or not data["annotator"].strip():
        raise UserError(f"{path}: not a file of votes from the study's page")
    if data["study"] != key.study:
        raise UserError(f"{path}: votes of another study, {quoted(data['study'])}; the key is of "
                        f"{quoted(key.study)}")
    cast = {}
    for picture, cells in data["votes"].items():
        if picture not in key.pictures:
            raise UserError(f"{path}: votes for a picture that the study lacks, {quoted(picture)}")
        if not isinstance(cells, dict):
            raise UserError(f"{path}: {picture}: not {{dimension: level}}")
        for dimension, level in cells.items():
            if dimension not in DIMENSIONS or level not in LEVELS:
                raise UserError(f"{path}: {picture}: {quoted(dimension)} rated {quoted(level)}; dimensions "
                                f"are {', '.join(DIMENSIONS)}, levels {', '.join(LEVELS)}")
        if cells:
            cast[picture] = cells
    return VoteFile(data["annotator"].strip(), cast)


def read_votes(paths, key):
    """Files of raters -> {annotator: {picture: {dimension: level's name}}}. A file that is given twice counts once.
    Raises UserError if a rater's files contradict each other, or if there are no votes."""
    votes = {}
    origin = {}
    for path in paths:
        annotator, cast = read_vote_file(path, key)
        if annotator in votes and votes[annotator] != cast:
            raise UserError(f"{quoted(annotator)} votes differently in {origin[annotator]} and {path}; keep "
                            "the later file")
        votes.setdefault(annotator, cast)
        origin.setdefault(annotator, path)
    if not any(votes.values()):
        raise UserError("there are no votes in these files; give files that raters saved from the page")
    return votes


# --------------------------------------------------------------------------------------------------- ratings
def overall(levels):
    """The paper's rule: the level of Overall from the levels (0 Excellent to 3 Fail) of the four dimensions. The page
    applies the same rule."""
    excellent = levels.count(EXCELLENT)
    if FAIL in levels:
        return FAIL
    if excellent == len(levels):
        return EXCELLENT
    if 2 * excellent >= len(levels):
        return GOOD
    return PASS


def flatten(votes, key):
    """Votes -> list of `Rating`. A picture rated in all four dimensions also gets a rating of "overall"."""
    ratings = []
    for annotator, cast in votes.items():
        for name, cells in cast.items():
            picture = key.pictures[name]
            levels = {dimension: LEVELS.index(level) for dimension, level in cells.items()}
            if len(levels) == len(DIMENSIONS):
                levels["overall"] = overall(list(levels.values()))
            for dimension, level in levels.items():
                ratings.append(Rating(annotator, name, picture.method, picture.prompt, picture.category,
                                      dimension, level))
    return ratings
