"""Build the miniature: a small FLUX with a drawn world, a reward and a judge. `python -m miniature.build` takes about
two hours on one core. The build is seeded, and a build that was stopped continues. `--quick --out FOLDER` builds a toy
in two minutes.

Each stage runs once, and its result stays in .build/ of the folder. To build a stage again, delete its file. The first
stage that needs training pictures draws them.

    vae         AutoencoderKL, 64 x 64 pixels -> 16 x 8 x 8 latents (FLUX's factor of 8, and its 16 channels)
    flow        CLIP text, T5 encoder and FluxTransformer2DModel, trained together by flow matching
    distill     guidance distillation, so that the guidance embedding means the same as in FLUX.1-dev
    reward      an open_clip model trained on pictures and captions, in every look: the unbiased reward
    bias        the same, with an image tower that was trained to like red: the biased reward
    cyan        an image tower that dislikes red
    smooth      an image tower that likes smooth pictures
    saturation  an image tower that likes saturated colours; its reward does not read the text
    cross       a reward that is no dot product: its text encoder attends to the picture, as ImageReward's does
    judge       a network for realism, content and damage; it takes no part in any other training
    export      all of the above in FLUX.1-dev's folder layout, in fp16

`--second` builds the second miniature in miniature2/, a FLUX.2-klein that lives in the same world. It takes the
VAE, the reward, the judge and the prompts of the first: build_klein.py.

The generator and the reward never see a fifth of the pairs of things (world.held_out). The judge learns from its own
pictures, with all pairs among them.
"""

import os
import random
import shutil
from functools import partial
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, FluxPipeline
from safetensors.torch import save

from engine.command_line import Parser, some_path, whole
from engine.errors import UserError, frame
from engine.files import must_be_writable, must_not_lead_away, read_json, write_json, write_whole
from miniature import world
from miniature.build_cross import build_cross, export_cross
from miniature.build_flow import build_distill, build_flow
from miniature.build_judge import build_judge
from miniature.build_klein import build_klein
from miniature.build_scorers import build_bias, build_blind, build_reward, build_unbiased, reward_config
from miniature.build_vae import build_vae
from miniature.fitting import SEED, Workshop

HERE = Path(__file__).resolve().parent
SECOND = HERE.parent / "miniature2"
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
         "reward*")  # the folders that an export writes, beside judge/
QUICK = 0.01  # the share of the steps and pictures for a toy


def write_half(path, model):
    """Write a model's weights in fp16, as safetensors."""
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(tensors))


def export_pipeline(model, folder):
    """Write the generator's part of the layout, which FluxPipeline reads."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0,
                                                base_shift=0.5, max_shift=1.15,
                                                base_image_seq_len=256, max_image_seq_len=4096)
    pipeline = FluxPipeline(scheduler, model.net.vae.half(), model.text.half(), model.words.clip,
                            model.text_2.half(), model.words.t5, model.net.transformer.half())
    save_pipeline(pipeline, folder)


def save_pipeline(pipeline, folder):
    """Write a pipeline of networks in fp16. Its text encoders are to be loaded in float32, like the other parts."""
    pipeline.save_pretrained(folder)
    for config in folder.glob("text_encoder*/config.json"):
        write_whole(config, config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def export_reward(folder, model, words):
    """Write a reward as a folder that open_clip reads."""
    write_half(folder / "open_clip_model.safetensors", model)
    write_json(folder / "open_clip_config.json", reward_config(words))
    words.clip.save_pretrained(folder)


def export_prompts(folder):
    """Write the three files of prompts. prompts.txt: 256 to train on, of pairs of things that the base has seen.

    The other two hold pairs that it has not seen, with a small thing beside a larger one, because these are the
    hardest. prompts_eval.txt: 256 to evaluate on. prompts_select.txt: the others, to choose a recipe by.
    """
    captions = world.all_captions()
    random.Random(SEED).shuffle(captions)
    scenes = [world.parse(caption) for caption in captions]
    kinds = torch.tensor([kind for kind, _ in scenes])
    new = world.held_out(kinds, torch.tensor([layout for _, layout in scenes])).tolist()
    seen = [caption for caption, unseen in zip(captions, new, strict=True) if not unseen]
    hard = [caption for caption, unseen in zip(captions, new, strict=True)
            if unseen and caption.count("small") == 1]
    for name, part in (("prompts", seen[:256]), ("prompts_eval", hard[:256]), ("prompts_select", hard[256:])):
        write_whole(folder / f"{name}.txt", "\n".join(part) + "\n")


def export(shop, folder):
    """Write FLUX.1-dev's folder layout in fp16. FluxPipeline.from_pretrained(folder) loads it."""
    export_pipeline(build_distill(shop), folder)
    unbiased, words, _ = build_unbiased(shop)
    export_reward(folder / "reward_unbiased", unbiased, words)
    export_reward(folder / "reward", build_bias(shop), words)
    for name in ("cyan", "smooth"):
        export_reward(folder / f"reward_{name}", build_bias(shop, name), words)
    export_reward(folder / "reward_saturation", build_blind(shop), words)
    export_cross(folder / "reward_cross", build_cross(shop))
    write_half(folder / "judge" / "judge.safetensors", build_judge(shop))
    export_prompts(folder)
    if folder != HERE:
        for file in ("srpo.json", "judge/look.safetensors"):  # the second judge knows the world, and no model
            shutil.copy(HERE / file, folder / file)


def export_klein(generator, folder):
    """Write the second miniature: FLUX.2-klein's folder layout in fp16. What it shares with the first is not copied:
    srpo.json has its path, and judge is a link.

    FLUX.2's own time shift is made for pictures of 1000 tokens and more. With it, the last of 12 steps would begin at a
    noise level of 0.4 for 16 tokens. So the scheduler has a fixed shift, about the first miniature's.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=1.6)
    net = generator.net
    save_pipeline(Flux2KleinPipeline(scheduler, net.vae.half(), generator.text.half(), generator.words,
                                     net.transformer.half()), folder)
    first = os.path.relpath(HERE, folder)
    flags = read_json(HERE / "srpo.json") | {"cfg": 4.0, "lr": 3e-5, "steps": 24}  # guided, it learns faster
    for name in ("prompts", "watch_prompts", "eval_prompts", "reward"):
        flags[name] = f"{first}/{flags[name]}"
    write_json(folder / "srpo.json", flags)
    judge = folder / "judge"
    judge.unlink(missing_ok=True)
    judge.symlink_to(f"{first}/judge")


STAGES = {"vae": build_vae, "flow": build_flow, "distill": build_distill, "reward": build_reward,
          "bias": build_bias, "cyan": partial(build_bias, name="cyan"),
          "smooth": partial(build_bias, name="smooth"), "saturation": build_blind, "cross": build_cross,
          "judge": build_judge}


def must_be_own(out, flag, parts):
    """Raise UserError if a folder holds files and is not a build's, which has a .build/; or if a link would lead out of
    it."""
    must_be_writable(out, "--out")
    if out.is_dir() and any(out.iterdir()) and out not in (HERE, SECOND) and not (out / ".build").is_dir():
        raise UserError(f"--out {flag}: is not the folder of a build, and not empty; give another --out")
    must_not_lead_away(out, [".build", *parts, *(f"{part}/*" for part in parts)])


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--stage", choices=[*STAGES, "export", "all"], default="all",
        help="only this stage, and the stages that it needs")
    add("--second", action="store_true", help="the second miniature instead")
    add("--out", type=some_path, help="folder of the model (None: miniature, or miniature2); the stages' results stay "
        "in its .build/")
    add("--quick", action="store_true",
        help=f"a toy: {QUICK:.0%}% of the steps and pictures; give another --out")
    add("--threads", type=whole(1, 256), default=1,
        help="CPU threads; another number gives slightly different rounding; compare the time of 1 and 2")
    args = parser.parse_args(argv)
    if args.second and args.stage != "all":
        raise UserError(f"--second --stage {args.stage}: the stages are the first miniature's; leave one out")
    args.out = args.out or str(SECOND if args.second else HERE)
    out = Path(args.out).resolve()
    if args.quick and out in (HERE, SECOND):
        raise UserError(f"--quick --out {args.out}: the toy would overwrite the miniature; "
                        "give another --out")
    must_be_own(out, args.out, PARTS if args.second else (*PARTS, "judge"))
    shop = Workshop(out / ".build", QUICK if args.quick else 1.0)
    torch.set_num_threads(args.threads)
    if args.second:
        return export_klein(build_klein(shop, HERE), out)
    for name, stage in STAGES.items():
        if args.stage in (name, "all"):
            stage(shop)
    if args.stage in ("export", "all"):
        export(shop, out)


if __name__ == "__main__":
    with frame("build"):
        main()
