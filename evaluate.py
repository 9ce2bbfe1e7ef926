"""Prompts to the table of metrics (Table 1 of the paper), for a model and for trained weights of it.

    python evaluate.py                                                    FLUX.1-dev on the HPDv2 benchmark
    python evaluate.py --weights runs/FLUX.1-dev/weights                  and trained weights beside it
    python evaluate.py --model miniature --weights runs/miniature/weights
    python evaluate.py --images base=DIR srpo=DIR                         pictures that exist, any model's

Stage 1 makes the pictures (PNG, named by their prompt's number), and stage 2 the scores (JSONL), with one scorer in
memory at a time. Both go on where they were stopped. torchrun splits the prompts over processes, with the same result.
"""

import math
import sys
from datetime import timedelta
from pathlib import Path

from engine.loading import until_loaded

if __name__ == "__main__":
    until_loaded("evaluate.py")  # importing what follows takes seconds

import torch
from tqdm import tqdm

import command
import flow
import rewards
from engine.command_line import WEIGHTS, Parser, given, must_differ, phrase, sides, some_path, whole
from engine.data import prompt_files
from engine.errors import DISK_FAILS, UserError, frame, in_words, printable
from engine.files import write_json, write_whole
from engine.memory import modes, parallel, sampling
from engine.model import trained
from evaluation import metrics, picture_folders, sheets, table_formats, tables
from evaluation.scores import Outcome, Task, free, merged, reason, score, share


def main():
    """Both stages, from the command line to the table."""
    with frame("evaluate.py", "stopped; run it again to go on"):
        try:
            status = run(sys.argv[1:])
        except OSError as error:
            if error.errno not in DISK_FAILS:
                raise
            raise OSError(f"{in_words(error)}; run it again to go on") from error
        sys.exit(status)


def run(argv):
    """Both stages, then the table. Returns the exit status: 1 if a picture could not be read."""
    args, model = command.of_script(flags(), argv)
    if args.images and "eval_prompts" not in given(flags(), argv):
        args.eval_prompts = None  # then the pictures' folders must hold theirs
    world = parallel.World(patience=timedelta(days=30), mesh=modes.needs_mesh(args.memory))
    methods, prompts = rows(args, model, world)
    for note in [] if args.images else model.notes(vars(args)):
        world.say(note)
    for note in [note for method in methods for note in trained.notes(method.weights)]:
        world.say(note)
    benchmark = picture_folders.benchmark(prompts, args.seed, args.first)
    tasks, missing = available(args, methods, benchmark, world)
    groups = [benchmark, *(task.pictures for task in tasks if task.pictures is not benchmark)]

    if world.main:
        picture_folders.clean(args.out, *(method.folder for method in methods if not args.images))
    world.gather(None)
    if not args.images:
        for pictures in groups:
            generate(args, model, methods, pictures, prompts, world)
    world.gather(None)  # what one process sampled another may score

    outcome = Outcome({method.name: {} for method in methods}, missing)
    for task in tasks:
        score(args, task, methods, world, outcome)
    outcome = merged(world.gather(outcome))
    must_have(tasks, outcome.missing, world)
    world.close()

    if not world.main:
        return 0
    pictures = list({picture.name: picture for group in groups for picture in group}.values())
    return finish(args, methods, tasks, pictures, outcome)


# ------------------------------------------------------------------------------------ what the user asks for
def flags():
    """The flags of this script."""
    parser = Parser(__doc__)
    add = parser.add_argument
    sampling.add_flags(add)
    add("--weights", nargs="+", action="extend", default=[], metavar="[NAME=]PATH",
        help="several, each compared with the base: " + WEIGHTS)
    add("--prefix", type=phrase, help="words that a further row has before its prompts, sampled from the "
        "base: what a prompt alone can do [paper, Fig. 9 b]")
    add("--images", nargs="+", action="extend", default=[], metavar="[NAME=]PATH",
        help="score folders of pictures named by their prompt's number, and sample nothing; the first one is "
             "what the others are compared with")
    add("--prompts", "--eval-prompts", dest="eval_prompts", default="hpdv2-benchmark",
        help="text file, one prompt a line, a folder of .json lists, or hpdv2-benchmark")
    add("--first", type=whole(1), help="how many prompts of each category, from the first (None: all)")
    add("--per-prompt", type=int, choices=[1, 2, 4, 8, 16], default=1, help="pictures of a prompt, from as "
        "many noise seeds, for the column diversity; 1: without it [as others measure: 4]")
    add("--metrics", default="aesthetic,pickscore,imagereward,hpsv2.1,geneval,deqa",
        help=f"of {', '.join(metrics.names())}; NAME=PATH takes a scorer's files from there [paper 4.2]")
    add("--reward", default="hpsv2.1", help="for the metric `reward`: as train.py's")
    add("--control", type=phrase, default="Realistic photo",
        help="the wanted words of the SGP gap [paper 4.2]")
    add("--neg", type=phrase, default="CG Render", help="the unwanted words of the SGP gap [paper 4.2]")
    add("--out", type=some_path, help="folder of pictures, scores, table.md, table.csv, table.tex, results.json, "
        "pictures.jsonl and sheet.png (None: runs/evaluate_<model>)")
    return parser


def rows(args, model, world):
    """(the table's rows, `Method`s; their prompts). Raises UserError for flags that do not fit."""
    if args.per_prompt > 1 and "diversity" not in metrics.parse_metrics(args.metrics):
        args.metrics += ",diversity"
    args.out = args.out or "runs/evaluate_" + ("images" if args.images else Path(args.model).name)
    metrics.all_shown(metrics.parse_metrics(args.metrics))
    rewards.parse_rewards(args.reward)
    must_differ([args.control], [args.neg])
    for flag, value in (("--prefix", args.prefix), ("--weights", args.weights)):
        if args.images and value:
            raise UserError(f"--images and {flag}: pictures that exist, or pictures to sample; give one")
    if args.images:
        picture_folders.must_be_own(args.out, [])
        return picture_folders.existing(args)
    flow.needs_gpu(model)
    command.check_cfg(args, model)
    job = sampling.job(model, args.size, args.batch, args.cfg)
    args.memory, why = world.decide(sampling.settle, job, args.memory, world)
    if why:
        world.say(why)
    for path in picture_folders.named("--weights", args.weights).values():
        trained.check(path, model)
    prompts = prompt_files.read_prompts_by_category(args.eval_prompts)
    return picture_folders.planned(args, prompts), prompts


def available(args, methods, benchmark, world):
    """([`Task`] of the metrics whose files can be had, {metric: why not} of the others), the same on all
    processes. Raises UserError if none can be had."""
    tasks = []
    missing = {}
    for name, where in metrics.parse_metrics(args.metrics).items():
        metric = metrics.find(name)
        has_own = hasattr(metric, "pictures")
        try:
            if has_own and args.images and not any(
                    file.startswith(f"{name}/") for method in methods for file in method.files):
                raise UserError(f"no pictures of its prompts, {name}/00000_0.png and so on, in these folders")
            files = metrics.fetch(metric, where, args)
            pictures = metric.pictures(files, args, benchmark) if has_own else benchmark
            tasks.append(Task(name, metric, files, pictures))
        except (UserError, OSError) as error:
            missing[name] = reason(name, error)
    for theirs in world.gather(missing):
        missing |= theirs
    must_have(tasks, missing, world)
    if world.main:
        for name, why in missing.items():
            print(printable(f"{name}: - ({why}); --metrics {name}=PATH takes its files from there"))
    return [task for task in tasks if task.name not in missing], missing


def must_have(tasks, missing, world):
    """Raises UserError, in every process, if no metric is left. The process group is closed before, so that only the
    first process prints the error."""
    if all(task.name in missing for task in tasks):
        world.close()
        raise UserError("--metrics: none can be had, give NAME=PATH: " + "; ".join(missing.values()))


# ---------------------------------------------------------------------------------- stage 1: what is sampled
@torch.no_grad()
def generate(args, model, methods, pictures, benchmark, world):
    """Sample the pictures that do not exist, or are incomplete. If a chunk lacks one picture, the whole chunk is
    sampled, so that a picture does not depend on what was there. Only what was missing is written. benchmark: the
    prompts for prompts.json."""
    lacking = {}
    for method in methods:
        chunks = share(pictures, args.batch, world)
        lacking[method.name] = [chunk for chunk in chunks if lacks(method, chunk)]
    prompts = []
    for method in methods:
        prompts += [method.asks(picture) for chunk in lacking[method.name] for picture in chunk]
    prompts = list(dict.fromkeys(prompts))
    if not any(world.gather(prompts)):
        return
    model.fetch()
    embeddings = flow.encode_here(model, prompts, world)
    if not prompts:
        return
    embeddings.say_truncated(world.say)
    number = {prompt: i for i, prompt in enumerate(prompts)}
    for method in methods:
        if not lacking[method.name]:
            continue
        net = flow.load(model, method.weights, world.device, world.dtype,
                        *sampling.how(args.memory, method.weights, model, world))
        net.guide(args.cfg, embeddings.empty)
        grid = net.grid(*sides(args.size))
        picture_folders.make_own(args.out)
        picture_folders.begin(method.folder, method.made, benchmark)
        for chunk in tqdm(lacking[method.name], f"sample {method.name}", leave=False, disable=not world.main):
            numbers = [number[method.asks(p)] for p in chunk]
            noise = flow.noise(net, grid, [p.seed for p in chunk])
            images = flow.sample(net, embeddings.txt[numbers], embeddings.pooled[numbers], noise, grid,
                                 args.eval_steps, args.guidance, len(chunk))  # [B, 3, H, W]
            wanted = lacks(method, chunk)
            for picture, image in zip(chunk, images, strict=True):
                if picture in wanted:
                    picture_folders.save_picture(image, method.path(picture),
                                                 mark=picture_folders.mark_of(method.made))
        del net
        free()


def lacks(method, chunk):
    """The pictures of a chunk that do not exist, or are incomplete."""
    return [picture for picture in chunk if not picture_folders.is_whole(method.path(picture))]


# ------------------------------------------------------------------------------------------------- the table
def finish(args, methods, tasks, pictures, outcome):
    """Write and print the results; the exit status."""
    out = Path(args.out)
    asked = metrics.parse_metrics(args.metrics)
    columns = tables.in_order(metrics.all_shown(asked))
    tasks = [task for task in tasks if task.name not in outcome.missing]
    task_of = {column: task for task in tasks for column in task.metric.COLUMNS}
    pictures_of = {column: task_of[column].pictures for column in columns if column in task_of}
    sets = [task for task in tasks if hasattr(task.metric, "of_set")]
    categories = list(dict.fromkeys(picture.category for picture in pictures))
    results = tables.results([m.name for m in methods], pictures_of, categories, outcome.scores)
    for task in sets:
        for name, found in outcome.scores.items():
            results[name]["overall"] |= of_set(task, found)
    made = table_formats.tables_of(results, columns, settings_in_words(args))
    write_json(out / "results.json", {"args": vars(args), "missing": outcome.missing,
                                      "unreadable": outcome.unreadable, "rows": results})
    write_whole(out / "pictures.jsonl", tables.per_picture(pictures, outcome.scores))
    text = "\n\n".join([table_formats.MEANING, *map(table_formats.markdown, made)])
    write_whole(out / "table.md", text + "\n")
    table_formats.write(out, made)
    sheets.contact_sheet(methods, pictures, out / "sheet.png")
    print(f"{table_formats.MEANING}\n\n{table_formats.for_the_terminal(made)}\n")
    tell_gaps(methods, tasks, pictures, outcome)
    for name, why in outcome.missing.items():
        print(printable(f"{name}: no scores ({why})"))
    print(printable(f"pictures, scores, table.md, table.csv, table.tex, results.json, pictures.jsonl and sheet.png in "
                    f"{out}/"))
    return 1 if outcome.unreadable else 0


def settings_in_words(args):
    """How the pictures of the table are made, as a line."""
    if args.images:
        return "Pictures that exist already."
    height, width = sides(args.size)
    return printable(f"{args.model}; {args.eval_prompts}; {width} x {height} pixels, {args.eval_steps} steps, guidance "
                     f"{args.guidance:g}, noise seeds from {args.seed}.")


def of_set(task, found):
    """A metric's numbers of all pictures of a row together, {column: a dict as `tables.mean` returns, or None}. found:
    {picture's name: {column: value}}, the scores of the row."""
    scored = [picture for picture in task.pictures if picture.name in found]
    values = {column: torch.tensor([found[picture.name].get(column, math.nan) for picture in scored])
              for column in task.metric.COLUMNS}
    return task.metric.of_set(values, [picture.prompt for picture in scored])


def tell_gaps(methods, tasks, pictures, outcome):
    """Say what the means leave out, and why."""
    for method in methods:
        absent = sum(not method.path(p).exists() for p in pictures)
        if absent:
            print(f"{method.name}: {absent} of {len(pictures)} pictures are not there; "
                  f"means are over the others")
        for task in tasks:
            for column in task.metric.COLUMNS:
                values = [found.get(column, 0) for found in outcome.scores[method.name].values()]
                odd = sum(not math.isfinite(value) for value in values)
                if odd and column not in getattr(task.metric, "UNDEFINED", ()):
                    print(f"{method.name}: {odd} scores of {column} are not finite; "
                          f"the mean is over the others")
    for line in outcome.unreadable[1:]:
        print(printable(f"{line}; left out"))
    if outcome.unreadable:
        n = len(outcome.unreadable)
        print(printable(f"evaluate.py: {n} picture{'s' * (n > 1)} could not be read; means are over the others: "
                        f"{outcome.unreadable[0]}"), file=sys.stderr)


if __name__ == "__main__":
    main()
