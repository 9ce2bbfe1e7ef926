"""Write --weights as a folder of full weights: a LoRA is merged into its base; a single file gets diffusers' names.
--weights accepts the folder, and FluxTransformer2DModel.from_pretrained loads it.

    python -m engine.merge --model miniature --weights runs/lora/weights --out runs/merged
"""

from pathlib import Path

import torch

from engine.command_line import WEIGHTS, Parser, some_path
from engine.errors import UserError, frame, printable
from engine.hub import quiet
from engine.memory import parallel
from engine.model import export, lora, trained
from engine.model.folder import Model


def main(argv=None):
    """Read the command line and write the folder. This needs as much memory as the weights, 24 GB in bf16."""
    quiet()
    parser = Parser(__doc__, prog="python -m engine.merge")
    add = parser.add_argument
    add("--model", required=True, help="folder in FLUX.1-dev's layout, or hub id: the base")
    add("--weights", required=True, help=WEIGHTS)
    add("--out", required=True, type=some_path, help="folder that does not exist yet, or is empty")
    with frame("merge"):
        a = parser.parse_args(argv)
        model = Model(a.model)
        trained.check(a.weights, model)
        if Path(a.out).exists() and (not Path(a.out).is_dir() or any(Path(a.out).iterdir())):
            raise UserError(f"--out {a.out}: exists, and is not an empty folder; give another --out")
        if not trained.is_full(a.weights):
            model.fetch(["transformer"])
        source = trained.source(a.weights, model)
        in_bf16 = all(tensor.get_dtype() in ("BF16", "F8_E4M3", "F8_E5M2") for tensor in source.tensors.values())
        dtype = torch.bfloat16 if in_bf16 else torch.float32  # either way it holds every number exactly
        network = parallel.load_sharded(trained.kind(), source, "cpu", dtype)
        if not trained.is_full(a.weights):
            lora.merge_into(network, a.weights)
        export.export(network, a.out, parallel.World(), dtype)
        print(printable(f"weights in {a.out}/, {dtype}"))


if __name__ == "__main__":
    main()
