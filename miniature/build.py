"""Build the miniature from nothing: `python -m miniature.build` (resumable, seeded, about an hour and a half
on 2 cores).

Stages, each finished once and kept in miniature/.build/ (delete a stage's file to build it again). The
pictures that they learn from, 49,152 with their truth, are drawn by the first stage that needs them.

    vae         AutoencoderKL, 64 x 64 pixels -> 16 x 8 x 8 latents (FLUX's factor of 8, and its 16 channels)
    flow        CLIP text, T5 encoder and FluxTransformer2DModel, trained together by flow matching
    distill     guidance distillation, so that the guidance embedding means what FLUX.1-dev's means
    reward      an open_clip model trained on pictures and captions, in every style: the unbiased reward
    bias        the same, its image tower taught a liking for red that no caption asks for: the biased reward
    judge       a network that no training ever sees, which tells realism, content and damage
    export      everything above, as FLUX.1-dev's folder layout in fp16
"""

import random
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import save

from engine.command_line import Parser, whole
from engine.errors import frame
from engine.files import write_json, write_whole
from miniature import world
from miniature.build_flow import build_distill, build_flow, build_vae
from miniature.build_scorers import build_bias, build_judge, build_reward, build_unbiased, reward_config
from miniature.fitting import SEED

HERE = Path(__file__).resolve().parent


def write_half(path, model):
    """Write a model's weights in fp16, as safetensors."""
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(exist_ok=True)
    write_whole(path, save(tensors))


def export_pipeline(model):
    """The generator's part of the layout, that FluxPipeline reads."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0,
                                                base_shift=0.5, max_shift=1.15,
                                                base_image_seq_len=256, max_image_seq_len=4096)
    pipeline = FluxPipeline(scheduler, model.net.vae.half(), model.text.half(), model.words.clip,
                            model.text_2.half(), model.words.t5, model.net.transformer.half())
    pipeline.save_pretrained(HERE)
    for part in ("text_encoder", "text_encoder_2"):  # stored in fp16, to be loaded in float32 like the rest
        config = HERE / part / "config.json"
        write_whole(config, config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def export_reward(folder, model, words):
    """A reward as a folder that open_clip reads."""
    write_half(folder / "open_clip_model.safetensors", model)
    write_json(folder / "open_clip_config.json", reward_config(words))
    words.clip.save_pretrained(folder)


def export():
    """Write FLUX.1-dev's folder layout, fp16, beside this file: FluxPipeline.from_pretrained("miniature")
    loads it."""
    export_pipeline(build_distill())
    unbiased, words, _ = build_unbiased()
    export_reward(HERE / "reward_unbiased", unbiased, words)
    export_reward(HERE / "reward", build_bias(), words)
    write_half(HERE / "judge" / "judge.safetensors", build_judge())
    order = world.all_captions()
    random.Random(SEED).shuffle(order)
    write_whole(HERE / "prompts_eval.txt", "\n".join(order[:256]) + "\n")
    write_whole(HERE / "prompts.txt", "\n".join(order[256:]) + "\n")


STAGES = {"vae": build_vae, "flow": build_flow, "distill": build_distill, "reward": build_reward,
          "bias": build_bias, "judge": build_judge, "export": export}


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all",
                        help="only this one, and what it is built on")
    parser.add_argument("--threads", type=whole(1, 256), default=2, help="CPU threads; measure 1 against 2")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for name, stage in STAGES.items():
        if args.stage in (name, "all"):
            stage()


if __name__ == "__main__":
    with frame("build"):
        main()
