"""Claim: a mistake of the user, or a file of a stranger, ends in one clear line and exit status 2: nothing is
created, changed or run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from builders import make_foreign_reward, photo
from safetensors.torch import load_file, save_file
from scripts import call

import command
import evaluate
import sample
import train
from engine import merge
from engine.data import prompt_files
from engine.errors import frame
from engine.memory import parallel
from engine.model.folder import Model
from evaluation import film
from experiments import bench
from miniature import build

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--model", "miniature", "--steps", "1", "--global-batch", "1", "--rollout-steps", "1", "--eval-steps", "1",
         "--watch", "1", "--eval", "0"]
FLUX_DEV = "black-forest-labs/FLUX.1-dev"


# ------------------------------------------------------------------------------------------- the table's form
class Mistake(NamedTuple):
    """A script and its flags, in the folder of `place`, behind those of START; what its one line says; its
    exit status. Nothing in the folder may change, and no planted code may run."""
    script: str
    flags: str | list  # a list where a flag's value has a space in it, or is empty
    words: str
    status: int = 2
    change: Callable = None  # of a copy of the miniature, which is then the --model

    @property
    def argv(self):
        flags = self.flags.split() if isinstance(self.flags, str) else self.flags
        return [*START[self.script], *flags]


def main_of_build():
    with frame("build"):
        build.main()


MAIN = {"train.py": train.main, "sample.py": sample.main, "evaluate.py": evaluate.main, "bench": bench.main,
        "build": main_of_build}
START = {"train.py": [*SMALL, "--out", "new"],
         "sample.py": ["--model", "miniature", "--eval-steps", "1", "--first", "1", "--out", "new"],
         "evaluate.py": ["--model", "miniature", "--eval-steps", "1", "--first", "1", "--metrics",
                         "statistics", "--out", "new"],
         "bench": SMALL,
         "build": []}
TRAINS = ("train.py", "bench")
SAMPLES = ("sample.py", "evaluate.py")
ALL = (*TRAINS, *SAMPLES)


def each(scripts, flags, words):
    """The same mistake with several scripts."""
    return [Mistake(script, flags, words) for script in scripts]


# --------------------------------------------------------------------------------------- flags, before a file
NUMBERS = {  # every float flag, and how many numbers it takes
    "lr": 1, "weight-decay": 1, "clip": 1, "rollout-guidance": 1, "shift": 1, "sigma-range": 2,
    "groundtruth-ratio": 1, "guidance": 1, "lam": 2, "cfg-k": 1, "discount-denoise": 2, "discount-invert": 2,
    "threshold": 1, "drift-band": 4, "share": 1}
WHOLE_NUMBERS = ("size steps batch global-batch rollout-steps injections eval-steps watch watch-every "
                 "save-every keep replicas world-size").split()
FLAGS = []
for flag, n in NUMBERS.items():
    for value in ("nan", "inf", "-inf", "1e999", "1e300", "-", ""):
        FLAGS.append(Mistake("train.py", [f"--{flag}={value}"] if n == 1 else [f"--{flag}", *[value] * n],
                             "" if n > 1 and value in ("-", "-inf") else f"--{flag} {value}: must be"))
for flag in WHOLE_NUMBERS:
    for value in ("0", "-1", str(2**63), "1.5", ""):
        FLAGS.append(Mistake("train.py", [f"--{flag}={value}"], f"--{flag} {value}: must be a whole number"))
for script in SAMPLES:
    for flag in ("first", "size", "eval-steps", "batch"):
        for value in ("0", "-1", str(2**63), "1.5", ""):
            FLAGS.append(Mistake(script, [f"--{flag}={value}"], f"--{flag} {value}: must be a whole number"))
    for value in ("-1", str(2**32), str(2**63), "x"):  # torch's generator on a CPU takes no more than 32 bits
        FLAGS.append(Mistake(script, [f"--seed={value}"], f"--seed {value}: must be a whole number"))
    for value in ("nan", "inf", "-1", "1e300", ""):
        FLAGS.append(Mistake(script, [f"--guidance={value}"], f"--guidance {value}: must be a finite number"))
FLAGS += [
    Mistake("train.py", "--seed=-1", "--seed -1: must be"),
    Mistake("train.py", f"--seed={2**63}", "must be a whole number, from 0 to 2147483647"),
    Mistake("train.py", "--lr 0", "--lr 0: must be a finite number, above 0"),
    Mistake("train.py", "--shift 0", "--shift 0: must be a finite number, at least 0.001"),
    Mistake("train.py", "--steps many", "--steps many: must be a whole number"),
    Mistake("train.py", "--cells 19", "--cells 19: must be a whole number, at least 20"),
    Mistake("train.py", "--steps 1000000 --global-batch 1000",
            "--steps 1000000: with 1000 images an update"),
    Mistake("train.py", "--groundtruth-ratio 1.5", "--groundtruth-ratio 1.5: must be a finite number"),
    Mistake("train.py", "--sigma-range 0.5 0.9", "give MAX then MIN"),
    Mistake("train.py", "--sigma-range 0.5 0.5", "give MAX then MIN"),
    Mistake("train.py", "--sigma-range 0.5 0.4999999999", "0.001 apart at least"),
    Mistake("train.py", "--sigma-range 1.0 0.5",
            "--sigma-range 1.0: must be a finite number, at least 0 and below 1"),
    Mistake("train.py", "--lam 0 0", "--lam 0 0: every loss would be 0"),
    Mistake("train.py", "--discount-denoise -1.5 0.2", "--discount-denoise -1.5: must be"),
    Mistake("train.py", "--branches sideways", "must be denoise, invert"),
    Mistake("train.py", "--branches denoise,denoise", "must be denoise, invert or denoise,invert"),
    Mistake("train.py", ["--branches", ""], "must be words"),
    *(Mistake("train.py", [f"--{flag}", "x"], f"--{flag}: invalid choice: 'x'")
      for flag in ("noise", "meet", "recover", "form", "recipe")),
    Mistake("train.py", "--plan --card B7", "--card B7: its peak is not known here; known are H200"),
    Mistake("train.py", "--card B7", "--card B7: its peak is not known here"),
    Mistake("train.py", "--replicas 2", "does not divide"),
    Mistake("train.py", "--plan --global-batch 8 --replicas 3", "--replicas 3: does not divide the 8 processes"),
    Mistake("train.py", "--resume --overwrite", "give one"),
    Mistake("train.py", "--resume --explain", "new/weights without --resume"),
    # words
    Mistake("train.py", ["--control", ""], "--control"),
    *(Mistake("train.py", [flag, words], "must be words") for flag in ("--control", "--neg")
      for words in ("!!!", "photo, ...", "\U0001f98a")),
    Mistake("train.py", ["--neg", "CG render, "], "must be words, none of them empty"),
    Mistake("train.py", ["--control", "a\x1b[2J"], "must be words"),
    Mistake("train.py", ["--control", "a\nb"], "must be words"),
    Mistake("train.py", ["--control", "x" * 5000], "must be words"),
    *(Mistake(script, ["--control", "a photo", "--neg", neg], "the same words are wanted and unwanted")
      for script in (*TRAINS, "evaluate.py") for neg in ("a photo", " a photo ", "A  Photo")),
    Mistake("train.py", "--control a,b --neg c,B", "the same words"),
    Mistake("evaluate.py", ["--control", " "], "must be words"),
    Mistake("evaluate.py", ["--neg", ""], "must be words"),
    # sizes and other things that no script does
    *each(ALL, "--size 60", "60 x 60: both sides must be multiples of 16"),
    *each(ALL, "--size 0", "--size 0: must be a whole number, at least 1"),
    *each(ALL, "--size 65536", "at most 16384 pixels a side"),
    *each(ALL, "--no-such-flag", "unrecognized arguments"),
    Mistake("train.py", "--size 32", "the judge in miniature sees 64 x 64 pixels"),
    Mistake("bench", "--json text.txt", "--json text.txt: exists already; give another name"),
    Mistake("bench", "--json nowhere/x.json", "there is no folder nowhere"),
    Mistake("bench", "--repeats 0", "--repeats 0: must be a whole number, at least 1"),
    Mistake("bench", f"--repeats {2**63}", "--repeats"),
    *(Mistake("bench", flag, f"{flag.split()[0]}: an update is timed here")
      for flag in ("--plan", "--explain", "--resume", "--overwrite", "--out new", "--weights x")),
    Mistake("bench", "--lr nan", "--lr nan: must be"),
    Mistake("build", "--threads 0", "--threads 0: must be a whole number"),
    Mistake("build", f"--threads {2**31}", "--threads"),
    Mistake("build", "--stage nothing", "--stage: invalid choice"),
    Mistake("build", "extra", "unrecognized arguments: extra"),
    *(Mistake("build", f"--stage export --out {out}", words) for out, words in (
        ("folder", "is not the folder of a build, and not empty"), ("text.txt", "Not a directory"),
        ("built", "vae: is a link, which is not followed"))),
    Mistake("build", "--quick", "the toy would overwrite the miniature; give another --out"),
]

# -------------------------------------------------------------------------------------------- paths and files
PROMPTS = {  # the content of a file, or {file: content} of a folder; what is said
    "empty.txt": (b"", "every line is blank"),
    "blank.txt": (b" \n\n\t", "every line is blank"),
    "mark.txt": (b"\xef\xbb\xbf", "every line is blank"),
    "latin.txt": (b"caf\xe9\n", "not UTF-8 text (byte 3)"),
    "wide.txt": ("a fox".encode("utf-16"), "not UTF-8 text"),
    "nul.txt": (b"a\0b\n", "holds a NUL character"),
    "long.txt": (b"fox " * 9999, "a prompt of 39995 characters"),
    "half.json": (b'["\\ud800"]', "is no text"),
    "object.json": (b'{"a fox": 1}', "not a JSON list of prompts"),
    "text.json": (b'"a fox"', "not a JSON list of prompts"),
    "nested.json": (b'[["a fox"]]', "item 1 is not a prompt; it must be a text, or an object"),
    "deep.json": (b"[" * 100_000, "not a JSON list of prompts"),
    "nul.json": (b'["a\\u0000b"]', "is no text: it holds a NUL"),
    "none.json": (b'["", " "]', "no prompt in it"),
    "cut.jsonl": (b'"a fox"\n{"prompt": "a d', "cut.jsonl: line 2 is not JSON (Unterminated string"),
    "other.jsonl": (b'\n{"words": "a fox"}\n', "line 2 is not a prompt; it must be a text, or an object with"),
    "number.jsonl": (b'{"prompt": 3}', "line 1 is not a prompt"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is not JSON"),
    "half.jsonl": (b'"\\ud800"', "is no text"),
    "none.jsonl": (b'""\n{"text": " "}\n', "no prompt in it"),
    "header.csv": (b"id,words\n1,a fox\n", "line 1 names no column prompt, text or caption"),
    "comma.csv": (b"prompt\na fox\na dog, asleep\n", "line 3 has 2 columns, and line 1 has 1"),
    "quote.csv": (b'id,prompt\n1,"a fox\n', "line 2 is not a row of a table (unexpected end of data)"),
    "large.csv": (b"prompt\n" + b"x" * 200_000, "line 2 is not a row of a table (field larger than"),
    "none.csv": (b"id,prompt\n1, \n", "no prompt in it"),
    "empty.csv": (b"", "no prompt in it"),
    "twice.csv": (b"prompt,Prompt\na fox,a dog\n", "line 1 names two columns prompt; rename one"),
    "header.tsv": (b"id\twords\n1\ta fox\n", "line 1 names no column prompt, text or caption"),
    **{f"table.{suffix}": (f"Prompt{separator}Category\na fox{separator}Abstract\n".encode(), "looks like a table")
       for suffix, separator in (("txt", "\t"), ("text", ","), ("text.txt", "|"), ("x.text", ";"))},
    **{f"list.{suffix}": (b"a fox\n", f"ends in .{suffix}, which is not read; give a .txt, one prompt a line")
       for suffix in ("yaml", "md", "html", "parquet", "gz", "dat")},
    "tabs.txt": (b"1\ta fox\n2\ta dog\n", "looks like a table; name it .csv or .tsv"),
    "header.txt": (b"Prompts\na fox\n", "line 1, Prompts, names a column; remove it"),
    "page.txt": (b"<!DOCTYPE html>\n<p>404</p>\n", "holds JSON or the like, its line 1 begins <!DOCTYPE html>"),
    "quoted.txt": (b'"a fox"\n"a dog"\n', "holds JSON or the like"),
    "comma.txt": (b'{"prompt": "a fox",}\n{"prompt": "a dog",}\n', "holds JSON or the like"),
    "lines.csv": (b'{"prompt": "a fox"}\n', "line 1 names no column prompt, text or caption"),
    "excel.csv": (b"sep=;\nid;prompt\n1;a fox\n", "text or caption, it begins 'sep=;'; add such a header"),
    "column.csv": (b"description\na fox\n", "line 1 names no column prompt, text or caption, it begins 'description'"),
    "column.tsv": (b"a fox\na dog\n", "line 1 names no column prompt, text or caption, it begins 'a fox'"),
    "pointer.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run: git lfs pull"),
    "unseen.txt": ("\u200b\n\u00a0\n\ufeff\n".encode(), "every line is blank"),
    "twice.json": (b'[{"prompt": "a fox", "prompt": "a dog"}]', "not a JSON list of prompts (the key 'prompt' twice)"),
    "twice.jsonl": (b'{"text": "a fox", "text": "a dog"}\n', "line 1 is not JSON (the key 'text' twice)"),
    "hpdv2": (b"a fox\n", "a data set on the hub, and here a file or folder; give ./hpdv2"),
    "mixed": ({"a.json": b'["a fox"]', "b.txt": b"a dog"}, "b.txt is no .json, and of a folder only these are read"),
    "json.txt": (b'["a fox", "a dog"]', "holds JSON or the like"),
    "jsonl.txt": (b'{"prompt": "a fox"}\n{"prompt": "a dog"}\n', "holds JSON or the like"),
    "\udcff.txt": (None, "is no UTF-8 text"),
    "sets": ({"a.json": b"[]"}, "no prompt in it"),
    "others": ({"a.json": b'{"prompt": "a fox"}'}, "a.json: not a JSON list of prompts"),
    "pipes": (None, "a.json: not a file"),
    "pipe": (None, "pipe: not a file"),
    "/dev/zero": (None, "/dev/zero: not a file"),
    "no.txt": (None, "--prompts no.txt: no such file"),
    "x" * 300: (None, "is too long"),
    "": (None, "is empty")}

METADATA = "metadata.jsonl"
PHOTOGRAPHS = {  # {file: content} of a folder, None a picture of 64 x 64 pixels; what is said
    "no captions": ({"a.png": None, "b/c.png": None}, "no caption for any of its 2 pictures; write"),
    "blank captions": ({"a.png": None, "a.txt": b" \n"}, "no caption for any of its 1 pictures"),
    "no pictures": ({"a.txt": b"a fox", ".a.png": None}, "no picture in it (.jpg"),
    "corrupt": ({"a.png": b"\x89PNG", "a.txt": b"a fox", "b.png": None},
                "none of its 2 pictures can be trained on, such as a.png: cannot be read as a picture"),
    "bad line": ({"a.png": None, METADATA: b'{"file_name": "a.png", "text": "a fox"}\n{"file'},
                 "metadata.jsonl: line 2 is not JSON (Unterminated string starting at: line 1 column 2 (char 1)); fix"),
    "two rows": ({"a.png": None, METADATA: b'{"file_name": "a.png", "text": "a fox"}\n{"file_name": "./a.png"}'},
                 "line 2 is another caption of ./a.png; keep one"),
    "one key twice": ({"a.png": None, METADATA: b'{"file_name": "a.png", "text": "a fox", "text": "a dog"}'},
                      "line 1 is not JSON (the key 'text' twice)"),
    "two rows of a table": ({"a.png": None, "metadata.csv": b"file_name,text\na.png,a fox\na.png,a dog\n"},
                            "line 3 is another caption of a.png; keep one"),
    "two pictures": ({"a.png": None, "a.jpg": None, "a.txt": b"a fox"}, "a.txt: beside both a.jpg and a.png"),
    "other names": ({"a.png": None, METADATA: b'{"file_name": "b.png", "text": "a fox"}'},
                    "no caption for any of its 1 pictures, and no picture for any of the 1 names in metadata.jsonl, "
                    "such as b.png"),
    "no list": ({"a.png": None, "metadata.json": b'{"file_name": "a.png", "text": "a fox"}'}, "not a JSON list"),
    "no name": ({"a.png": None, METADATA: b'{"text": "a fox"}'}, "line 1 must be an object with a"),
    "pipe": (None, "no such folder"), "text.txt": (None, "no such folder"), "": (None, "no such folder"),
    "x" * 300: (None, "no such folder")}

WEIGHTS = {  # what --weights may be; what is said
    "no": "no transformer there: no such file or folder; give ", "": "a path or a hub id, and it is empty",
    "x" * 300: "is too long", "pipe": "no transformer there: a file without an ending",
    "miniature/vae/config.json": "no transformer there: a file that ends in .json",
    "miniature/tokenizer": "no transformer there: a folder with ",
    "cut": "cannot be read: Error while deserializing header: incomplete metadata",
    "less": "--weights less: another architecture: num_layers 1, and",
    "text.safetensors": "text.safetensors: cannot be read",
    "other.safetensors": "tensors are missing or not FluxTransformer2DModel's",
    "kohya.safetensors": "kohya.safetensors: this transformer has no layer a",
    "lokr.safetensors": "lokr.safetensors: its format is LoKr (it has lora_unet_a.lokr_w1), which is neither trained",
    "lora": "pytorch_lora_weights.safetensors: this transformer has no layer transformer_blocks.9.attn.to_q",
    "miniature/vae": "_class_name 'AutoencoderKL' must be 'FluxTransformer2DModel'"}

FILES = [
    *(Mistake(script, ["--prompts", name], words)
      for script in ("train.py", *SAMPLES) for name, (_, words) in PROMPTS.items()),
    Mistake("train.py", "--eval-prompts no.txt", "--eval-prompts no.txt: no such file"),
    Mistake("train.py", "--eval-prompts nul.txt", "--eval-prompts nul.txt: holds a NUL"),
    Mistake("train.py", "--watch-prompts no.txt", "--watch-prompts no.txt: no such file"),
    Mistake("bench", "--prompts no.txt", "--prompts no.txt: no such file"),
    Mistake("sample.py", ["a\0b"], "is no text"),
    *(Mistake("sample.py", ["a fox", blank], "a prompt of no words") for blank in ("", " ", "\u200b")),
    Mistake("sample.py", ["--prompts", "p.txt", "a fox"], "--prompts p.txt: prompts are given too; leave one out"),
    Mistake("sample.py", ["\udcff"], "is no text"),
    Mistake("sample.py", ["x" * 30_000], "a prompt of 30000 characters"),
    *each(ALL, "--model no/such/folder", "no such folder"),
    *each(ALL, "--model folder", "not a FLUX.1 folder, it has no model_index.json, transformer"),
    *each(ALL, f"--model {FLUX_DEV}", "needs a GPU and there is none; what works here: --model miniature"),
    *each(ALL, ["--model", ""], "is empty"),
    *each(ALL, ["--model", "a\0b"], "holds a NUL"),
    *each(ALL, ["--model", "x" * 300], "is too long"),
    *each(ALL, "--model pipe", "not a FLUX.1 folder"),
    # photographs
    *(Mistake("train.py", ["--images", name], words) for name, (_, words) in PHOTOGRAPHS.items()),
    Mistake("train.py", ["--images", "a\0b"], "no such folder"),
    Mistake("train.py", ["--land", "no captions"], "--land no captions: no caption for any of its 2 pictures; write"),
    Mistake("train.py", "--land nowhere", "--land 'nowhere': no such folder; give a number, or a folder"),
    Mistake("train.py", ["--land", ""], "is empty"),
    Mistake("train.py", "--images pictures --prompts p.txt", "the captions are the prompts; give one of the two"),
    Mistake("train.py", "--images pictures --noise fresh", "nothing is rolled out"),
    Mistake("bench", "--images pictures", "--images: an update is timed here"),
    Mistake("train.py", "--images pictures --method refl", "it learns from its own rollouts, and not from photographs"),
    Mistake("train.py", "--explain --method draft-lv", "--explain --method draft-lv: only srpo can be explained"),
    Mistake("train.py", "--method dancegrpo --rollout-steps 3 --global-batch 4 --group 3",
            "a process makes 4 of the 4 images of --global-batch, which is no multiple of --group 3; "
            "--global-batch 3 is"),
    Mistake("train.py", "--method dancegrpo --global-batch 4 --group 2 --rollout-steps 1", "must be at least 2"),
    Mistake("train.py", "--method refl --recipe paper", "the recipes are srpo's"),
    Mistake("train.py", "--plan --global-batch 12", "cannot be divided among 8 processes; it can among 1, 2, 3, 4, 6"),
    Mistake("train.py", "--method dancegrpo --group 1", "--group 1: must be a whole number"),
    Mistake("train.py", "--method reinforce", "invalid choice: 'reinforce'"),
    Mistake("evaluate.py", "--images a --prefix photo", "--images and --prefix: pictures that exist"),
    Mistake("evaluate.py", "--per-prompt 3", "--per-prompt: invalid choice: 3"),
    Mistake("evaluate.py", "--metrics diversity", "give 2 or more"),
    # what is kept
    Mistake("train.py", ["--cache", ""], "is empty"),
    Mistake("train.py", "--cache text.txt", "--cache text.txt: cannot be written"),
    Mistake("train.py", "--cache text.txt/new", "Not a directory; give another, or off"),
    Mistake("train.py", "--cache pipe/new", "--cache pipe/new: cannot be written: Not a directory"),
    Mistake("train.py", "--cache /proc/1/new", "--cache /proc/1/new: cannot be written"),
    # where it is written
    *(Mistake(script, ["--out", out], words) for script in ("train.py", *SAMPLES) for out, words in
      (("", "is empty"), ("a\0b", "holds a NUL"), ("x" * 300, "is too long"), ("\udcff", "is no UTF-8 text"))),
    *(Mistake("train.py", [flag, "\udcff"], words) for flag, words in (
        ("--cache", "is no UTF-8 text"), ("--images", "no such folder"), ("--weights", "is no UTF-8 text"),
        ("--model", "is no UTF-8 text"), ("--reward", "give NAME"))),
    Mistake("train.py", "--explain --out theirs2", "explain.png exists already and is not a picture of --explain"),
    Mistake("train.py", "--explain --out text.txt", "cannot be written: Not a directory"),
    *each(("train.py", *SAMPLES), "--out text.txt/new", "cannot be written: Not a directory"),
    Mistake("train.py", "--out text.txt", "cannot be written: Not a directory"),
    Mistake("train.py", "--out pipe", "cannot be written"),
    Mistake("train.py", "--out theirs", "not a run's folder, and not empty: it holds 00000.png"),
    Mistake("train.py", "--out link", "not a run's folder, and not empty"),
    Mistake("train.py", "--out . --overwrite", "not a run's folder, and not empty"),
    Mistake("train.py", "--resume --out theirs", "--out theirs is not a run's folder, and not empty"),
    *each(SAMPLES, "--out theirs", "is there, and not from"),
    *each(SAMPLES, "--out link", "is there, and not from"),
    # trained weights, pictures and metrics
    *(Mistake("sample.py", ["--weights", where], words) for where, words in WEIGHTS.items()),
    *(Mistake("train.py", ["--weights", where], words) for where, words in WEIGHTS.items()
      if where and len(where) < 300),
    Mistake("train.py", ["--weights", ""], "--weights \"\": must be a path, and it is empty"),
    Mistake("train.py", "--weights fits --lora 8", "another rank than --lora 8; --lora 2 goes on with it"),
    *(Mistake("evaluate.py", ["--weights", f"w={where}"], words) for where, words in WEIGHTS.items()
      if where and len(where) < 300),
    Mistake("evaluate.py", ["--weights", ""], "not a name for a folder"),
    Mistake("evaluate.py", "--weights", "expected at least one argument"),
    Mistake("evaluate.py", "--weights results.json=miniature/transformer", "a name is used twice, or taken"),
    Mistake("evaluate.py", "--weights Results.JSON=miniature/transformer", "a name is used twice, or taken"),
    Mistake("evaluate.py", "--weights a=miniature/transformer A=miniature/transformer", "used twice"),
    Mistake("evaluate.py", "--weights a=miniature/transformer --weights A=miniature/transformer", "used twice"),
    Mistake("evaluate.py", "--weights ..=miniature/transformer", "not a name for a folder"),
    Mistake("evaluate.py", "--images", "expected at least one argument"),
    Mistake("evaluate.py", "--images theirs --weights miniature/transformer", "give one"),
    Mistake("evaluate.py", "--images no", "no: no such folder"),
    Mistake("evaluate.py", "--images theirs", "--images theirs: no prompts.json in it; give its prompts"),
    Mistake("evaluate.py", "--images pipe", "pipe: no such folder"),
    Mistake("evaluate.py", "--images sets", "no pictures 00000.png"),
    Mistake("evaluate.py", "--images waits", "waits/00000.png: not a file"),
    Mistake("evaluate.py", "--images listed", "listed/prompts.json: must be"),
    Mistake("evaluate.py", ["--metrics", ""], "not a metric; there are"),
    Mistake("evaluate.py", "--metrics fid", "--metrics fid: not a metric; there are"),
    Mistake("evaluate.py", "--metrics statistics,statistics", "named twice"),
    Mistake("evaluate.py", "--metrics statistics=x", "it has no files"),
    Mistake("evaluate.py", "--metrics judge=folder", "there is none in folder"),
    Mistake("evaluate.py", ["--metrics", "judge=a\0b"], "holds a NUL"),
    Mistake("evaluate.py", "--metrics imagereward=pipe", "neither a file nor a folder"),
    Mistake("evaluate.py", "--metrics reward --reward :", "--reward :: give NAME"),
]

# ---------------------------------------------------------------------------------------------------- rewards
SPECIFICATIONS = {  # of --reward
    ":": "give NAME", "=": "give NAME", "a=": "give NAME", ":::": "give NAME", "": "an empty name",
    ",": "an empty name", "a=b=c": "no such file", "no.pt": "--reward no.pt: no such file",
    "x" * 5000: "give NAME", "pipe": "pipe: neither a file nor a folder",
    "hpsv2.1:nan": "finite", "hpsv2.1:inf": "finite", "hpsv2.1:-1": "finite", "hpsv2.1:1e400": "finite",
    "hpsv2.1:1e300": "from 1e-06 to 1e+06", "hpsv2.1:1e-300": "from 1e-06 to 1e+06",
    "hpsv2.1:0": "every weight is 0", "hpsv2.1,hpsv2.1": "named twice"}
REWARDS = [
    *(Mistake(script, ["--reward", text], words)
      for script in (*TRAINS, "evaluate.py") for text, words in SPECIFICATIONS.items()
      if script == "train.py" or text not in ("a=b=c", "no.pt", "pipe", "x" * 5000)),
    *(Mistake("train.py", ["--reward", name], "not a reward model") for name in ("text.txt", "folder")),
    Mistake("train.py", "--reward pickle.pt", "not a reward model"),
    Mistake("train.py", "--reward zeros.pt", "weights of open_clip's ViT-H-14 are expected, a vision tower "
            "1280 wide with 32 layers and patches of 14 pixels; these have no visual.conv1.weight, but "),
    Mistake("train.py", "--reward large.pt", "these are of a vision tower 1024 wide with 24 layers"),
    Mistake("train.py", "--reward numbers.pt", "no tensors by their names"),
    Mistake("train.py", "--reward wordless", "49408 words, and its text tower knows 591"),
    Mistake("train.py", "--reward speechless", "its tokenizer has 3 words, and its text tower knows 591"),
    Mistake("train.py", "--reward anothers", "its tokenizer has 115 words, and its text tower knows 591"),
    Mistake("train.py", "--reward deaf", "reads --control realistic photo and --neg CG render alike"),
    Mistake("train.py", "--reward truths", "holds BOOL, which are no weights"),
    Mistake("train.py", "--reward blind", "--reward blind: gives two different pictures the scores 0 and 0"),
    Mistake("train.py", "--reward unscaled", "std [0, 0, 0] must be three numbers each, and std above 0"),
    Mistake("train.py", "--reward pointer", "model.safetensors: cannot be read: it is a Git LFS pointer"),
    Mistake("train.py", "--plan --world-size 1 --reward folder", "folder: no reward in it, neither open_clip"),
    Mistake("train.py", "--reward pickle.pt", "holds more than tensors, which could run code, so it is not read"),
    Mistake("train.py", "--reward code", "asks for code to be run (trust_remote_code)"),
    Mistake("train.py", "--reward class", "asks for code to be run (auto_map)"),
    Mistake("train.py", "--reward elsewhere", "outside the folder (hf_model_name)"),
    Mistake("train.py", "--reward huge", "not a size of a network"),
    Mistake("train.py", "--reward notfinite", "holds numbers that are not finite"),
    Mistake("train.py", "--reward pickscore=class", "asks for code to be run (auto_map)"),
    Mistake("evaluate.py", "--metrics reward=nowhere", "no such file"),
]


# ---------------------------------------------------------------------------------------------- model folders
def config(file, **changed):
    """A change of a model's folder: keys of a JSON file; None takes one away."""
    def change(folder):
        values = json.loads((folder / file).read_text())
        for key, value in changed.items():
            if value is None:
                del values[key]
            else:
                values[key] = value
        write(folder / file, json.dumps(values))
    return change


def text(file, content):
    """A change of a model's folder: the text of a file."""
    def change(folder):
        write(folder / file, content)
    return change


def gone(file):
    def change(folder):
        (folder / file).unlink()
    return change


def pipe(file):
    def change(folder):
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)
    return change


def tensors(file, how):
    """A change of a model's folder: how(state) of the tensors of a file."""
    def change(folder):
        state = load_file(folder / file)
        how(state)
        (folder / file).unlink()
        save_file(state, folder / file, {"format": "pt"})
    return change


def without_one(state):
    del state[sorted(state)[len(state) // 2]]


def with_another(state):
    state["another"] = torch.zeros(2)


def of_another_shape(state):
    state[sorted(state)[0]] = torch.zeros(3, 3)


def whole_numbers(state):
    name = sorted(state)[0]
    state[name] = state[name].long()


def truth_values(state):
    name = sorted(state)[0]
    state[name] = state[name].bool()


def blind(state):
    """Every picture comes out alike."""
    for name in state:
        if name.startswith("visual."):
            state[name] = torch.zeros_like(state[name])


def deaf(state):
    """Every text comes out alike: its last projection sees only what all texts share."""
    state["token_embedding.weight"] = torch.zeros_like(state["token_embedding.weight"])


def not_finite(state):
    for name in state:
        state[name] = torch.full_like(state[name], float("nan"))


def replaced(part, by):
    """A change of a model's folder: a part is another's."""
    def change(folder):
        shutil.rmtree(folder / part)
        shutil.copytree(ROOT / "miniature" / by, folder / part)
    return change


def few_words(folder):
    file = folder / "tokenizer_2" / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"] = values["model"]["vocab"][:20]
    write(file, json.dumps(values))


class Planted:
    """An object that leaves a mark when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def pickled(part, name, old):
    """A change of a model's folder: a file of weights is a pickle with code in it."""
    def change(folder):
        (folder / part / old).unlink()
        torch.save({"weight": Planted()}, folder / part / name)
    return change


WEIGHTS_OF = {"transformer": "diffusion_pytorch_model.safetensors",
              "vae": "diffusion_pytorch_model.safetensors",
              "text_encoder": "model.safetensors", "text_encoder_2": "model.safetensors"}
CODE = {"auto_map": {"AutoModel": "planted.Planted"}}
MODELS = [  # a change of the folder; what is said
    (config("model_index.json", _class_name="StableDiffusionPipeline"),
     "says StableDiffusionPipeline, not FluxPipeline"),
    (text("model_index.json", "[]"), "must be a JSON object"),
    (lambda folder: shutil.rmtree(folder / "vae"), "it has no vae"),
    # nothing is run
    *((config(f"{part}/{name}", **CODE), "asks for code to be run (auto_map)") for part, name in (
        ("transformer", "config.json"), ("vae", "config.json"), ("text_encoder", "config.json"),
        ("text_encoder_2", "config.json"), ("tokenizer", "tokenizer_config.json"),
        ("tokenizer_2", "tokenizer_config.json"), ("scheduler", "scheduler_config.json"))),
    (config("text_encoder/config.json", attn_implementation="someone/kernel"), "asks for code to be run"),
    (config("text_encoder_2/config.json", x=[{"trust_remote_code": True}]), "asks for code to be run"),
    (text("text_encoder_2/adapter_config.json", '{"base_model_name_or_path": "/"}'),
     "adapters are not loaded"),
    (config("transformer/config.json", _class_name="planted.Planted"), "must be 'FluxTransformer2DModel'"),
    (config("vae/config.json", _class_name="AutoencoderTiny"), "must be 'AutoencoderKL'"),
    (config("text_encoder/config.json", model_type="bert"), "must be 'clip_text_model'"),
    (config("text_encoder_2/config.json", model_type="planted"), "must be 't5'"),
    (config("scheduler/scheduler_config.json", _class_name="DDIMScheduler"), "must be 'FlowMatchEuler"),
    # configs
    *((text(f"{part}/config.json", content), words) for part in WEIGHTS_OF for content, words in (
        ("[]", "must be a JSON object"), ("{", "not JSON"), ("{}", "has no"), ("[" * 99_999, "not JSON"))),
    *((pipe(f"{part}/config.json"), "config.json: not a file") for part in WEIGHTS_OF),
    (config("vae/config.json", block_out_channels=None), "has no block_out_channels"),
    (config("vae/config.json", block_out_channels=["a"]), "must be a list of whole numbers"),
    (config("vae/config.json", scaling_factor="1"), "must be a finite number above 0"),
    (config("vae/config.json", shift_factor=float("nan")), "not a size of a network"),
    (config("vae/config.json", norm_num_groups=-1), "must be a whole number above 0"),
    (config("text_encoder/config.json", num_attention_heads=None), "has no num_attention_heads"),
    (config("text_encoder_2/config.json", num_heads=0), "must be a whole number above 0"),
    (config("vae/config.json", latent_channels=4), "in_channels 64 must be 16"),
    (config("transformer/config.json", num_layers=10**9), "not a size of a network"),
    (config("transformer/config.json", num_layers=-1), "must be a whole number above 0"),
    (config("transformer/config.json", guidance_embeds="yes"), "must be true or false"),
    (config("transformer/config.json", axes_dims_rope=[8, 12]), "three even numbers"),
    (config("transformer/config.json", axes_dims_rope=[8, 12, 14]), "attention_head_dim 32 must be 34"),
    (config("transformer/config.json", joint_attention_dim=4096), "T5's d_model"),
    (config("transformer/config.json", pooled_projection_dim=768), "CLIP's hidden_size"),
    (config("scheduler/scheduler_config.json", base_shift=None), "has no base_shift"),
    (config("scheduler/scheduler_config.json", base_shift=1e9), "not a size of a network"),
    (config("scheduler/scheduler_config.json", max_image_seq_len=256), "must be below"),
    (config("scheduler/scheduler_config.json", use_dynamic_shifting="no"), "must be true or false"),
    (config("scheduler/scheduler_config.json", use_karras_sigmas=True), "must be False"),
    # tokenizers
    (gone("tokenizer/tokenizer.json"), "has no vocabulary"),
    (gone("tokenizer_2/tokenizer.json"), "has no vocabulary"),
    *((config(f"{part}/tokenizer_config.json", model_max_length=length), words)
      for part in ("tokenizer", "tokenizer_2")
      for length, words in ((10**6, "to "), (0, "above 0"), ("16", "a whole number"), (1, "from 8"))),
    (few_words, "20 words, but its encoder knows 115"),
    (replaced("tokenizer_2", "tokenizer"), "cannot be loaded as FLUX.1"),
    (config("tokenizer_2/tokenizer_config.json", pad_token="nothing"), "its encoder knows 115"),
    (text("tokenizer_2/tokenizer.json", "[]"), "cannot be loaded as FLUX.1"),
    (text("tokenizer/tokenizer_config.json", "{"), "not JSON"),
    # weights
    *((tensors(f"{part}/{name}", how), "1 tensors are missing")
      for part, name in WEIGHTS_OF.items() for how in (without_one, with_another)),
    *((tensors(f"{part}/{name}", of_another_shape), "cannot be loaded as FLUX.1")
      for part, name in WEIGHTS_OF.items()),
    *((tensors(f"{part}/{name}", whole_numbers), "which are no weights")
      for part, name in WEIGHTS_OF.items()),
    (tensors("transformer/diffusion_pytorch_model.safetensors", not_finite), "its weights hold numbers that"),
    *((tensors(f"{part}/{name}", truth_values), "which are no weights") for part, name in WEIGHTS_OF.items()),
    (tensors("judge/judge.safetensors", not_finite), "judge: not the miniature's judge: it holds numbers that are not"),
    (tensors("vae/diffusion_pytorch_model.safetensors", not_finite), "its VAE holds numbers that"),
    (tensors("text_encoder/model.safetensors", not_finite), "its text encoders make numbers that"),
    *((text(f"{part}/{name}", "not what it should be"), "cannot be loaded as FLUX.1")
      for part, name in WEIGHTS_OF.items()),
    *((pipe(f"{part}/{name}"), f"{name}: not a file") for part, name in WEIGHTS_OF.items()),
    (pickled("vae", "diffusion_pytorch_model.bin", WEIGHTS_OF["vae"]), "cannot be loaded as FLUX.1"),
    (pickled("text_encoder", "pytorch_model.bin", WEIGHTS_OF["text_encoder"]), "cannot be loaded as FLUX.1"),
    (text("transformer/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"x": "../../x"}}'),
     "has no weight_map"),
    # the flags that it would set
    *((text("srpo.json", content), words) for content, words in (
        ("{", "not JSON"), ("[]", "must be an object"), ("[" * 99_999, "not JSON"),
        ('{"out": "x"}', "'out' is not a flag that a model may set"),
        ('{"overwrite": true}', "'overwrite' is not a flag that a model may set"),
        ('{"resume": true}', "'resume' is not a flag"), ('{"seed": 1}', "'seed' is not a flag"),
        ('{"": 1}', "'' is not a flag"), ('{"steps": "24"}', "steps '24' must be a finite number"),
        ('{"steps": 1%s}' % ("0" * 400), "must be a finite number"),
        ('{"steps": null}', "steps 'None' must be"), ('{"steps": true}', "steps 'True' must be"),
        ('{"steps": {}}', "must be a finite number"), ('{"steps": 1.5}', "--steps 1.5: must be a whole"),
        ('{"lr": NaN}', "must be a finite number"), ('{"lr": 1e999}', "must be a finite number"),
        ('{"lr": -1}', "--lr -1: must be"), ('{"lr": [1e-5]}', "must be a finite number"),
        ('{"control": ["a", "b"]}', "must be a text"), ('{"control": 3}', "must be a text"),
        ('{"form": "none"}', "--form: invalid choice"), ('{"sigma_range": 1}', "a list of finite numbers"),
        ('{"drift_band": [1, 1, 1, 1, "--overwrite"]}', "must be a list of finite numbers"),
        ('{"drift_band": ["--out", "x", 1, 1]}', "must be a list of finite numbers"),
        ('{"drift_band": [1, 1, 1]}', "--drift-band: expected 4 arguments"),
        ('{"prompts": "../p.txt"}', "'../p.txt' leads out"), ('{"prompts": "/etc/passwd"}', "leads out"),
        ('{"prompts": "link.txt"}', "leads out"), ('{"prompts": "a\\u0000b"}', "holds a NUL"),
        ('{"prompts": "%s"}' % ("x" * 300), "is too long"), ('{"prompts": ""}', "is empty"),
        ('{"prompts": "p.txt"}', "is not in the model's folder"),
        ('{"reward": "hpsv2.1=../../x"}', "leads out"), ('{"reward": "hpsv2.1=/etc"}', "leads out"),
        ('{"reward": "reward,../x"}', "leads out"), ('{"reward": "class:1"}', "is not in the model's folder"),
        ('{"reward": "clip=a/b"}', "is not in the model's folder"),
        ('{"metrics": "judge=../miniature"}', "leads out"))),
    (pipe("srpo.json"), "srpo.json: not a file"),
]
OF_MODELS = []
for i, (change, words) in enumerate(MODELS):
    OF_MODELS.append(Mistake("train.py", "--model changed", words, change=change))
    # The other scripts read a model's folder by the same functions: a few of each kind.
    if i % 5 == 0 and "--" not in words:
        for script in ("bench", *SAMPLES):
            OF_MODELS.append(Mistake(script, "--model changed", words, change=change))


# -------------------------------------------------------------------------------------------------- the place
def write(file, content):
    file.unlink(missing_ok=True)  # it may be a link to the miniature's
    file.write_text(content)


def copy_of_the_miniature(folder):
    """A folder with the miniature's files, the large ones as links."""
    def copy(source, target):
        if Path(source).stat().st_size > 50_000:
            os.symlink(source, target)
        else:
            shutil.copy(source, target)

    shutil.copytree(ROOT / "miniature", folder, copy_function=copy,
                    ignore=shutil.ignore_patterns(".build", "*.py", "__pycache__"))


def make_rewards(here):
    """Folders in open_clip's layout, each with something in it that must not be taken."""
    planted = "import os\nos.mkdir('ran')\n"
    for name in ("code", "class", "elsewhere", "huge", "notfinite"):
        shutil.copytree(ROOT / "miniature" / "reward", here / name)
        (here / name / "planted.py").write_text(planted)
    network = "open_clip_config.json"
    for name, key, value in (("code", "tokenizer_kwargs", {"trust_remote_code": True}),
                             ("elsewhere", "hf_model_name", "someone/model"), ("huge", "layers", 10**9)):
        values = json.loads((here / name / network).read_text())
        values["model_cfg"]["text_cfg"][key] = value
        (here / name / network).write_text(json.dumps(values))
    config("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "planted.Planted"]})(here / "class")
    tensors("open_clip_model.safetensors", not_finite)(here / "notfinite")
    torch.save(Planted(), here / "pickle.pt")
    torch.save({"weights": torch.zeros(3)}, here / "zeros.pt")
    torch.save([1, 2], here / "numbers.pt")
    large = {f"visual.transformer.resblocks.{i}.ln_1.weight": torch.zeros(1) for i in range(24)}
    torch.save(large | {"visual.conv1.weight": torch.zeros(1024, 3, 14, 14)}, here / "large.pt")
    for name in ("speechless", "anothers", "deaf", "truths"):
        shutil.copytree(ROOT / "miniature" / "reward", here / name)
    (here / "speechless" / "tokenizer.json").unlink()
    shutil.copytree(ROOT / "miniature" / "tokenizer_2", here / "anothers", dirs_exist_ok=True)
    tensors("open_clip_model.safetensors", deaf)(here / "deaf")
    tensors("open_clip_model.safetensors", truth_values)(here / "truths")
    for name in ("blind", "unscaled", "pointer"):
        shutil.copytree(ROOT / "miniature" / "reward", here / name)
    tensors("open_clip_model.safetensors", blind)(here / "blind")
    config(network, preprocess_cfg={"mean": [0, 0, 0], "std": [0, 0, 0]})(here / "unscaled")
    write(here / "pointer" / "open_clip_model.safetensors", "version https://git-lfs.github.com/spec/v1\n")
    make_foreign_reward(here / "wordless")
    (here / "wordless" / "tokenizer.json").unlink()


def make_weights(here):
    """What is given as --weights, and is none for the miniature."""
    shutil.copytree(ROOT / "miniature" / "transformer", here / "cut")
    whole = (here / "cut" / WEIGHTS_OF["transformer"]).read_bytes()
    (here / "cut" / WEIGHTS_OF["transformer"]).write_bytes(whole[:-100])
    shutil.copytree(ROOT / "miniature" / "transformer", here / "less")
    config("config.json", num_layers=1)(here / "less")
    (here / "text.safetensors").write_text("mine")
    save_file({"a": torch.zeros(1)}, here / "other.safetensors")
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(1, 1)}, here / "kohya.safetensors")
    save_file({"lora_unet_a.lokr_w1": torch.zeros(1, 1)}, here / "lokr.safetensors")
    for folder, block in (("fits", 0), ("lora", 9)):
        (here / folder).mkdir()
        layer = f"transformer.transformer_blocks.{block}.attn.to_q"
        pair = {f"{layer}.lora_A.weight": torch.zeros(2, 128), f"{layer}.lora_B.weight": torch.zeros(128, 2)}
        save_file(pair, here / folder / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that a mistake can be made about."""
    here = tmp_path_factory.mktemp("place")
    copy_of_the_miniature(here / "miniature")
    os.mkfifo(here / "pipe")
    (here / "text.txt").write_text("mine")
    (here / "p.txt").write_text("a fox\n")
    for name in ("folder", "theirs", "pipes", "waits", "listed"):
        (here / name).mkdir()
    for name in ("results.json", "00000.png", "thesis.tex"):
        (here / "theirs" / name).write_text("mine")
    (here / "folder" / "note").write_text("mine")
    (here / "link").symlink_to("theirs")
    (here / "built" / ".build").mkdir(parents=True)
    (here / "built" / "vae").symlink_to("../theirs")
    (here / "theirs2").mkdir()
    (here / "theirs2" / "explain.png").write_text("mine")
    os.mkfifo(here / "pipes" / "a.json")
    os.mkfifo(here / "waits" / "00000.png")
    (here / "listed" / "00000.png").write_bytes(b"")
    (here / "listed" / "prompts.json").write_text('["a fox"]')
    for name, (content, _) in PROMPTS.items():
        files = content if isinstance(content, dict) else {"": content}
        for file, inside in files.items():
            if inside is not None:
                (here / name / file).parent.mkdir(exist_ok=True)
                (here / name / file).write_bytes(inside)
    for name, (files, _) in PHOTOGRAPHS.items():
        for file, content in (files or {}).items():
            (here / name / file).parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                photo(64, 64).save(here / name / file)
            else:
                (here / name / file).write_bytes(content)
    make_rewards(here)
    make_weights(here)
    return here


@pytest.fixture
def changed(place, mistake):
    """The folder changed/ in the place: what a mistake with a model is about."""
    folder = place / "changed"
    if mistake.change is not None:
        copy_of_the_miniature(folder)
        (folder / "link.txt").symlink_to("../p.txt")
        for part in (".", *WEIGHTS_OF, "tokenizer", "tokenizer_2", "scheduler"):
            (folder / part / "planted.py").write_text("import os\nos.mkdir('ran')\n")
        mistake.change(folder)
    yield
    for name in ("changed", "new", "ran"):  # the last two if the test fails
        shutil.rmtree(place / name, ignore_errors=True)


def contents(place):
    """{path: what tells its content from another} of all below a folder."""
    found = {}
    for path in place.rglob("*"):
        about = path.lstat()
        found[path] = (about.st_mode, about.st_size, about.st_mtime_ns if not path.is_dir() else 0)
    return found


@pytest.fixture
def signals():
    """Scripts answer signals; a test leaves them as they were."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def line_of(monkeypatch, capsys, script, argv, status=2):
    """What a script says that must fail: one line, in which nothing can move the cursor."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        MAIN[script]()
    said = capsys.readouterr().err
    lines = said.rstrip("\n").split("\n")
    assert stop.value.code == status and len(lines) == 1, said
    assert lines[0].startswith(f"{script}: ") and lines[0].isprintable()
    return lines[0]


def named(mistake):
    flags = mistake.flags if isinstance(mistake.flags, str) else " ".join(mistake.flags)
    return f"{mistake.script} {flags[:60]!a} {mistake.words[:30]}"


@pytest.mark.usefixtures("signals", "changed")
@pytest.mark.parametrize("mistake", [*FLAGS, *FILES, *REWARDS, *OF_MODELS], ids=named)
def test_a_mistake_is_one_line_and_changes_nothing(place, monkeypatch, capsys, mistake):
    monkeypatch.chdir(place)
    before = contents(place)
    said = line_of(monkeypatch, capsys, mistake.script, mistake.argv, mistake.status)
    assert mistake.words in said
    assert contents(place) == before


ENVIRONMENTS = {  # of a process; what is said
    "RANK=abc": "RANK=abc in the environment: must be a whole number, as torchrun sets it",
    "RANK=": "RANK= in the environment: must be", "LOCAL_RANK=x": "LOCAL_RANK=x", "WORLD_SIZE=-1": "WORLD_SIZE=-1",
    "LOCAL_WORLD_SIZE=abc": "LOCAL_WORLD_SIZE=abc", "MASTER_PORT=x RANK=0": "MASTER_PORT=x",
    "WORLD_SIZE=2": "WORLD_SIZE=2 in the environment, but no LOCAL_RANK, MASTER_PORT, RANK, MASTER_ADDR: torchrun",
    "RANK=2 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_PORT=1 MASTER_ADDR=localhost": "the rank must be below",
    "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=70000": "MASTER_PORT=70000 in the environment: "
                                                                               "must be from 0 to 65535",
    "RANK=0 WORLD_SIZE=9999999999 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=1": "WORLD_SIZE=9999999999 in",
    "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=0 MASTER_ADDR=x MASTER_PORT=1": "LOCAL_WORLD_SIZE=0 in",
    **{f"RANK={rank} WORLD_SIZE=3 LOCAL_RANK=0 MASTER_ADDR={name} MASTER_PORT=1":
       f"MASTER_ADDR={name} in the environment: no machine of that name is found here"
       for rank, name in ((0, "no.such.host"), (2, "no.such.host"), (0, "a..b"))}}


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_an_environment_that_torchrun_does_not_make_is_one_line(place, monkeypatch, capsys, script, environment):
    monkeypatch.chdir(place)
    monkeypatch.setattr(parallel, "LOOK_UP", 0)
    for setting in environment.split():
        monkeypatch.setenv(*setting.split("="))
    assert ENVIRONMENTS[environment] in line_of(monkeypatch, capsys, script, START[script])


PLACES = {  # what a shell does before a script; its end; the exit status and what is said
    "no streams": ("", "-h <&- >&- 2>&-", 0, ""), "no stderr": ("", "--lr x 2>&-", 2, ""),
    "a full disk for stdout": ("", "> /dev/full", 1, "train.py: what is printed, or a file, cannot be written: No"),
    "a deleted folder": ("mkdir gone; cd gone; rmdir ../gone;", "", 2, "train.py: the current folder cannot be read"),
    "no docstrings": ("export PYTHONOPTIMIZE=2;", "", 2, "train.py: python -OO, or PYTHONOPTIMIZE=2: removes"),
    "a port in use": ("export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=PORT;", "", 2,
                      "the processes cannot meet there: The server socket has failed to listen")}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_no_script_expects_is_one_line_or_works(tmp_path, name):
    before, after, status, said = PLACES[name]
    flags = "" if "PORT" in before or "-h" in after else "--plan"
    with socket.create_server(("", 0)) as taken:
        before = before.replace("=PORT", f"={taken.getsockname()[1]}")
        done = subprocess.run(f"{before} {sys.executable} {ROOT}/train.py --model {ROOT}/miniature {flags} {after}",
                              shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert said in "".join(lines) and len(lines) == bool(said)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("name, number", [("merge", signal.SIGTERM), ("merge", signal.SIGHUP),
                                          ("film", signal.SIGTERM), ("film", signal.SIGINT)])
def test_a_module_that_is_stopped_while_it_writes_leaves_no_hidden_file(tmp_path, monkeypatch, capsys, name, number):
    main, argv = {"merge": (merge.main, ["--model", "miniature", "--weights", "miniature"]),
                  "film": (film.main, [str(tmp_path)])}[name]
    (tmp_path / "samples").mkdir()
    photo(64, 64).save(tmp_path / "samples" / "step_00000.png")
    monkeypatch.setattr("os.fsync", lambda file: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--out", str(tmp_path / "made")])
    assert stop.value.code == 128 + number
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["step_00000.png"]
    assert capsys.readouterr().out.endswith(f"\n{name}: stopped; run it again\n")


def test_what_is_printed_without_streams_goes_into_no_file(tmp_path):
    """Of a process whose stdout and stderr are closed, the first files that it opens have their numbers."""
    code = ("import os; from engine.loading import open_streams; open_streams(); file = open(OUT, 'w'); "
            "print('said', flush=True); os.write(1, b'said'); os.write(2, b'said')").replace("OUT", f"'{tmp_path}/x'")
    done = subprocess.run(f'{sys.executable} -c "{code}" <&- >&- 2>&-', shell=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and (tmp_path / "x").read_text() == ""


# ----------------------------------------------------------------------------------------- what is no mistake
def one_line(monkeypatch, capsys, *argv):
    return line_of(monkeypatch, capsys, "train.py", [*SMALL, *argv])


@pytest.mark.parametrize("content, prompts", [
    (b"\xef\xbb\xbfa fox\r\n\r\na dog", ["a fox", "a dog"]), (b"a \x1b[2J fox\n", ["a \x1b[2J fox"])])
def test_a_text_file_is_read_as_it_is_meant(tmp_path, content, prompts):
    (tmp_path / "p.txt").write_bytes(content)
    assert prompt_files.read_prompts(tmp_path / "p.txt") == prompts


def test_the_papers_prompts_come_from_the_hub_each_once(monkeypatch, tmp_path):
    """HPDv2's two layouts: pairs with a field `prompt`, and flat lists; no hub is one line that says what to
    give."""
    (tmp_path / "train.json").write_text(json.dumps([{"prompt": "a fox"}, {"prompt": "a dog"},
                                                     {"prompt": "a fox"}]))
    (tmp_path / "list.json").write_text(json.dumps(["a street", "a fox"]))
    (tmp_path / "benchmark").mkdir()
    for name in ("anime", "concept-art", "paintings", "photo"):
        shutil.copy(tmp_path / "list.json", tmp_path / "benchmark" / f"{name}.json")
    monkeypatch.setattr(prompt_files, "snapshot_download", lambda dataset, allow_patterns, repo_type: tmp_path)
    assert prompt_files.read_prompts("hpdv2") == ["a fox", "a dog"]
    assert prompt_files.read_prompts("hpdv2-benchmark") == ["a street", "a fox"]
    monkeypatch.setattr(prompt_files, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match="ymhao/HPDv2 cannot be fetched .*; give a text file"):
        prompt_files.read_prompts("hpdv2")


@pytest.mark.usefixtures("signals")
def test_a_run_is_not_overwritten_by_accident(monkeypatch, capsys, tmp_path):
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--out", str(out)])
    train.main()
    capsys.readouterr()
    log = (out / "log.jsonl").read_bytes()
    assert "already holds a run; --resume continues it, --overwrite deletes it" in one_line(
        monkeypatch, capsys, "--out", out)
    assert "--lr 4e-05, and --lr 0.1 is given" in one_line(monkeypatch, capsys, "--out", out, "--resume", "--lr", "0.1")
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--out", str(out), "--resume", "--steps", "2"])
    train.main()
    capsys.readouterr()
    assert "is past it, at step_00002" in one_line(monkeypatch, capsys, "--out", out, "--resume")
    log = (out / "log.jsonl").read_bytes()
    assert "--form released, and --form plain is given" in one_line(monkeypatch, capsys, "--out", out, "--resume",
                                                    "--form", "plain")
    assert (out / "log.jsonl").read_bytes() == log


@pytest.mark.usefixtures("signals")
def test_long_prompts_are_counted_once(monkeypatch, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n" + "a red circle left of " * 20 + "\n")
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--steps", "2", "--form", "sgp", "--threshold",
                                      "0.7", "--prompts", str(tmp_path / "p.txt"),
                                      "--out", str(tmp_path / "run")])
    train.main()
    said = capsys.readouterr().out
    assert "1 of 2 prompts of --prompts are longer than the text encoder takes" in said
    assert "--form sgp --threshold 0.7: the inverting branch has the reward of the denoising" in said


@pytest.mark.parametrize("form, branches, threshold, told", [
    ("plain", "denoise,invert", "0.7", True), ("sgp", "invert,denoise", "0.7", True),
    ("sgp", "invert", "0.7", False), ("plain", "denoise,invert", "off", False),
    ("released", "denoise,invert", "0.7", False), ("srp", "denoise,invert", "0.7", False)])
def test_a_threshold_that_stops_one_branch_only_is_told(flags, form, branches, threshold, told):
    a = flags("--form", form, "--branches", branches, "--threshold", threshold)
    assert bool(command.notes(a, Model(a.model))) == told


@pytest.mark.parametrize("script", ["evaluate.py", "sample.py"])
def test_the_other_scripts_too(script, tmp_path):
    """With no flag at all they are for FLUX.1-dev."""
    said = call(tmp_path / "printed", script, status=2)
    assert said.strip().count("\n") == 0 and "what works here: --model miniature" in said
