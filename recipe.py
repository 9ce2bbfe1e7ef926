"""The recipe: every hyper-parameter once, with its default, unit and source; the named recipes; the methods.

The defaults are the released code's recipe, in full. Another recipe lists only what differs from it. Each field below
is a flag of train.py, which command.py reads and checks. Nothing here needs torch.

To add a recipe, add an entry to RECIPES. To add a --form, add its name to FORMS, and a case and a row of the table to
srpo_reward.branch_reward. To add a method, add an entry to METHODS, and a function like those of baselines.py. A new
file in this folder also needs its place in FLOORS of tests/test_house.py.

    [released code]  the authors' training code      [paper N]  section N of arXiv 2509.06942
    [ours]           chosen here; nobody published a number
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from engine import command_line as line
from engine.command_line import flag, number_or_folder, or_off, real, whole, words
from engine.errors import UserError
from engine.memory import gpus, modes

FORMS = ("released", "srp", "cfg", "branches", "sgp", "plain")  # the rows of srpo_reward.branch_reward's table

# The learning rate of adapters (--lora) if the model's srpo.json has none: 20 times that of full weights. A guess.
# Adam's steps move B A x as far as W x if the rate is sqrt(3 d_in / R) times as high, which is 17 at rank 32.
LORA_LR = 1e-4
OWN = "own"  # --watch-prompts: some of the user's own prompts or photographs, which are then not trained on


# ------------------------------------------------------------------------------------------- the released recipe
@dataclass
class Trained:
    """what is trained"""
    model: str = flag("black-forest-labs/FLUX.1-dev", help=f"{line.MODEL}; its srpo.json, if there is one, holds "
                      "defaults that suit it", resume=True)
    weights: str = flag(None, line.some_path, line.WEIGHTS + ". A LoRA is trained further with --lora of its rank, and "
                        "merged without --lora", resume=True)
    method: str = flag("srpo", help="what makes the loss: {methods}")
    prompts: str = flag("hpdv2", help="text file, one training prompt a line; .json, .jsonl, .csv or .tsv; hpdv2: from "
                        "the hub [paper 4.1]", model=True, resume=True)
    images: str = flag(None, help="folder of photographs, which replace the rollout: noise is injected into them; "
                       "their captions, in .txt files beside them or a metadata.jsonl, are the prompts [ours]",
                       metavar="DIR", resume=True)
    online_from: int = flag(None, or_off(whole(2)), "with --images: from this update on the model's own pictures are "
                            "used, of the same captions; off: never [ours; the authors' second recipe begins so]",
                            metavar="N")
    size: int = flag(720, whole(1), "side of a picture, pixels; of --images, the root of their area [released code]",
                     model=True)
    seed: int = flag(0, whole(0, 2**31 - 1), "of noise, noise levels and prompt order [ours]")


@dataclass
class Optimizer:
    """the update, by AdamW with betas 0.9 and 0.999"""
    steps: int = flag(19, whole(1), "updates; users report collapse at 20 to 50 [released code]", model=True,
                      resume=True)
    global_batch: int = flag(32, whole(1), "images of an update, of all processes together [released code: 32 GPUs, "
                             "one image each]", model=True)
    lr: float = flag(5e-6, real(0, 1e3, open_low=True), f"learning rate, constant [released code]; with --lora "
                     f"{LORA_LR:g}, a guess, unless the model's srpo.json has another [ours]", model=True)
    weight_decay: float = flag(1e-4, real(0, 1e3), "AdamW's [released code]", model=True)
    clip: float = flag(0.1, real(0, open_low=True), "largest norm of the gradient [released code]", model=True)


@dataclass
class Rollout:
    """the rollout, from noise to the clean latents x0"""
    rollout_steps: int = flag(25, whole(1), "Euler steps [paper 4.1]", model=True)
    rollout_guidance: float = flag(1.0, real(0), "distilled guidance [released code]", model=True)
    cfg: float = flag(None, or_off(real(1)), "classifier-free guidance of rollouts and samples, g of flow.guided, for "
                      "a model that is not distilled: two calls for one velocity; off: one "
                      "[ours; FLUX.2-klein-base and the authors' second recipe: 4]", model=True)
    cfg_gradient: str = flag("off", help="--cfg in a call with a gradient: off, the prompt alone [the authors' "
                             "second recipe]; both, guided too; prompt, guided, but the empty prompt's call has no "
                             "gradient [ours]", choices=("off", "both", "prompt"), model=True)
    cfg_keep_norm: bool = flag(False, help="scale each token of a guided velocity to the norm of the prompt's own "
                               "[ours; the authors' second recipe does]")
    shift: float = flag(3.0, or_off(real(1e-3)), "time shift; off: the model's own [released code]", model=True)
    noise: str = flag("shared", help="shared: one noise prior for all images of an update [released code]; "
                      "independent: one for each; fresh: shared, and other noise to inject",
                      choices=("shared", "independent", "fresh"), model=True)
    rollout_dtype: str = flag("same", help="dtype of the products in the blocks' linear layers in the rollout: same, "
                              "that of the rest; fp8, both factors in float8 [ours]", choices=("same", "fp8"))


@dataclass
class DirectAlign:
    """Direct-Align (Eqs. 3-6)"""
    sigma_range: list = flag([27 / 28, 0.75], real(0, 1, open_high=True), "noise levels that are trained [released "
                             "code: 0.9643 0.75]", metavar=("MAX", "MIN"), model=True)
    cells: int = flag(1000, whole(20, 10**6), "how many levels there are in that range [released code]", model=True)
    groundtruth_ratio: float = flag(0.92, real(0, 1), "share of the range left to the known noise; the network "
                                    "steps over the remaining 1 - ratio [released code: 0.92 HPS, 0.9 Pick]",
                                    model=True)
    branches: list = flag(["denoise", "invert"], words, "denoise, invert, or both [paper 3.2]", model=True)
    injections: int = flag(1, whole(1), "n of Eq. 6: noise levels that a branch visits per image [released code]",
                           model=True)
    guidance: float = flag(3.5, real(0), "distilled guidance of these calls and of samples [released code]", model=True)
    meet: str = flag("landing", help="the level that both branches share: landing, where their step ends [released "
                     "code]; call, where they call the network [paper 3.2]", choices=("landing", "call"), model=True)
    recover: str = flag("velocity", help="Eq. 5: velocity, for a velocity [released code]; epsilon, as printed",
                        choices=("velocity", "epsilon"), model=True)
    lam: list = flag([1.0, 1.0], real(0), "lambda(t) of Eq. 6 at both ends of --sigma-range [released code: none]",
                     metavar=("EARLY", "LATE"), model=True)
    lam_at: str = flag("call", help="t of lambda(t): call, the level where the network is called; landing, the level "
                       "where its step ends; the paper leaves it open [ours; the authors' second recipe: landing]",
                       choices=("call", "landing"), model=True)
    lam_shift: float = flag(1.0, real(1e-3), "between EARLY and LATE lambda(t) follows the time shift of this "
                            "strength; 1: a straight line [the authors' second recipe: 3]")


@dataclass
class Reward:
    """the reward (Eqs. 7-13)"""
    reward: str = flag("hpsv2.1", help="{rewards} (NAME=PATH: weights from there), a .pt in HPSv2.1's layout, or an "
                       "open_clip folder; several with weights: hpsv2.1:0.7,pickscore:0.3; weight 0: watched, "
                       "and not trained on [paper 4.1]", model=True, resume=True)
    control: list = flag(["Natural-lighting", "Detail", "Detailed", "Real"], words, "wanted words, comma-separated, "
                         "cycling with the step [released code]", model=True)
    neg: list = flag(["Concept art", "Painting", "Anime", "Flat", "Oil"], words, "unwanted words, likewise "
                     "[released code]", model=True)
    form: str = flag("released", help="which reward in which branch: the table in srpo_reward.branch_reward [released "
                     "code]; the baselines, which have no inverting branch: plain", choices=FORMS, model=True)
    cfg_k: float = flag(1.5, real(), "k of Eq. 11, for --form cfg [ours; the paper gives none]", model=True)
    discount_denoise: list = flag([0.1, 0.25], real(-1), "d of --form released, denoising branch [released code]",
                                  metavar=("LATE", "EARLY"), model=True)
    discount_invert: list = flag([0.3, 0.01], real(-1), "the same, inverting branch [released code]",
                                 metavar=("LATE", "EARLY"), model=True)
    threshold: float = flag(0.7, or_off(real()), "the loss is relu(threshold - r); off: -r [released code]", model=True)


@dataclass
class Baselines:
    """the baselines"""
    refl_steps: int = flag(6, whole(1), "refl: a rollout stops k steps early, k drawn from 1 to this [as ReFL, the "
                           "last quarter]", model=True)
    group: int = flag(12, whole(2), "dancegrpo: images of a prompt, which are compared [DanceGRPO]", model=True)


# ------------------------------------------------------------------------ watching, the folder and the machine
@dataclass
class Watching:
    """watching for collapse"""
    eval_prompts: str = flag("hpdv2-benchmark", help="text file, or hpdv2-benchmark: the first of them are sampled at "
                             "fixed seeds before and after training [paper 4.2]", model=True, resume=True)
    watch_prompts: str = flag(None, help="text file: prompts that are sampled at fixed seeds while training, and by "
                              "which weights_best is chosen. own: some of --prompts or --images, which are not trained "
                              "on then; the default if you give either. None: the first of --eval-prompts [ours]",
                              model=True, resume=True)
    eval_steps: int = flag(50, whole(1), "sampling steps, of samples and evaluation [paper 4.1]", model=True)
    watch: int = flag(4, whole(1), "how many of --watch-prompts [ours]", model=True)
    watch_every: int = flag(5, whole(1), "updates between two looks at them [ours]", model=True)
    eval: int = flag(None, whole(0), "pictures evaluated before and after; 0: none (None: 16 to 256, if that is under "
                     "a tenth of the run's work) [ours]", model=True)
    land: str = flag(None, or_off(number_or_folder), "the run ends when the SGP gap of the watched pictures, less its "
                     "standard error, reaches this: a number, or the mean gap of the photographs in a folder, with "
                     "captions as for --images; near it the learning rate falls [ours]",
                     metavar="GAP|DIR", resume=True)
    drift_band: list = flag([0.25, 0.1, 0.2, 0.04], real(0), "largest change of these mean statistics of the watched "
                            "pictures; after a larger one a drift warning says that the reward is hacked [ours]",
                            metavar=("SATURATION", "REDNESS", "BRIGHTNESS", "TEXTURE"), model=True)


@dataclass
class Folder:
    """the run's folder"""
    out: str = flag(None, line.some_path, "folder of the run (None: runs/<model>)", resume=True)
    save_every: int = flag(10, whole(1), "updates between checkpoints", resume=True)
    keep: int = flag(2, whole(1), "checkpoints that stay", resume=True)
    save_as: str = flag(None, choices=line.SAVE_AS, help=f"at the end, in out/weights/: {line.SAVE_AS_HELP}",
                        resume=True)
    push_to_hub: str = flag(None, help="at the end, upload out/weights/ with its model card to this repository of the "
                            "hub, OWNER/NAME; `hf auth login` comes first", metavar="ID", resume=True)
    resume: bool = flag(False, help="go on with the run in --out, with its own flags", resume=True)
    overwrite: bool = flag(False, help="delete the run in --out first", resume=True)
    tensorboard: bool = flag(False, help="also write out/tensorboard (needs: pip install tensorboard)", resume=True)
    wandb: bool = flag(False, help="also log to Weights & Biases (needs: pip install wandb)", resume=True)
    explain: bool = flag(False, help="tell one update call by call, with equations and shapes, and draw it: "
                         "explain.png in --out; nothing is trained", resume=True)


@dataclass
class Machine:
    """the machine"""
    batch: int = flag(1, whole(1), "images that a process computes at a time, at most; it makes its share of "
                      "--global-batch in equal batches, whose gradients are accumulated", model=True, resume=True)
    lora: int = flag(None, or_off(whole(1, 4096)), "rank of adapters to train beside frozen weights; off: train all "
                     "weights", metavar="R")
    memory: str = flag("auto", help="where weights and optimizer are, and in which dtype: engine/memory/modes.py; "
                       "auto: the first that the plan says fits this GPU", choices=modes.NAMES)
    cache: str = flag("auto", or_off(line.some_path), "folder where embeddings of prompts and latents of --images are "
                      "kept for other runs, 32 GiB at most; auto: ~/.cache/srpo, and none for a miniature; off",
                      metavar="DIR", resume=True)
    reward_device: str = flag(None, line.device, "the rewards' own device, cpu or cuda:N; the machine's next process "
                              "takes cuda:N+1 for its rewards (None: the process's device)", metavar="DEVICE",
                              resume=True)
    replicas: int = flag(1, whole(1), "HSDP: parameters are sharded inside each of so many groups and copied between "
                         "them; the number of nodes", resume=True)
    checkpointing: bool = flag(True, help="recompute activations in the backward: 21 GiB less for FLUX.1-dev at 720 "
                               "pixels, a quarter more work in the update [released code]", resume=True)
    compile: bool = flag(False, help="torch.compile every transformer block; off, for the start takes a minute "
                         "more, and what it gains is not measured", resume=True)


@dataclass
class Plan:
    """the plan"""
    plan: bool = flag(False, help="print the predicted memory, work and seconds of an update, and stop: no GPU and no "
                      "weights needed", resume=True)
    world_size: int = flag(8, whole(1), "processes that are planned for", resume=True)
    card: str = flag("H200", help=f"GPU that is planned for: {', '.join(gpus.PEAK)}", resume=True)
    share: float = flag(0.4, real(0, 1, open_low=True), "share of the card's peak speed that is reached", resume=True)


GROUPS = (Trained, Optimizer, Rollout, DirectAlign, Reward, Baselines, Watching, Folder, Machine, Plan)


# ------------------------------------------------------------------------------------------- the named recipes
class Recipe(NamedTuple):
    """A named recipe. flags: those that differ from the released recipe."""
    says: str
    flags: dict


RECIPES = {
    "released": Recipe("the defaults, from the released code", {}),
    # Any x0 can be recovered from known noise, so a rough rollout is enough. A second branch cancels what is common to
    # both texts. Eq. 10 has no such part, so one branch is enough.
    "fast": Recipe("a quarter of FLUX.1-dev's work [ours]",
                  {"form": "srp", "branches": ["denoise"], "rollout_steps": 4}),
    # Eqs. 5, 6, 12 and 13, the noise and the guidance as printed. Left out: Eq. 11 (--form cfg), the whole trajectory
    # (--sigma-range 0.99 0.01) and the words of the evaluation.
    "paper": Recipe("the printed forms [ours where the paper gives no number]",
                   {"form": "branches", "recover": "epsilon", "meet": "call", "lam": [1.0, 0.4], "injections": 2,
                    "threshold": None, "noise": "independent", "rollout_guidance": 3.5, "shift": None}),
    "direct-align": Recipe("section 3.1 alone, a row of Table 1 [2 and 0.4 are ours]",
                          {"form": "plain", "branches": ["denoise"], "injections": 2, "lam": [1.0, 0.4],
                           "threshold": None}),
    "2026": Recipe("the authors' recipe for Qwen-Image; words, reward and learning rate are left to the flags",
                  {"form": "srp", "branches": ["denoise"], "injections": 2, "lam": [1.0, 0.0], "lam_shift": 3.0,
                   "lam_at": "landing", "sigma_range": [0.9, 0.2], "cells": 100, "groundtruth_ratio": 0.6,
                   "threshold": None})}


# -------------------------------------------------------------------------------------------------- the methods
class Calls(NamedTuple):
    """How often a method calls the network for one image of an update."""
    without_gradient: float  # on average
    with_gradient: int
    together: int = 1  # how many of these can be one call of the network: engine/memory/one_call.py


class Method(NamedTuple):
    """How a loss is made, and what that costs. A method is added as one entry of METHODS below."""
    losses: str | Callable  # "file.function", a generator of (loss, Term): see train.srpo
    says: str               # for the help
    calls: Callable         # flags -> Calls
    flags: dict = {}        # its own defaults
    is_grouped: bool = False         # whether the --group images of a prompt are compared, so one batch holds them
    optimizer_steps: int = 1         # in an update; with more than one a process makes all its images at once
    takes_photographs: bool = False  # whether --images can replace its rollouts
    never_reads: tuple = ()          # names of flags; command.py tells of those that are given

    def group(self, a):
        """How many images of an update have the same prompt."""
        return a.group if self.is_grouped else 1

    def load(self):
        """The generator of loss terms."""
        if callable(self.losses):
            return self.losses
        file, _, name = self.losses.rpartition(".")
        try:
            return getattr(importlib.import_module(file), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"METHODS in recipe.py: {self.losses!r} cannot be imported: {error}") from error


DRAFT_EXTRA = 2            # n of DRaFT-LV: fresh noises, beside the rollout's own last step
DANCE_KEPT = 0.6           # the share of a rollout's transitions that DanceGRPO trains on
DANCE_OPTIMIZER_STEPS = 3  # of DanceGRPO for each rollout; only the first is on-policy


def srpo_calls(a):
    """The rollout, in those updates where no photographs replace it; then one call for each branch and injection."""
    rolled_out = 1
    if a.images:
        rolled_out = 0 if a.online_from is None else max(0, a.steps - a.online_from + 1) / a.steps
    return Calls(rolled_out * a.rollout_steps, a.injections * len(a.branches), len(a.branches))


def refl_calls(a):
    """A rollout that stops early, then one call."""
    return Calls(a.rollout_steps - (1 + min(a.refl_steps, a.rollout_steps)) / 2, 1)


def draft_lv_calls(a):
    """All steps but the last without a gradient; the last one, and n fresh noises, with one."""
    return Calls(a.rollout_steps - 1, 1 + DRAFT_EXTRA)


def transitions_kept(rollout_steps):
    """How many transitions of a stochastic rollout are trained on. The last one never is."""
    return max(1, int(DANCE_KEPT * (rollout_steps - 1)))


def dancegrpo_calls(a):
    """The rollout, then every transition that is trained on once more."""
    return Calls(a.rollout_steps, transitions_kept(a.rollout_steps))


# The reward of the bare prompt, a noise for each image, and guidance 3.5 in the rollout (DanceGRPO's for FLUX). No
# threshold: the paper gives none for its baselines.
BASELINE = {"form": "plain", "threshold": None, "rollout_guidance": 3.5, "noise": "independent"}
OF_SRPO = ("sigma_range", "cells", "groundtruth_ratio", "branches", "injections", "meet", "recover", "lam", "lam_at",
           "lam_shift", "discount_invert")
METHODS = {
    "srpo": Method("train.srpo", "the paper's", srpo_calls, takes_photographs=True,
                   never_reads=("refl_steps", "group")),
    "refl": Method("baselines.refl", "Eq. 2", refl_calls, BASELINE, never_reads=(*OF_SRPO, "group")),
    "draft-lv": Method("baselines.draft_lv", "Eq. 1", draft_lv_calls, BASELINE,
                       never_reads=(*OF_SRPO, "refl_steps", "group")),
    "dancegrpo": Method("baselines.dancegrpo", "a baseline of the paper", dancegrpo_calls,
                        BASELINE | {"cfg_gradient": "both"}, is_grouped=True,
                        optimizer_steps=DANCE_OPTIMIZER_STEPS, never_reads=(*OF_SRPO, "refl_steps", "threshold"))}
