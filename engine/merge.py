"""Write --weights as a folder of full weights: a LoRA is merged into its base; a single file gets diffusers' names.
--weights accepts the folder, and from_pretrained of the transformer's class loads it. With --save-as, write one file.

    python -m engine.merge --model miniature --weights runs/lora/weights --out runs/merged
    python -m engine.merge --model miniature --weights runs/lora/weights --save-as comfyui --out flux.safetensors
    python -m engine.merge --model miniature --weights runs/lora/weights --save-as kohya --out lora.safetensors
"""

import os
from pathlib import Path

import torch

from engine.command_line import SAVE_AS, SAVE_AS_HELP, WEIGHTS, Parser, check_names, check_save_as, some_path
from engine.errors import UserError, frame, printable
from engine.hub import quiet
from engine.memory import parallel
from engine.model import export, lora, lora_files, trained
from engine.model.folder import Model
from engine.model.single_file import SUFFIXES
from engine.model.tensor_files import kind_of, meta_network
from engine.model.tensors import are_finite


def main(argv=None):
    """Read the command line and write the weights. This needs as much memory as they have, 24 GB in bf16."""
    quiet()
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder of a base, or hub id")
    add("--weights", required=True, help=WEIGHTS)
    add("--save-as", choices=SAVE_AS, help=SAVE_AS_HELP + ", which is not merged then")
    add("--out", required=True, type=some_path, help="folder that does not exist yet, or is empty; with --save-as a "
                                                     "file that does not exist yet, .safetensors")
    with frame("merge"):
        a = parser.parse_args(argv)
        model = Model(a.model)
        check_names(a.save_as, model.family)
        trained.check(a.weights, model)
        check_out(a)
        for note in trained.notes(a.weights):
            print(printable(note))
        print(printable(write(a, model)))


def check_out(a):
    """Raise UserError if --out holds something, or is not what --save-as writes."""
    out = Path(a.out)
    if a.save_as and out.suffix not in SUFFIXES:
        raise UserError(f"--save-as {a.save_as} --out {a.out}: it writes a file; give a name that ends in .safetensors")
    if not a.save_as and out.suffix in SUFFIXES:
        raise UserError(f"--out {a.out}: without --save-as it is a folder; give --save-as, or another name")
    if os.path.lexists(out) and (a.save_as or not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {a.out}: exists, and is not an empty folder; give another --out")


def write(a, model):
    """Write what the flags ask for. Returns what was written, in words. Raises UserError and OSError."""
    is_lora = not trained.is_full(a.weights)
    world = parallel.World()
    if a.save_as == "kohya":
        check_save_as(a.save_as, is_lora)
        config = model.configs.transformer
        pairs = lora.fitting(meta_network(kind_of(config), config), trained.place_of(a.weights))
        lora.write_lora(a.out, lora_files.in_kohyas_names(pairs, config), world)
        return f"a LoRA with kohya's names in {a.out}"
    if is_lora:
        model.fetch(["transformer"])
    source = trained.source(a.weights, model)
    in_bf16 = all(tensor.get_dtype() in ("BF16", "F8_E4M3", "F8_E5M2") for tensor in source.tensors.values())
    dtype = torch.bfloat16 if in_bf16 else torch.float32  # either way it holds every number exactly
    network = parallel.load_sharded(kind_of(model.configs.transformer), source, "cpu", dtype)
    if is_lora:
        lora.merge_into(network, trained.place_of(a.weights))
    if not are_finite(network.parameters()):
        raise UserError(f"--weights {a.weights}: with them the transformer holds numbers that are not finite; nothing "
                        "is written")
    if a.save_as:
        export.export_as(network, a.out, world, a.save_as)
        return f"weights with {a.save_as}'s names in {a.out}"
    export.export(network, a.out, world, dtype)
    return f"weights in {a.out}/, {dtype}"


if __name__ == "__main__":
    main()
