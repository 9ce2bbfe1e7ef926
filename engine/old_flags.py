"""What a run is told: every flag with its unit and where its default comes from, the ranges, the run's
folder."""

import argparse
import json
import shutil
from pathlib import Path

from engine import parallel
import srpo_reward as sr

PAPER = dict(form="branches", recover="epsilon", meet="call", lam=[1.0, 0.4], injections=2, threshold=None,
             noise="independent", rollout_guidance=3.5, shift=None)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and every flag's default behind its help."""


def parser(description):
    """All flags of train.py."""
    p = argparse.ArgumentParser(description=description, formatter_class=Help)
    words, off = lambda s: [w.strip() for w in s.split(",")], lambda s: None if s == "off" else float(s)
    g = p.add_argument_group("the run").add_argument
    g("--model", default="black-forest-labs/FLUX.1-dev", help="folder in FLUX.1-dev's layout, or hub id; "
      "its srpo.json, if there is one, holds defaults that suit it")
    g("--prompts", default="hpdv2",
      help="text file, one training prompt a line; hpdv2: fetched from the hub [paper 4.1]")
    g("--out", help="folder of the run (None: runs/<model>)")
    g("--steps", type=int, default=19, help="updates; users see collapse by 20 to 50 [released code: 19]")
    g("--batch", type=int, default=1, help="images an update [released code: 1 a GPU]")
    g("--lr", type=float, default=5e-6, help="AdamW's learning rate, constant [released code]")
    g("--weight-decay", type=float, default=1e-4, help="AdamW's, betas are 0.9 and 0.999 [released code]")
    g("--clip", type=float, default=0.1, help="largest gradient norm [released code]")
    g("--seed", type=int, default=0, help="of noise, noise levels and prompt order [ours]")
    g("--save-every", type=int, default=10, help="updates between checkpoints [ours]")
    g("--keep", type=int, default=2, help="checkpoints that stay [ours]")
    g("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    g("--overwrite", action="store_true", help="delete the run in --out first")
    g("--tensorboard", action="store_true",
      help="also write out/tensorboard (needs: pip install tensorboard)")
    g("--explain", action="store_true",
      help="tell one update call by call, with equations and shapes; writes nothing")
    g = p.add_argument_group("the reward (Eqs. 7-13)").add_argument
    g("--reward", default="hpsv2.1",
      help="hpsv2.1, pickscore, clip, aesthetic (NAME=PATH: weights from there), a .pt in HPSv2.1's layout, "
           "or an open_clip folder; several with weights: hpsv2.1:0.7,pickscore:0.3; weight 0: held out, "
           "watched only [paper 4.1]")
    g("--control", type=words, default=["Natural-lighting", "Detail", "Detailed", "Real"],
      help="wanted words, comma-separated, cycling with the step [released code]")
    g("--neg", type=words, default=["Concept art", "Painting", "Anime", "Flat", "Oil"],
      help="unwanted words, likewise")
    g("--form", choices=sr.FORMS, default="released", help="which reward in which branch: the table in "
      "srpo_reward.branch_reward [released code]")
    g("--cfg-k", type=float, default=1.5, help="k of Eq. 11, for --form cfg [ours; the paper gives none]")
    g("--discount-denoise", type=float, nargs=2, default=[0.1, 0.25], metavar=("LATE", "EARLY"),
      help="d of --form released, denoising branch [released code]")
    g("--discount-invert", type=float, nargs=2, default=[0.3, 0.01], metavar=("LATE", "EARLY"),
      help="the same, inverting branch [released code]")
    g("--threshold", type=off, default=0.7, help="relu(threshold - r) instead of -r, or off [released code]")
    g = p.add_argument_group("Direct-Align (Eqs. 3-6)").add_argument
    g("--sigma-range", type=float, nargs=2, default=[27 / 28, 0.75], metavar=("MAX", "MIN"),
      help="noise levels that are trained [released code: 0.9643 0.75]")
    g("--cells", type=int, default=1000, help="grid cells in that range [released code]")
    g("--groundtruth-ratio", type=float, default=0.92, help="share of the range left to the known noise; "
      "the network is called the rest away from where it lands [released code: 0.92 HPS, 0.9 PickScore]")
    g("--branches", type=words, default=["denoise", "invert"], help="denoise, invert, or both [paper 3.2]")
    g("--injections", type=int, default=1,
      help="n of Eq. 6: noise levels a branch visits per image [released code]")
    g("--meet", choices=["landing", "call"], default="landing", help="where the branches meet: at the "
      "level they land on [released code], or at the level they call the network [paper]")
    g("--recover", choices=["velocity", "epsilon"], default="velocity",
      help="Eq. 5 for a velocity [released code], or as printed")
    g("--lam", type=float, nargs=2, default=[1.0, 1.0], metavar=("EARLY", "LATE"),
      help="lambda(t) of Eq. 6 at both ends of --sigma-range [released code: none]")
    g("--noise", choices=["shared", "independent", "fresh"], default="shared", help="one noise prior for all "
      "images of an update [released code], one each, or shared but with fresh noise to inject")
    g = p.add_argument_group("the rollout").add_argument
    g("--size", type=int, default=720, help="side of the pictures, pixels [released code]")
    g("--rollout-steps", type=int, default=25, help="Euler steps to x0 [paper 4.1]")
    g("--rollout-guidance", type=float, default=1.0, help="distilled guidance of the rollout [released code]")
    g("--guidance", type=float, default=3.5,
      help="distilled guidance of the update, and of samples [released code]")
    g("--shift", type=off, default=3.0,
      help="time shift of the rollout; off: the model's own [released code]")
    g = p.add_argument_group("many GPUs (torchrun)").add_argument
    g("--replicas", type=int, default=1, help="HSDP: parameters are sharded inside each of so many groups "
      "and copied between them; the number of nodes [ours]")
    g("--checkpointing", action=argparse.BooleanOptionalAction, default=True,
      help="recompute activations in the backward: 21 GiB less for FLUX.1-dev at 720 pixels, "
           "a quarter more work in the update [released code]")
    g("--compile", action="store_true", help="torch.compile every transformer block")
    g("--plan", action="store_true", help="print the predicted memory, work and seconds of an update, "
      "and stop: no GPU and no weights needed")
    g("--world-size", type=int, default=8, help="processes, for --plan")
    g("--card", default="H200", help="GPU, for --plan: H200, H100, A100, H20, L40S or 'RTX 4090'")
    g("--share", type=float, default=0.4, help="of the card's peak that is reached, for --plan [ours]")
    g = p.add_argument_group("watching for collapse").add_argument
    g("--eval-prompts", default="hpdv2-benchmark", help="text file, or hpdv2-benchmark: the first of them "
      "are sampled at fixed seeds [paper 4.2]")
    g("--eval-steps", type=int, default=50, help="sampling steps of samples and evaluation [paper 4.1]")
    g("--watch", type=int, default=4, help="pictures sampled at fixed seeds while training [ours]")
    g("--watch-every", type=int, default=5, help="updates between them [ours]")
    g("--eval", type=int, default=0, help="pictures of the evaluation before and after; 0: none [ours]")
    g("--drift-band", type=float, nargs=4, default=[0.25, 0.1, 0.2, 0.04],
      metavar=("SATURATION", "REDNESS", "BRIGHTNESS", "TEXTURE"), help="largest change of these mean "
      "statistics of the watched pictures before the run is called hacked [ours]")
    printed = ", ".join(f"{k} {'off' if v is None else v}" for k, v in PAPER.items())
    p.add_argument("--recipe", choices=["released", "paper"], default="released",
                   help="paper: every form as printed (" + printed
                        + ") [ours where the paper gives no number]")
    return p


def check(a):
    """Raise ValueError, one line, for the first flag that is out of range."""
    ranges = {"steps": (1, None), "batch": (1, None), "injections": (1, None), "rollout_steps": (1, None),
              "eval_steps": (1, None), "cells": (20, None), "watch": (1, None), "watch_every": (1, None),
              "save_every": (1, None), "keep": (1, None), "replicas": (1, None), "world_size": (1, None),
              "eval": (0, None), "groundtruth_ratio": (0, 1), "seed": (0, 2**40)}
    for name, (low, high) in ranges.items():
        value = getattr(a, name)
        if value < low or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be {limits}")
    for name in ("lr", "clip"):
        if not 0 < getattr(a, name) < 1e3:
            raise ValueError(f"--{name} {getattr(a, name)}: must be above 0 and finite")
    high, low = a.sigma_range
    if not 0 <= low < high < 1:
        raise ValueError(f"--sigma-range {high} {low}: give MAX then MIN, with 0 <= MIN < MAX < 1")
    for name in ("control", "neg"):
        words = getattr(a, name)
        if not words or not all(words):
            raise ValueError(f'--{name} "{",".join(words)}": an empty control word; '
                             'give for example "realistic photo"')
    if not a.branches or set(a.branches) - {"denoise", "invert"}:
        raise ValueError(f"--branches {','.join(a.branches)}: must be denoise, invert or denoise,invert")


def check_sampling(a):
    """For sample.py and evaluate.py: make --out before any work is done. ValueError for a bad flag."""
    for name in ("first", "eval_steps", "batch"):
        value = getattr(a, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if a.seed < 0:
        raise ValueError(f"--seed {a.seed}: must be at least 0")
    try:
        if a.out:
            Path(a.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {a.out}: cannot be written: {error.strerror}") from error


def run_folder(a):
    """Where the run goes, and the checkpoint to resume from (None: a new run). Nothing is written or deleted.

    Raises ValueError if the folder holds a run and neither --resume nor --overwrite was given, or if the run
    to resume is another one, or none.
    """
    out = Path(a.out or f"runs/{Path(a.model).name}")
    stored = out / "args.json"
    if not a.resume:
        if stored.exists() and not a.overwrite:
            raise ValueError(f"--out {out} already holds a run; --resume continues it, "
                             "--overwrite deletes it")
        return out, None
    done = parallel.checkpoints(out)
    if not done or not stored.exists():
        raise ValueError(f"--resume: no checkpoint in {out}; start without --resume, or give the run's --out")
    then, now = json.loads(stored.read_text()), json.loads(json.dumps(vars(a)))
    free = ("steps", "resume", "overwrite", "explain", "out", "save_every", "keep", "replicas",
            "checkpointing", "compile", "tensorboard", "batch")
    for k in now:
        if k not in free and now[k] != then.get(k):
            raise ValueError(f"--resume: the run in {out} has --{k.replace('_', '-')} {then.get(k)}, "
                             f"now {now[k]}; give the same flags, or another --out")
    if int(done[-1].name.split("_")[1]) > a.steps:
        raise ValueError(f"--steps {a.steps}: the run in {out} is past it, at {done[-1].name}; "
                         "give more steps")
    return out, done[-1]


def make_folder(out, a):
    """Make the run's folder and write args.json; a run that --overwrite allows to go is deleted first."""
    try:
        if (out / "args.json").exists() and not a.resume:
            shutil.rmtree(out)
        (out / "samples").mkdir(parents=True, exist_ok=True)
        (out / "args.json").write_text(json.dumps(vars(a), indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written: {error.strerror}") from error
