"""GenEval (HF detector): does the picture show the prompt's things, in the right number, colours and places?

A picture scores 1 if all is right, otherwise 0. GenEval (arXiv 2310.11513) has 553 prompts in six tasks, with 4
pictures of each. A model's score is the mean of its six accuracies.

The rules after detection are the authors' (github.com/djghosh13/geneval, MIT). The detector is the same network,
Mask2Former with a Swin-S. Here its weights are those of Mask2Former's authors, and transformers runs it in place of
mmdetection. So the name says "(HF detector)", and a score is near the published one, not equal to it.
"""

import json
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import to_image

from engine.errors import UserError, one_line
from engine.hub import fetched, not_fetched
from engine.model.configs import strict
from evaluation.picture_folders import Picture, first_of_each
from rewards.base import Column
from rewards.clip_model import network_config
from rewards.pictures import exact

COLUMNS = {"geneval": Column("GenEval (HF detector)", ".3f")}
TASKS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100,
         "color_attr": 100}                         # prompts of each
PICTURES = 4                                        # of each prompt
DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = ("ViT-L-14", "openai")                       # open_clip's names of an architecture and its weights
METADATA = "evaluation_metadata.jsonl"
COMMIT = "af4902f24d3ca90ebbb446dd9891a59e0f82725f"
URL = f"https://raw.githubusercontent.com/djghosh13/geneval/{COMMIT}/prompts/{METADATA}"
SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"

# COCO's order, GenEval's words.
CLASSES = tuple("""person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra,
giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife,
spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush""".replace("\n", " ").split(", "))
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
RELATIONS = ("left of", "right of", "above", "below")
GREY = "#999"                                       # the background of a thing when its colour is classified

CONFIDENCE = 0.3                                    # an instance counts if its score is higher
CONFIDENCE_COUNTING = 0.9                           # the same, for the counting task
MOST = 16                                           # most instances of a class, by score; no suppression of overlaps
POSITION = 0.1                                      # an offset below this share of both things' sizes counts as none

# mmdetection's test pipeline: sides in pixels, mean, std and padding in grey levels of 256.
SHORT = 800
LONG = 1333
MULTIPLE = 32
PADDING = 128
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
CANDIDATES = 100                                    # instances with the highest class scores, before the masks' scores


class Thing(NamedTuple):
    """One detected instance."""
    score: float
    box: tuple          # x0, y0, x1, y1, ends excluded
    mask: torch.Tensor  # [H, W] bool


class Files(NamedTuple):
    """The paths of everything that GenEval needs."""
    metadata: Path      # evaluation_metadata.jsonl
    mask2former: Path   # a folder in transformers' layout
    clip: Path          # a folder in open_clip's layout, or a file of CLIP's weights


# -------------------------------------------------------------------------------------- prompts and files
def metadata_file(where=None):
    """The path of evaluation_metadata.jsonl: `where` itself, or the file in the folder `where`, or GitHub's. GitHub's
    is downloaded once into torch.hub's folder. Raises UserError if there is none."""
    if where is not None:
        if not Path(where).exists():
            raise UserError(f"{where}: no such file or folder")
        path = Path(where) / METADATA if Path(where).is_dir() else Path(where)
        if path.is_file():
            return path
    path = Path(torch.hub.get_dir()) / f"geneval-{COMMIT[:8]}.jsonl"
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), SHA256, progress=False)  # whole, or not there
        except Exception as error:
            raise UserError(f"{URL}: cannot be downloaded: {one_line(error)}") from error
    return path


def is_known(clause, place):
    """Whether a clause, number `place` of its entry, is one that GenEval's rules know."""
    relation, target = clause.get("position", ("above", -1))
    return (clause["class"] in CLASSES and clause["count"] > 0 and clause.get("color", "red") in COLORS
            and relation in RELATIONS and target < place)


def read_metadata(where=None):
    """The 553 entries of `metadata_file(where)`: dicts with tag, prompt and include, a list of clauses. A clause is a
    dict with class, count and, optionally, color or position. A counting prompt also has exclude. Raises UserError if
    it is not that file."""
    path = metadata_file(where)
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        for number, entry in enumerate(entries, 1):
            clauses = entry["include"] + entry.get("exclude", [])
            known = [is_known(clause, place) for place, clause in enumerate(clauses)]
            if not (entry["prompt"].strip() and entry["include"] and all(known)):
                raise ValueError(f"line {number} asks for nothing that GenEval knows")
        if Counter(entry["tag"] for entry in entries) != TASKS:
            raise ValueError(f"not the {sum(TASKS.values())} prompts of GenEval's six tasks")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not GenEval's {METADATA}: {one_line(error)}") from error
    return entries


def pictures(files, args, benchmark):
    """GenEval's own `Picture`s: PICTURES of each prompt, for the first --first prompts of each task (None: all). The
    task is the category. Each picture has its own noise seed, the same for any --first."""
    entries = read_metadata(files.metadata)
    found = []
    for i in first_of_each([entry["tag"] for entry in entries], args.first):
        for k in range(PICTURES):
            number = PICTURES * i + k
            found.append(Picture(f"geneval/{i:05d}_{k}", entries[i]["prompt"], args.seed + number,
                                 entries[i]["tag"], entries[i]))
    return found


def fetch(where=None):
    """The `Files`, from a folder `where` with evaluation_metadata.jsonl, mask2former/ and clip/. Missing ones are
    downloaded. Raises UserError if that fails."""
    metadata = metadata_file(where)
    mask2former = Path(where or "") / "mask2former"
    clip = Path(where or "") / "clip"
    if where is None or not mask2former.is_dir():
        mask2former = fetched(DETECTOR, ["config.json", "*.safetensors"])
    if where is None or not clip.is_dir():
        clip = fetched_clip()
    return Files(metadata, mask2former, clip)


def fetched_clip():
    """The file of CLIP's weights. open_clip downloads it if it is not here. Raises UserError if that fails."""
    try:
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(*CLIP)))
    except Exception as error:
        raise not_fetched(" ".join(CLIP), error) from error


def load(files, args, device):
    """The `GenEval` scorer of `Files`. Raises UserError if they do not fit."""
    return GenEval(files, device)


# ----------------------------------------------------------------------------------------- the authors' rules
def relative_position(a, b):
    """Where box a lies relative to box b: a set of RELATIONS. It has two of them for a diagonal, and none if the
    centres are too near for the boxes' sizes."""
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    slack = [POSITION * (a[i + 2] - a[i] + b[i + 2] - b[i]) for i in (0, 1)]
    kept = [math.copysign(max(abs(o) - s, 0), o) for o, s in zip(offset, slack, strict=True)]
    if max(map(abs, kept)) < 1e-3:
        return set()
    dx, dy = (k / math.hypot(*offset) for k in kept)  # divided by the whole offset's length, so both may be below 1/2
    there = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {relation for relation, yes in zip(RELATIONS, there, strict=True) if yes}


def judge(entry, objects, colors):
    """Whether everything that the entry asks for is right. objects: {class: things, the highest score first}.
    colors(class, things) -> the colour of each.

    Of each class, the clause's count of things with the highest scores is tested. All of them must have the colour. All
    must have the right position relative to every thing of the clause that `position` points to, which is an earlier
    one. Further things of the class are wrong only if `exclude` says so.
    """
    groups = []
    for wanted in entry["include"]:
        things = objects.get(wanted["class"], [])[:wanted["count"]]
        if len(things) < wanted["count"]:
            return False
        if "color" in wanted and set(colors(wanted["class"], things)) != {wanted["color"]}:
            return False
        if "position" in wanted:
            relation, target = wanted["position"]
            for thing in things:
                if any(relation not in relative_position(thing.box, other.box) for other in groups[target]):
                    return False
        groups.append(things)
    for unwanted in entry.get("exclude", []):
        if len(objects.get(unwanted["class"], [])) >= unwanted["count"]:
            return False
    return True


# ------------------------------------------------------------------------------------------- its two networks
def detector_input(picture):
    """A PIL picture -> (pixels [1, 3, H, W], normalised and padded; the (height, width) without the padding). It is
    resized as OpenCV does: bilinear, without antialias, in 8 bits."""
    pixels = to_image(picture).float()[None]
    height, width = pixels.shape[-2:]
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    h = max(1, int(height * scale + 0.5))
    w = max(1, int(width * scale + 0.5))
    pixels = F.interpolate(pixels, (h, w), mode="bilinear").round()
    pixels = F.pad(pixels, (0, -w % MULTIPLE, 0, -h % MULTIPLE), value=PADDING)
    mean = torch.tensor(MEAN).view(3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    return (pixels - mean) / std, (h, w)


def instances(class_logits, mask_logits, padded, inner, size, confidence):
    """The things of one picture by mmdetection's rule: {class: list of `Thing`}. Each list has MOST things at most,
    with scores above the confidence, the highest first.

    class_logits [Q, classes + 1] and mask_logits [Q, h, w] of Q queries. padded, inner, size: (height, width) of the
    padded input, of the picture in it, and of the original picture.

    A query can give things of several classes. A thing's score is its class's probability times the mean of its mask.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]  # the last class is "nothing"
    scores, index = probabilities.flatten().topk(min(CANDIDATES, probabilities.numel()))
    # The mask can only lower a score, so these can be left out before the large masks are computed.
    sure = scores > confidence
    scores = scores[sure]  # [K]
    index = index[sure]
    if not len(index):
        return {}
    queries = index // probabilities.shape[1]
    labels = index % probabilities.shape[1]
    masks = F.interpolate(mask_logits[queries][:, None], padded, mode="bilinear")[..., :inner[0], :inner[1]]
    masks = F.interpolate(masks, size, mode="bilinear")[:, 0]  # [K, height, width]
    inside = masks > 0
    scores = scores * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    found = {}
    for i in scores.argsort(descending=True).tolist():
        things = found.setdefault(CLASSES[labels[i]], [])
        if scores[i] > confidence and len(things) < MOST:
            xs = inside[i].any(0).nonzero().flatten().tolist()
            ys = inside[i].any(1).nonzero().flatten().tolist()
            box = xs[0], ys[0], xs[-1] + 1, ys[-1] + 1
            things.append(Thing(scores[i].item(), box, inside[i].cpu()))
    return {name: things for name, things in found.items() if things}


class Detector(transformers.Mask2FormerPreTrainedModel):
    """transformers' Mask2FormerForUniversalSegmentation without its loss, because the loss needs scipy."""

    # The file holds tensors of the loss, and computed ones. It lacks a norm of Swin that Mask2Former does not use.
    _keys_to_ignore_on_load_unexpected = [r"^criterion\.", r"\.relative_position_index$"]
    _keys_to_ignore_on_load_missing = [r"^model\.pixel_level_module\.encoder\.swin\.layernorm\."]

    def __init__(self, config):
        super().__init__(config)
        self.model = transformers.Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    def forward(self, pixels):
        """[1, 3, H, W] -> logits of the classes [Q, classes + 1] and of the masks [Q, H / 4, W / 4]."""
        out = self.model(pixels, output_hidden_states=True)
        queries = out.transformer_decoder_intermediate_states[-1]  # [Q, 1, D]
        return self.class_predictor(queries)[:, 0], out.masks_queries_logits[-1][0]


class GenEval:
    """`Files` as a scorer, in float32. Raises UserError if they are not a Mask2Former of COCO's classes and a CLIP, or
    if a tensor is missing or unknown."""

    def __init__(self, files, device="cpu"):
        self.device = device
        self.detector = strict(Detector, files.mask2former, torch.float32).to(device)
        names = self.detector.config.id2label  # some words differ from GenEval's; the classes are the same
        if (len(names), names.get(0), names.get(79)) != (len(CLASSES), CLASSES[0], CLASSES[-1]):
            raise UserError(f"{files.mask2former}: does not detect COCO's {len(CLASSES)} classes")
        if files.clip.is_file():  # OpenAI's models use QuickGELU, which open_clip does not infer from this name
            name = CLIP[0]
            more = {"pretrained": str(files.clip), "force_quick_gelu": True}
        else:
            network_config(files.clip)
            name = f"local-dir:{files.clip}"
            more = {}
        try:
            self.clip = open_clip.create_model(name, require_pretrained=True, **more).to(device).eval()
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:
            what = " ".join(str(error).split())[:200]
            raise UserError(f"{files.clip}: not a CLIP of open_clip: {what}") from error
        self.texts = {}  # class: its colours' features [10, D]

    def color_features(self, name):
        """Unit text features [10, D] of a class in the ten colours: the mean over the templates, cached."""
        if name not in self.texts:
            texts = self.tokenizer([t.format(color, name) for color in COLORS for t in TEMPLATES])
            features = F.normalize(self.clip.encode_text(texts.to(self.device)), dim=-1)
            self.texts[name] = F.normalize(features.view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1)
        return self.texts[name]

    def colors(self, picture, name, things):
        """The colour of each thing of one class: CLIP's choice for the thing's box, with a grey background."""
        visual = self.clip.visual
        crops = []
        for thing in things:
            grey = Image.new("RGB", picture.size, GREY)
            crop = Image.composite(picture, grey, Image.fromarray(thing.mask.numpy())).crop(thing.box)
            crops.append(exact(crop, visual.image_size[0], visual.image_mean, visual.image_std))
        features = self.clip.encode_image(torch.stack(crops).to(self.device))  # [things, D]
        nearest = (features @ self.color_features(name).T).argmax(-1)  # [things], of ten
        return [COLORS[i] for i in nearest.tolist()]

    @torch.no_grad()
    def __call__(self, pictures, entries):
        """B PIL pictures (RGB, any size) and the entries of their prompts (`read_metadata`) -> {"geneval": [B] float32
        on the CPU, 1 or 0}. Pictures are processed one at a time, because their sizes may differ."""
        correct = []
        for picture, entry in zip(pictures, entries, strict=True):
            confidence = CONFIDENCE_COUNTING if entry["tag"] == "counting" else CONFIDENCE
            pixels, inner = detector_input(picture)
            classes, masks = self.detector(pixels.to(self.device))
            objects = instances(classes, masks, pixels.shape[-2:], inner, picture.size[::-1], confidence)
            correct.append(judge(entry, objects, partial(self.colors, picture)))
        return {"geneval": torch.tensor(correct, dtype=torch.float32)}
