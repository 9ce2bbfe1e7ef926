"""S5: SRPO with photographs in place of its own pictures, against supervised fine-tuning on the same photographs.

    python -m experiments.offline
    python -m experiments.offline --draw photographs        only the photographs, for --images and --land

The photographs are drawn: scenes of the miniature's world that look like photos. Their captions do not mention
this, and no caption is a held-out prompt. Every way to train starts from the same model and makes the same number of
updates, unless its name gives another number. All are judged on the same held-out prompts and noise.

"Noisier" trains with sigma from 0.99 to 0.9 in place of 0.964 to 0.75. There, almost nothing of the photograph is
visible, so the network's input is like the one in sampling. "Supervised" is one step of flow matching for each update,
|v - (eps - x0)|^2, at the sampler's noise levels. It is run with SRPO's learning rate and with larger ones.
"""

import hashlib
import io
import shlex
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

import command
import direct_align as da
import prepare
import recipe
import train
from baselines import Term
from engine.command_line import some_path, whole
from engine.data import prompt_files
from engine.errors import UserError, frame, printable
from engine.files import must_be_writable, read_json, write_json, write_whole
from engine.memory import parallel, work
from experiments import pages, runs
from experiments.pages import shown
from experiments.runs import Setting
from miniature import world as drawn

LOOK = "realistic photo"  # of the miniature's world
FASTER = (1, 4, 16)  # learning rates of supervised fine-tuning, as multiples of SRPO's
COLUMNS = {"realism": ("realism", ".1%"), "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%"),
           "frechet": ("Frechet", ".1f"), "redness": ("redness", "+.3f"), "sgp": ("SGP", "+.3f"),
           "painting": ("painting", ".1%"), "gflop": ("GFLOP an update", ".2f")}


# -------------------------------------------------------------------------------------------- the photographs
def draw(folder, number, held_out):
    """Write `number` photographs of the world into a folder, each with its caption in a .txt beside it. held_out: the
    set of prompts that no caption may be. Existing files are written again."""
    folder.mkdir(parents=True, exist_ok=True)
    images, scenes = drawn.draw(drawn.sample_style, 2 * number, 0, LOOK)
    captions = [caption.removeprefix(f"{LOOK}. ") for caption in drawn.captions(scenes)]
    allowed = [i for i, caption in enumerate(captions) if caption not in held_out]
    for i in allowed[:number]:
        png = io.BytesIO()
        to_pil_image(images[i]).save(png, "PNG")
        write_whole(folder / f"{i:05d}.png", png.getvalue())
        write_whole(folder / f"{i:05d}.txt", captions[i] + "\n")


def draw_for_a_user(own):
    """--draw: the photographs alone. Raises UserError for a folder that holds something."""
    folder = Path(own.draw)
    must_be_writable(folder, "--draw")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--draw {folder}: is not empty; give a new folder")
    held_out = command.flags(["--model", own.model, *shlex.split(own.flags)]).eval_prompts
    draw(folder, own.photos, set(prompt_files.read_prompts(held_out)))
    print(printable(f"{own.photos} photographs with their captions in {folder}/"))


# --------------------------------------------------------------------------------------------------- supervised
def flow_matching(a, net, reward, batch):
    """A method with one loss term, |v_theta - (eps - x0)|^2. Batches and noise are the same as SRPO's."""
    u = torch.rand(len(batch.prompts), generator=torch.Generator().manual_seed(batch.step))
    sigma = da.shift(u, a.shift or net.shift(batch.x0.shape[1], a.rollout_steps)).to(batch.x0.device)  # [B]
    x_t = da.inject(batch.x0, batch.eps, sigma)
    v_theta = net.velocity(x_t, sigma, batch.c, a.guidance)
    loss = (v_theta - (batch.eps - batch.x0)).square().mean()
    yield loss, Term(batch.prompts, "supervised", x_t, v_theta)


def one_call(a):
    """Flow matching calls the network once for each image."""
    return recipe.Calls(0, 1)


recipe.METHODS["supervised"] = recipe.Method(flow_matching, "flow matching on photographs", one_call,
                                             takes_photographs=True)


# ----------------------------------------------------------------------------------------------- the settings
def settings(a, folder):
    """The `Setting`s of the page. a: the flags that they share. folder: the photographs."""
    offline = f"--images {shlex.quote(str(folder))}"
    noisier = f"{offline} --sigma-range 0.99 0.9"
    longer = a.steps + a.steps // 6
    found = [Setting("SRPO online", ""), Setting("SRPO offline", offline), Setting("SRPO offline, noisier", noisier),
             Setting(f"SRPO offline, noisier, {longer} updates", f"{noisier} --steps {longer}")]
    for faster in FASTER:
        name = "supervised" if faster == 1 else f"supervised, {faster} x lr"
        found.append(Setting(name, f"{offline} --method supervised --lr {faster * a.lr}"))
    return found


def evaluated(setting, own, shared, seed, world):
    """{"before", "after"} training as a `Setting` says, each {column: mean over the held-out pictures}. It is trained
    once, and the numbers are kept in --home. Raises UserError for a model without a judge."""
    argv = [*shared, *shlex.split(setting.flags), "--eval", str(own.pictures), "--seed", str(seed)]
    digest = hashlib.sha256(shlex.join(argv).encode()).hexdigest()[:8]
    kept = Path(own.home) / f"offline_{digest}.json"
    if not kept.exists():
        print(f"{setting.name}, seed {seed}: {shlex.join(argv)}", flush=True)
        write_json(kept, trained(argv, world))
    return read_json(kept, {"before": {str: float}, "after": {str: float}}, "not the numbers of a run; remove it")


def trained(argv, world):
    """Train with these flags of train.py. Returns {"before", "after"} as `evaluated` does."""
    a, model = command.read([*argv, *runs.watch_prompts(argv)])
    prepare.settle(a, model, world)
    run = prepare.set_up(a, model, world)
    if run.watched.judge is None:
        raise UserError(f"--model {a.model}: it has no judge, which is needed to count photos; give the miniature")
    before = run.watched.evaluate("evaluate before")
    for step in range(1, a.steps + 1):
        train.update(a, run, step)
    after = run.watched.evaluate("evaluate after")
    return {"before": means(before), "after": means(after)}


def means(row):
    """{column: mean} of a row of train.py's table."""
    return {column: cell["mean"] for column, cell in row.items() if cell}


def flop_of(setting, shared):
    """The transformer's FLOP in one update of a `Setting`. shared: the flags of all."""
    return work.update_flop(prepare.job(*command.read([*shared, *shlex.split(setting.flags)])))


def main(argv=None):
    with frame("offline"):
        parser = runs.parser(__doc__, seeds=3, pictures=256)
        parser.add_argument("--photos", type=whole(1), default=1000, help="photographs that are drawn")
        parser.add_argument("--draw", type=some_path, metavar="DIR", help="only draw the photographs, into this new "
                            "folder")
        own = runs.parse(parser, argv)
        if own.draw is not None:
            return draw_for_a_user(own)
        shared = ["--model", own.model, *shlex.split(own.flags)]
        a = command.flags(shared)
        world = parallel.World()
        folder = Path(own.home) / f"photographs_{own.photos}"
        draw(folder, own.photos, set(prompt_files.read_prompts(a.eval_prompts)))
        rows = {}
        for setting in settings(a, folder):
            found = [evaluated(setting, own, shared, seed, world) for seed in range(own.seeds)]
            rows["base"] = pages.over_seeds([found[0]["before"]])
            rows[setting.name] = pages.over_seeds([each["after"] for each in found])
            rows[setting.name]["gflop"] = pages.spread([flop_of(setting, shared) / 1e9])
        online, offline = rows["SRPO online"], rows["SRPO offline"]
        result = (f"Partly: realism {shown(offline['realism'], '.1%')}, Frechet {shown(offline['frechet'], '.1f')}, "
                  f"but alignment {shown(offline['alignment'], '.1%')}; online {shown(online['realism'], '.1%')}, "
                  f"{shown(online['frechet'], '.1f')} and {shown(online['alignment'], '.1%')}. Supervised fine-tuning: "
                  f"realism {shown(rows['supervised']['realism'], '.1%')}.")
        told = (f"{own.photos} photographs. {a.steps} updates of {a.global_batch} images, learning rate {a.lr:g}. "
                f"{own.pictures} held-out prompts, {own.seeds} seeds. {pages.ERROR_OF_SEEDS}")
        claim = "Fewer than 1,500 photographs can take the rollout's place (S5); that is more than fine-tuning (4.5)."
        page = pages.Page("Photographs in place of rollouts (S5)", claim, result, told, [(rows, COLUMNS)])
        pages.write(own, "offline", page, pages.bar_figure(rows, ("realism", "alignment", "broken")))
        world.close()


if __name__ == "__main__":
    main()
