"""The model card beside a run's weights, README.md, as the hub reads it. Its main points are also in the metadata of
the safetensors file, under modelspec's keys (github.com/Stability-AI/ModelSpec)."""

import json
import shlex
from pathlib import Path

import flow
import recipe
from engine.command_line import as_line
from engine.errors import printable
from engine.files import is_ours, write_whole
from engine.model.flux2 import KLEIN
from engine.model.lora_files import FILE
from engine.run.folder import CARD, CARD_MARK
from evaluation import table_formats

PICTURE = "before_after.png"
ABOUT = ("SRPO", "https://arxiv.org/abs/2509.06942")
OWN_LICENCE = "flux-1-dev-non-commercial-license"
# The licence of a base model on the hub, in the words of its card there.
LICENCES = {
    **{name: {"license": "other", "license_name": OWN_LICENCE,
              "license_link": f"https://huggingface.co/{name}/blob/main/LICENSE.md"}
       for name in ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Krea-dev")},
    **{name: {"license": "apache-2.0"}
       for name in ("black-forest-labs/FLUX.1-schnell", "black-forest-labs/FLUX.2-klein-base-4B",
                    "black-forest-labs/FLUX.2-klein-4B")}}


def base_of(model):
    """A `Model`'s hub id; the name of its folder if it is on this machine only."""
    return model.name if model.is_remote else Path(model.name).resolve().name


def without_places(line):
    """A line of flags. Absolute paths, which would tell where a user's files are, are cut to the name of the file or
    folder."""
    return shlex.join([Path(word).name if Path(word).is_absolute() else word for word in shlex.split(line)])


def title(a, model):
    """What the weights are, in a line: their base, and that SRPO made them."""
    return f"{base_of(model)}, {'a LoRA by' if a.lora else 'trained by'} {ABOUT[0]}"


def about(a, model):
    """{key: text}: the metadata of a weights' file. It depends only on what the weights depend on, so that the same run
    writes the same file."""
    architecture = "flux-1-schnell" if model.configs.few_steps else "flux-1-dev"
    if model.family.name != "FLUX.1":
        architecture = model.family.name.lower().replace(".", "-")
    elif not flow.is_full_size(model):
        architecture = "flux-1-small"
    control, neg = ", ".join(a.control), ", ".join(a.neg)
    found = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture + ("/lora" if a.lora else ""),
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": title(a, model),
        "modelspec.description": f"{' '.join(ABOUT)}: aligned with {control}, and not with {neg}",
        "modelspec.resolution": f"{a.size}x{a.size}",
        "modelspec.usage_hint": "use the bare prompt; there is no trigger word",
        "base_model": base_of(model),
        "srpo.control": control,
        "srpo.neg": neg,
        "srpo.recipe": a.recipe,
        "srpo.flags": without_places(as_line(recipe.GROUPS[:6], vars(a)))}
    licence = LICENCES.get(model.name)
    if licence:
        found["modelspec.license"] = licence.get("license_link", licence["license"])
    return {key: printable(text) for key, text in found.items()}


# ---------------------------------------------------------------------------------------------------- the card
def front_matter(a, model):
    """The head of a card, as the hub reads it: YAML between two lines of dashes."""
    lines = ["---"]
    if model.is_remote:
        lines += [f"base_model: {json.dumps(model.name)}",
                  f"base_model_relation: {'adapter' if a.lora else 'finetune'}"]
    lines += ["library_name: diffusers", "pipeline_tag: text-to-image"]
    lines += [f"{key}: {json.dumps(text)}" for key, text in LICENCES.get(model.name, {}).items()]
    tags = ["text-to-image", "flux", "srpo", "lora" if a.lora else "full-finetune"]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def use(a, model, name):
    """Python that makes a picture with the weights. name: of their folder, or their hub id."""
    base = json.dumps(base_of(model))
    pipeline, network = model.family.pipeline, model.family.transformer
    lines = ["import torch", f"from diffusers import {pipeline}", ""]
    if a.lora:
        lines += [f"pipe = {pipeline}.from_pretrained({base}, torch_dtype=torch.bfloat16).to(\"cuda\")",
                  f"pipe.load_lora_weights({json.dumps(name)})"]
    else:
        lines[1] = f"from diffusers import {pipeline}, {network}"
        lines += [f"transformer = {network}.from_pretrained({json.dumps(name)}, "
                  "torch_dtype=torch.bfloat16)",
                  f"pipe = {pipeline}.from_pretrained({base}, transformer=transformer, "
                  "torch_dtype=torch.bfloat16).to(\"cuda\")"]
    more = ""
    if not flow.is_full_size(model):
        more = f"height={a.size}, width={a.size}, max_sequence_length={model.configs.text_tokens}, "
    guidance = a.guidance
    prompt = "\"a prompt\""
    if model.family is KLEIN:  # its pipeline's guidance is classifier-free, and its first argument is a picture
        guidance = a.cfg or 1
        prompt = f"prompt={prompt}"
        if more:
            more += f"text_encoder_out_layers={model.configs.text_layers}, "
    return "\n".join([*lines, f"pipe({prompt}, {more}guidance_scale={guidance:g}, "
                              f"num_inference_steps={a.eval_steps}).images[0]"])


def text(a, model, name, flags, made, step, has_picture):
    """The card of the weights after an update, `step`. name: the hub id, or their folder; flags: the run's as one
    line; made: the run's `Table`s; has_picture: whether PICTURE is beside it."""
    kind = "A LoRA" if a.lora else "Weights"
    control, neg = ", ".join(a.control), ", ".join(a.neg)
    parts = [
        front_matter(a, model), CARD_MARK.decode(),
        "# " + printable(a.push_to_hub or f"{title(a, model)}, recipe {a.recipe}"),
        f"{kind} of {printable(base_of(model))}, trained by [{ABOUT[0]}]({ABOUT[1]}): {step} updates of "
        f"{a.global_batch} images.",
        f"The reward is a difference: the pictures are to be like \"{printable(control)}\", and not like "
        f"\"{printable(neg)}\". Use the bare prompt. There is no trigger word."]
    if has_picture:
        parts += [f"![The same prompts and noise, before and after]({PICTURE})",
                  "The same prompts and noise: above before training, below after it."]
    parts += [f"```python\n{use(a, model, name)}\n```"]
    if made:
        parts += ["## Numbers", *map(table_formats.markdown, made),
                  "±: the standard error over pictures. n: how many pictures."]
    parts += ["## How it was made", f"```\npython train.py {printable(without_places(flags))}\n```"]
    if model.name not in LICENCES:
        parts += ["The licence is that of the base model."]
    return "\n\n".join(parts) + "\n"


def write(folder, a, model, flags, made, step):
    """Write a card into a folder of weights, and the picture before_after.png of the run beside it. A README.md that
    train.py did not write stays. Raises OSError."""
    path = folder / CARD
    if path.exists() and not is_ours(path, CARD_MARK):
        print(printable(f"{path}: stays as it is, since train.py did not write it"))
        return
    picture = folder.parent / PICTURE
    if picture.is_file():
        write_whole(folder / PICTURE, picture.read_bytes())
    name = a.push_to_hub or (Path("path/to", *folder.parts[-2:]) if folder.is_absolute() else folder).as_posix()
    write_whole(path, text(a, model, name, flags, made, step, picture.is_file()))


def files(folder):
    """The names of the files in a folder of weights that belong to what is shared."""
    names = [CARD, PICTURE, "config.json", "diffusion_pytorch_model.safetensors", FILE]
    return [name for name in names if (folder / name).is_file()] + [
        path.name for path in sorted(folder.glob("*.safetensors")) if path.name not in names]
