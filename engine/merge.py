"""What --weights come to, as a folder of full weights, which --weights takes again and
FluxTransformer2DModel.from_pretrained loads: a LoRA merged into its base, or a single file under diffusers'
names.

    python -m engine.merge --model miniature --weights runs/lora/weights --out runs/merged
"""

from pathlib import Path

import diffusers
import torch

from engine import checkpoint, lora, model_folder, parallel, trained
from engine.command_line import Parser, some_path
from engine.errors import UserError, frame, printable
from engine.files import fetched, quiet


def main(argv=None):
    """From the command line to the folder. It takes as much memory as the weights, 24 GB in bf16."""
    quiet()
    parser = Parser(__doc__, prog="python -m engine.merge")
    add = parser.add_argument
    add("--model", required=True, help="folder in FLUX.1-dev's layout, or hub id: the base")
    add("--weights", required=True, help=trained.HELP)
    add("--out", required=True, type=some_path, help="folder that is not there yet, or empty")
    with frame("merge"):
        a = parser.parse_args(argv)
        base = fetched(a.model, ["transformer/*"]) / "transformer"
        model_folder.check_transformer(base)
        trained.check(a.weights, base)
        if Path(a.out).exists() and (not Path(a.out).is_dir() or any(Path(a.out).iterdir())):
            raise UserError(f"--out {a.out}: is there, and not an empty folder")
        folder, file = trained.places(a.weights, base) if trained.is_full(a.weights) else (base, None)
        kind = diffusers.FluxTransformer2DModel
        _, tensors = parallel.on_meta(kind, folder, file)
        in_bf16 = all(tensor.get_dtype() in ("BF16", "F8_E4M3", "F8_E5M2") for tensor in tensors.values())
        dtype = torch.bfloat16 if in_bf16 else torch.float32  # which holds every number of the file
        network = parallel.load_sharded(kind, folder, "cpu", dtype, file=file)
        if not trained.is_full(a.weights):
            lora.merge_into(network, a.weights)
        checkpoint.export(network, a.out, parallel.World(), dtype)
        print(printable(f"weights in {a.out}/, {dtype}"))


if __name__ == "__main__":
    main()
