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

import argparse
import copy
import json
import random
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import save_file

from miniature import world
from miniature.build_flow import SEED, WORK, build_distill, build_flow, build_vae, latents
from miniature.build_scorers import REWARD_CONFIG, build_bias, build_judge, build_reward, build_unbiased

HERE = Path(__file__).resolve().parent


def export():
    """Write FLUX.1-dev's folder layout, fp16, beside this file: FluxPipeline.from_pretrained("miniature")
    loads it."""
    transformer, text, text_2, words = build_distill()
    vae = build_vae()
    latents(vae)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0,
                                                base_shift=0.5, max_shift=1.15,
                                                base_image_seq_len=256, max_image_seq_len=4096)
    FluxPipeline(scheduler, vae.half(), text.half(), words.clip, text_2.half(), words.t5,
                 transformer.half()).save_pretrained(HERE)
    for part in ("text_encoder", "text_encoder_2"):  # stored in fp16, to be loaded in float32 like the rest
        config = HERE / part / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for folder, model in (("reward_unbiased", build_unbiased()[0]), ("reward", build_bias())):
        (HERE / folder).mkdir(exist_ok=True)
        config = copy.deepcopy(REWARD_CONFIG)
        config["model_cfg"]["text_cfg"]["vocab_size"] = len(words.clip)
        (HERE / folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({k: v.half().contiguous() for k, v in model.state_dict().items()},
                  HERE / folder / "open_clip_model.safetensors")
        words.clip.save_pretrained(HERE / folder)
    (HERE / "judge").mkdir(exist_ok=True)
    save_file({k: v.half() for k, v in build_judge().state_dict().items()},
              HERE / "judge" / "judge.safetensors")
    order = world.all_captions()
    random.Random(SEED).shuffle(order)
    (HERE / "prompts_eval.txt").write_text("\n".join(order[:256]) + "\n")
    (HERE / "prompts.txt").write_text("\n".join(order[256:]) + "\n")


STAGES = {"vae": build_vae, "flow": build_flow, "distill": build_distill, "reward": build_reward,
          "bias": build_bias, "judge": build_judge, "export": export}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; measure 1 against 2")
    args = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    torch.set_num_threads(args.threads)
    for name, stage in STAGES.items():
        if args.stage in (name, "all"):
            stage()
