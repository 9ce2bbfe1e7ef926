"""Prompts to the table of metrics (Table 1 of the paper): a model, and what training made of it.

    python evaluate.py                                                    FLUX.1-dev on the HPDv2 benchmark
    python evaluate.py --weights runs/FLUX.1-dev/weights                  and trained weights beside it
    python evaluate.py --model miniature --weights runs/miniature/weights
    python evaluate.py --images base=DIR srpo=DIR                         pictures that exist, any model's

First the pictures (PNG, named by their prompt's number), then the scores (JSONL), one scorer in memory at a
time. Both go on where they were stopped; torchrun splits the prompts over processes, with the same result.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import sys
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
from torchvision.utils import save_image
from tqdm import tqdm

import flux
from evaluation import picture_folders as gallery
from engine import parallel
from evaluation import tables
from engine.old_flags import Help, check_sampling
from evaluation.metrics import METRICS, geneval, parse_metrics
from rewards.pictures import read_picture
from engine.files import one_line, stamp

SCORED_AT_ONCE = 16


def share(pictures, size, world):
    """This process's part of a list, in chunks of `size` that are the same for any number of processes, so
    that a picture always meets the same batch, and comes out the same."""
    chunks = [pictures[i:i + size] for i in range(0, len(pictures), size)]
    return chunks[world.rank::world.size]


@torch.no_grad()
def generate(args, methods, pictures, world):
    """Stage 1: sample what is not there yet. A chunk that lacks one picture is sampled whole, and what it
    lacks is written, each file whole or not at all."""
    lacking = {m.name: [chunk for chunk in share(pictures, args.batch, world)
                        if not all(m.path(p).exists() for p in chunk)] for m in methods}
    prompts = list(dict.fromkeys(p.prompt for chunks in lacking.values() for c in chunks for p in c))
    if not prompts:
        return
    txt, pooled, cut = flux.encode_prompts(args.model, prompts, world.device, world.dtype)
    if cut:
        print(f"{cut} of {len(prompts)} prompts are longer than the text encoder takes; their end is "
              f"not seen")
    row = {prompt: i for i, prompt in enumerate(prompts)}
    for method in (m for m in methods if lacking[m.name]):
        model = flux.load(args.model, method.weights, world.device, world.dtype)
        grid = model.grid(args.size, args.size)
        for chunk in tqdm(lacking[method.name], f"sample {method.name}", leave=False, disable=not world.main):
            rows, eps = [row[p.prompt] for p in chunk], flux.noise(model, grid, [p.seed for p in chunk])
            images = flux.sample(model, txt[rows], pooled[rows], eps, grid, args.eval_steps, args.guidance,
                                 len(chunk))
            for path, image in zip(map(method.path, chunk), images):
                if not path.exists():
                    path.parent.mkdir(exist_ok=True)
                    beside = path.with_name(f".{path.name}")
                    save_image(image, beside, format="png")
                    beside.replace(path)
        del model
        free()


def free():
    """Give back the memory of models that are no longer held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def scores_on_disk(folder, metric):
    """{key: {column: value}} of the lines that any process has written; one cut off by a kill is left out."""
    found = {}
    for file in folder.glob(f"{metric}.*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
                found[entry["key"]] = entry["scores"]
            except ValueError:
                pass
    return found


def settings_of(metric, files, args):
    """What a metric's scores depend on beside the picture and its prompt: the words, the scorer's files."""
    places = files.values() if isinstance(files, dict) else files if isinstance(files, tuple) else [files]
    return [metric, args.control, args.neg, str(files), stamp(*(place for place in places if place))]


def keys_of(method, pictures, settings, unreadable):
    """{picture name: key} of those that are there: what a score depends on as one word, the picture's bytes,
    its prompt and the settings."""
    keys = {}
    for p in pictures:
        words = json.dumps([p.prompt, p.entry, *settings]).encode()
        try:
            if method.path(p).exists():
                keys[p.name] = hashlib.sha256(method.path(p).read_bytes() + words).hexdigest()[:24]
        except OSError as error:
            unreadable.append(f"{method.path(p)}: cannot be read as a picture: {error.strerror}")
    return keys


def read_all(method, pictures, unreadable):
    """{picture name: PIL} of those that can be read; what is wrong with the others is added to
    `unreadable`."""
    images = {}
    for p in pictures:
        try:
            images[p.name] = read_picture(method.path(p))
        except ValueError as error:
            unreadable.append(str(error))
    return images


@torch.no_grad()
def score(args, metric, settings, scorer, method, pictures, world):
    """Stage 2, one metric and one row of the table: score what is not scored yet, and append it, a line a
    picture. scorer() loads the scorer, if it is needed. Returns ({picture name: {column: value}}, [what could
    not be read]) of this process's share."""
    folder = Path(args.out) / "scores" / method.folder.name
    folder.mkdir(parents=True, exist_ok=True)
    known, scores, unreadable = scores_on_disk(folder, metric), {}, []
    mine = folder / f"{metric}.{world.rank}.jsonl"
    cut_off = mine.exists() and mine.read_bytes()[-1:] not in (b"", b"\n")
    with open(mine, "a") as log:
        log.write("\n" if cut_off else "")
        for chunk in tqdm(share(pictures, SCORED_AT_ONCE, world), f"{metric} {method.name}", leave=False,
                          disable=not world.main):
            keys = keys_of(method, chunk, settings, unreadable)
            chunk = [p for p in chunk if p.name in keys]
            if not set(keys.values()) <= known.keys():
                images = read_all(method, chunk, unreadable)
                chunk = [p for p in chunk if p.name in images]
                values = chunk and scorer()(list(images.values()), [p.entry or p.prompt for p in chunk])
                for i, p in enumerate(chunk):
                    if keys[p.name] not in known:
                        known[keys[p.name]] = {column: float(v[i]) for column, v in values.items()}
                        log.write(json.dumps({"picture": p.name, "key": keys[p.name],
                                              "scores": known[keys[p.name]]}) + "\n")
                log.flush()
            scores |= {p.name: known[keys[p.name]] for p in chunk}
    return scores, unreadable


def flags():
    """The flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--model", default="black-forest-labs/FLUX.1-dev", help="folder in FLUX.1-dev's layout, or hub id")
    add("--weights", nargs="*", default=[], metavar="[NAME=]PATH",
        help="folders of trained transformer weights, each compared with the base")
    add("--images", nargs="*", default=[], metavar="[NAME=]PATH",
        help="score folders of pictures named by their prompt's number, and sample nothing; the first one is "
             "what the others are compared with")
    add("--prompts", dest="eval_prompts", default="hpdv2-benchmark",
        help="text file, one prompt a line, a folder of .json lists, or hpdv2-benchmark")
    add("--first", type=int, help="how many prompts of each category, from the first (None: all)")
    add("--metrics", default="aesthetic,pickscore,imagereward,hpsv2.1,geneval,deqa",
        help=f"of {', '.join(METRICS)}; NAME=PATH takes a scorer's files from there [paper 4.2]")
    add("--reward", default="hpsv2.1", help="for the metric `reward`: as train.py's")
    add("--control", default="Realistic photo", help="the wanted words of the SGP gap [paper 4.2]")
    add("--neg", default="CG Render", help="the unwanted words of the SGP gap [paper 4.2]")
    add("--size", type=int, default=1024, help="side of the pictures, pixels [authors' answer for Table 1]")
    add("--eval-steps", type=int, default=50, help="sampling steps [paper 4.1]")
    add("--guidance", type=float, default=3.5, help="distilled guidance of sampling [FLUX.1-dev]")
    add("--seed", type=int, default=0, help="prompt i is sampled from noise seed + i, for every model")
    add("--batch", type=int, default=1, help="pictures sampled at a time")
    add("--out", help="folder of pictures, scores, table.md, results.json and sheet.png "
                      "(None: runs/evaluate_<model>)")
    return parser


def available(args, metrics, world):
    """({metric: files} of those whose weights can be had, {metric: why not} of the others), the same on all
    processes."""
    files, missing = {}, {}
    for name, where in metrics.items():
        try:
            files[name] = METRICS[name][1](where, args)
        except (ValueError, OSError) as error:
            missing[name] = one_line(error).removeprefix(f"{name}: ").removesuffix(f"; give {name}=PATH")
    for theirs in world.gather(missing):
        missing |= theirs
    return {k: v for k, v in files.items() if k not in missing}, missing


def must_have(files, missing, world):
    """ValueError, of one process, if no metric is left."""
    if not files.keys() - missing.keys():
        if not world.main:
            sys.exit(2)
        raise ValueError("--metrics: none can be had, give NAME=PATH: " + "; ".join(missing.values()))


def tell(missing, world):
    """Say which metrics cannot be had, and why."""
    for metric, why in missing.items() if world.main else ():
        print(f"{metric}: - ({why}); --metrics {metric}=PATH takes its files from there")


def prepare():
    """From the command line: (flags, world, rows of the table, {metric: files}, {metric: why not}, pictures).
    Raises ValueError with one line."""
    args = flux.parse_flags(flags())
    args.out = args.out or "runs/evaluate_" + ("images" if args.images else Path(args.model).name)
    metrics = parse_metrics(args.metrics)
    if not args.images:
        flux.needs_gpu(args.model)
        flux.check_size(args.model, args.size)
    check_sampling(args)
    if args.images:
        methods, prompts = gallery.existing(args)
    else:
        prompts = flux.read_prompts_by_category(args.eval_prompts)
        methods = gallery.planned(args, prompts)
    world = parallel.World(patience=timedelta(days=30))
    none = args.images and not any(name.startswith("geneval/") for m in methods for name in m.files)
    wanted = {name: where for name, where in metrics.items() if not (none and name == "geneval")}
    files, missing = available(args, wanted, world)
    if wanted != metrics:
        missing["geneval"] = "no pictures of its prompts, geneval/00000_0.png and so on, in these folders"
    must_have(files, missing, world)
    tell(missing, world)
    pictures = gallery.benchmark(prompts, args.seed, args.first)
    if "geneval" in files:
        entries = geneval.read_metadata(files["geneval"]["metadata"])
        pictures += gallery.geneval_pictures(entries, args.seed, args.first, geneval.PICTURES)
    return args, world, methods, files, missing, pictures


def run():
    """Both stages, then the table. Returns the exit status: 1 if a picture could not be read."""
    args, world, methods, files, missing, pictures = prepare()
    ours, theirs = [p for p in pictures if not p.entry], [p for p in pictures if p.entry]
    for part in (ours, theirs) if not args.images else ():
        generate(args, methods, part, world)
    world.gather(None)  # what one process sampled another may score
    scores, unreadable = {m.name: {} for m in methods}, []
    for metric, path in files.items():
        load = cache(lambda: METRICS[metric][2](path, args, world.device))
        settings = settings_of(metric, path, args)
        try:
            for m in methods:
                which = theirs if metric == "geneval" else ours
                found, bad = score(args, metric, settings, load, m, which, world)
                unreadable += bad
                for name, values in found.items():
                    scores[m.name].setdefault(name, {}).update(values)
        except ValueError as error:
            missing[metric] = one_line(error).removeprefix(f"{metric}: ")
        del load
        free()
    parts = world.gather((scores, unreadable, missing))
    world.close()
    if not world.main:
        return 0
    for theirs, bad, why in parts[1:]:
        unreadable, missing = unreadable + bad, missing | why
        for name in scores:
            for picture, values in theirs[name].items():
                scores[name].setdefault(picture, {}).update(values)
    must_have(files, missing, world)
    status = finish(args, methods, missing, pictures, scores, sorted(set(unreadable)))
    tell(missing, world)
    return status


def finish(args, methods, missing, pictures, scores, unreadable):
    """Write and print the results; the exit status."""
    out = Path(args.out)
    asked = {column for metric in parse_metrics(args.metrics) for column in METRICS[metric][0]}
    columns = [column for column in tables.COLUMNS if column in asked]
    had = [column for column in columns if not any(column in METRICS[metric][0] for metric in missing)]
    found = tables.results([m.name for m in methods], had, pictures, scores)
    text = tables.report(found, columns)
    gallery.write_json(out / "results.json", {"args": vars(args), "missing": missing,
                                              "unreadable": unreadable, "rows": found})
    (out / "table.md").write_text(text, "utf-8")
    gallery.contact_sheet(methods, pictures, out / "sheet.png")
    print(text)
    for m in methods:
        absent = sum(not m.path(p).exists() for p in pictures)
        if absent:
            print(f"{m.name}: {absent} of {len(pictures)} pictures are not there; means are over the others")
        for column in had:
            odd = sum(not math.isfinite(values.get(column, 0)) for values in scores[m.name].values())
            if odd and column != "alignment":  # which a prompt outside the miniature's world does not have
                print(f"{m.name}: {odd} scores of {column} are not finite; the mean is over the others")
    for line in unreadable:
        print(f"evaluate.py: {line}; left out", file=sys.stderr)
    if unreadable:
        print(f"evaluate.py: {len(unreadable)} pictures could not be read", file=sys.stderr)
    print(f"pictures, scores, table.md, results.json and sheet.png in {out}/")
    return 1 if unreadable else 0


def main():
    try:
        sys.exit(run())
    except ValueError as error:
        rank = int(os.environ.get("RANK", 0))
        if rank == 0 or parallel.dist.is_initialized():  # before that, all processes meet the same error
            print("evaluate.py: " + (f"rank {rank}: " if rank else "") + str(error), file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full or vanished disk: what is there stays, and is not made again
        print(f"\nevaluate.py: {error}; run it again to go on", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
