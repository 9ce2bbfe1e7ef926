"""The paper's human evaluation (section 4.2, and the rubric of its appendix).

Two or more folders of pictures of the same prompts become one page. Raters open it in a browser. The votes that they
send back become a table.

    python -m evaluation.study base=samples/base srpo=samples/srpo --out study.html
    python -m evaluation.study tally votes/*.json --key study.key.json --bars bars.svg

A folder holds 00000.png, 00001.png, ... (or .jpg, .jpeg, .webp), where the number is the prompt's. It also holds
prompts.json, a list of {"prompt": ..., "category": ...}; entry i is the prompt of picture i. The page needs no server
and no network. It names no method: the file study.key.json says which method made a picture. The organiser keeps this
file. Each rater, by the typed name, gets their own order of prompts and pictures. For the second command's flags:
`python -m evaluation.study tally -h`. A folder with the name tally must be given as ./tally.
"""

import sys

from engine.command_line import Parser, some_path, whole
from engine.errors import frame
from evaluation.study import tally
from evaluation.study.page import build


def build_parser():
    """The flags of the first command, which makes the page from folders."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folders", nargs="*", metavar="NAME=FOLDER",
        help="pictures of one method; without NAME= the method has the folder's name")
    add("--out", type=some_path, default="study.html", help="the page; its key goes beside it (.key.json)")
    add("--prompts", type=some_path,
        help="text file, one prompt a line, for folders without prompts.json (None: all from prompts.json)")
    add("--per-category", type=whole(1), default=125,
        help="how many prompts of each category: the first that all folders have a picture of [paper 4.2]")
    add("--side", type=whole(64, 8192), default=768, help="longest side of a picture, pixels [ours]")
    add("--quality", type=whole(1, 95), default=85, help="of the JPEGs, 1 to 95 [ours]")
    add("--overwrite", action="store_true",
        help="replace the page and its key; votes from the old page are lost")
    return parser


def tally_parser():
    """The flags of the second command, which makes tables from votes."""
    parser = Parser(tally.__doc__, prog="python -m evaluation.study tally")
    add = parser.add_argument
    add("votes", nargs="+", type=some_path, help="files that raters saved from the page")
    add("--key", type=some_path, required=True, help="the study's key, written beside the page")
    add("--bars", type=some_path, help="SVG file for the shares of the four levels (None: not written)")
    add("--json", type=some_path, help="JSON file for all numbers (None: not written)")
    add("--overwrite", action="store_true", help="replace these files if they exist")
    return parser


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    with frame("study"):
        if argv[:1] == ["tally"]:
            tally.tally(tally_parser().parse_args(argv[1:]))
        else:
            build(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
