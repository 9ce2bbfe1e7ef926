"""LoRA files of other tools, read as diffusers reads them.

The names are brought to diffusers' here: by the model's own layers, so that every layer of a model of any size is
found, and none is left out silently. The factor alpha / R of each layer is peft's, from diffusers' own loader.
"""

import json
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from safetensors import safe_open

from engine.errors import UserError, one_line
from engine.files import fits, read_json
from engine.hub import quiet
from engine.model import released
from engine.model.configs import slices_of
from engine.model.single_file import is_single_file
from engine.model.tensor_files import kind_of, meta_network
from engine.paths import not_a_path

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
OF_PEFT = "adapter_model.safetensors"      # what peft's save_pretrained writes, beside its config
PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"         # where diffusers notes peft's config, in the file's metadata
PREFIX = "transformer."                    # diffusers and ComfyUI put it before the names of a transformer's tensors

# Before the names of a transformer's layers, in the files of peft, ComfyUI, OneTrainer, kohya and LyCORIS.
WRAPPED = "base_model.model."  # peft's
PREFIXES = (WRAPPED, "model.diffusion_model.", "diffusion_model.", PREFIX, "lora_transformer_", "lora_transformer.",
            "lora_unet_", "lora_unet.", "lycoris_")
TEXT_ENCODERS = ("text_encoder", "lora_te", "te1_", "te2_", "bundle_emb", "clip_l.", "t5xxl.")
SIDES = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_A.default.weight": "A", ".lora_B.default.weight": "B",
         ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora.down.weight": "down", ".lora.up.weight": "up",
         ".lora_B.bias": "bias", ".lora_B.default.bias": "bias", ".alpha": "alpha"}
SAME = {"A": "down", "down": "A", "B": "up", "up": "B"}  # two names of one matrix
# Formats that are neither trained nor merged, by a part of their tensors' names.
FORMATS = {"lokr_": "LoKr", "hada_": "LoHa", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "oft_": "OFT",
           "boft_": "BOFT", "vera_": "VeRA", "ia3_": "IA3", "lora_mid.": "LoCon with a middle matrix",
           "glora_": "GLoRA", ".diff": "differences of weights, not a LoRA alone",
           "lora_embedding_": "a LoRA of embeddings",
           ".qweight": "a model quantized by nunchaku, not a LoRA",
           "query_norm": "a control LoRA", "norm_q.": "a control LoRA", ".w_norm": "LyCORIS norms"}
ADAPTERS = ("lora", "lokr_", "hada_", "oft_", "vera_", "ia3_")  # no full weights have these in their names
DIFFERENCES = (".diff", ".diff_b")  # some tools write them as zeros, which change nothing
XLABS = ".processor."  # in the names of XLabs' files, which diffusers converts
# The keys of peft's config that say how large a layer's change is, and those that would change what a layer is.
SCALING = {"r": int, "lora_alpha": float, "rank_pattern": {str: int}, "alpha_pattern": {str: float},
           "use_rslora": bool, "lora_bias": bool}  # and what their values are, as `files.fits` has it
MUST_BE = {"peft_type": (None, "LORA"), "use_dora": (None, False), "bias": (None, "none"), "use_qalora": (None, False),
           "modules_to_save": (None, []), "use_bdlora": (None, False), "arrow_config": (None,),
           "target_parameters": (None, []), "layer_replication": (None,), "alora_invocation_tokens": (None,),
           "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal")}


class Pair(NamedTuple):
    """A layer's change, B A: A [R, in]; B [out, R], with the factor alpha / R in it; bias [out], or None."""
    A: torch.Tensor
    B: torch.Tensor
    bias: torch.Tensor | None = None


def file_in(place):
    """The path of the LoRA's file, if a place is a folder or a file that holds one, otherwise None. Raises UserError
    for a safetensors file that cannot be read."""
    if not_a_path(place):
        return None
    path = Path(place)
    for name in (FILE, OF_PEFT):
        if (path / name).is_file():
            return path / name
    if path.is_dir() and not (path / "config.json").exists():
        inside = sorted(file for file in path.iterdir() if is_single_file(file))
        path = inside[0] if len(inside) == 1 else path
    if is_single_file(path) and any(word in name for name in slices_of(path) for word in ADAPTERS):
        return path
    return None


def is_of_text(name):
    """Whether a tensor of a LoRA belongs to a text encoder, or to a word that was learned."""
    return name.removeprefix(WRAPPED).startswith(TEXT_ENCODERS)


# ------------------------------------------------------------------------------------------------------ reading
def read(place, config):
    """(path, {layer: `Pair`}) of the LoRA in a folder or a file, for a transformer with this config. Layers have
    diffusers' names. The tensors of text encoders are left out.

    Raises UserError for a format that is not read, for a tensor that is not known, and for what is not finite.
    """
    quiet()
    path = file_in(place) or Path(place)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if not is_of_text(name)}
            tensors = {name: tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
                       for name, tensor in tensors.items() if not name.endswith(DIFFERENCES) or tensor.any()}
            noted = (file.metadata() or {}).get(METADATA) or "{}"
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error
    must_be_read(path, tensors)
    settings = settings_of(path, tensors, noted)
    network = meta_network(kind_of(config), config)
    tensors = without_xlabs_names(path, tensors)
    try:
        state, alphas = by_layer(path, tensors, network, config)
        found = scaled_by_peft(network, state, alphas, settings)
    except UserError:
        raise
    except Exception as error:
        what = one_line(" ".join(str(error).split()))  # torch's first line does not name the layer
        raise UserError(f"{path}: cannot be read as a LoRA of this model: {what}") from error
    for layer, pair in found.items():
        if not all(part.isfinite().all() for part in pair if part is not None):
            raise UserError(f"{path}: {layer} holds numbers that are not finite")
    return path, found


def without_xlabs_names(path, tensors):
    """The tensors of a LoRA {name: tensor}, under diffusers' names if XLabs' were theirs. Raises UserError."""
    theirs = [name for name in tensors if XLABS in name]
    if not theirs:
        return tensors
    try:
        return diffusers.FluxPipeline.lora_state_dict(tensors)
    except Exception as error:
        raise UserError(f"{path}: its names are XLabs', such as {theirs[0]}, and diffusers cannot convert it: a name "
                        "is not XLabs', or not each layer has two matrices") from error


def must_be_read(path, tensors):
    """Raise UserError if a tensor's name is of a format that is not read, or a tensor holds no weights."""
    for name, tensor in tensors.items():
        for part, kind in FORMATS.items():
            if part in bare(name):
                raise UserError(f"{path}: its format is {kind} (it has {name}), which is neither trained nor merged "
                                "here; merge it with the tool that made it, and give the full weights")
        if not tensor.is_floating_point() and not name.endswith(".alpha"):
            raise UserError(f"{path}: {name} holds {tensor.dtype}, which are no weights")
        if tensor.ndim > 2 and not name.endswith(".alpha"):
            raise UserError(f"{path}: {name} is {list(tensor.shape)}, a convolution's, and this transformer has only "
                            "linear layers; give a LoRA of this model")
    if not tensors:
        raise UserError(f"{path}: holds no tensor of the transformer")


def settings_of(path, tensors, noted):
    """{key of SCALING: value} of peft's config, from the file's metadata, the JSON text `noted`, or from
    adapter_config.json beside it; {} if there is none. Raises UserError for a config that asks for more than a LoRA."""
    beside = path.parent / PEFT_CONFIG
    try:
        noted = json.loads(noted)
    except (ValueError, RecursionError):
        noted = "damaged"
    if isinstance(noted, dict):
        if noted.keys() & SCALING.keys():
            raise UserError(f"{path}: its note of a LoRA's settings does not say whose they are; diffusers writes "
                            f"{PREFIX}{min(noted.keys() & SCALING.keys())}")
        noted = {name.removeprefix(PREFIX): value for name, value in noted.items() if name.startswith(PREFIX)}
    is_pefts = any(name.startswith(WRAPPED) and "transformer_blocks." in name for name in tensors)
    if not noted and (is_pefts or path.name == OF_PEFT):
        if not beside.is_file():
            raise UserError(f"{path}: peft's, and there is no {PEFT_CONFIG} beside it, which has its alpha")
        noted = read_json(beside)
    if not isinstance(noted, dict):
        raise UserError(f"{path}: its note of a LoRA's settings is damaged")
    for key, allowed in MUST_BE.items():
        value = noted.get(key)
        if not any(value is one or (type(value) is type(one) and value == one) for one in allowed):
            raise UserError(f"{path}: {key} {str(value)[:40]!r} is more than a LoRA, and neither trained nor merged "
                            "here; merge it with the tool that made it, and give the full weights")
    found = {key: noted[key] for key in SCALING if noted.get(key) is not None}
    for key, value in found.items():
        if not fits(value, SCALING[key]) or isinstance(value, dict) and not all(map(is_pattern, value)):
            raise UserError(f"{path}: {key} {str(value)[:40]!r} is no value of peft's config; correct the file's "
                            f"metadata, or {PEFT_CONFIG}")
    sides = {split(name)[1]: name for name in tensors}
    if found and "alpha" in sides:
        raise UserError(f"{path}: {sides['alpha']} and its note of a LoRA's settings both scale it; keep one of them")
    if found and "bias" in sides and not found.get("lora_bias"):
        raise UserError(f"{path}: it has {sides['bias']}, and its note of a LoRA's settings says lora_bias false; "
                        "correct one of them")
    return found


def is_pattern(text):
    """Whether a text is a regular expression, as peft reads the keys of rank_pattern and alpha_pattern."""
    try:
        re.compile(f"({text})")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def sides_of(path, tensors):
    """{flat layer: {"name": layer, side: tensor}} of tensors {name: tensor}; sides as `split` names them. Raises
    UserError for another name, or a side that is there twice."""
    layers = {}
    for name, tensor in tensors.items():
        layer, side = split(name)
        if side is None:
            raise UserError(f"{path}: {name} is not known; a LoRA has LAYER.lora_A.weight and LAYER.lora_B.weight, or "
                            "LAYER.lora_down.weight and LAYER.lora_up.weight")
        of = layers.setdefault(flat(layer), {"name": layer})
        if side in of or SAME.get(side) in of:
            raise UserError(f"{path}: {name} is there twice, under two names; keep one of them")
        of[side] = tensor
    return layers


def matrices_of(path, of):
    """(A [R, in], B [out, R], alpha [] or None) of a layer of `sides_of`. Raises UserError for other shapes."""
    A = of.get("A", of.get("down"))
    B = of.get("B", of.get("up"))
    alpha = of.get("alpha")
    if A is None or B is None or A.ndim != 2 or B.ndim != 2 or not A.shape[0] == B.shape[1] > 0:
        raise UserError(f"{path}: {of['name']} is not two matrices, [R, in] and [out, R]")
    if alpha is not None and (alpha.numel() != 1 or type(alpha.item()) not in (int, float)
                              or not 0 < alpha.item() < torch.inf):
        raise UserError(f"{path}: {of['name']}.alpha must be one number above 0")
    return A, B, alpha


def by_layer(path, tensors, network, config):
    """({PREFIX + layer + .lora_A.weight and so on: tensor}, {PREFIX + layer + .alpha: number}) under diffusers' names.

    network: the transformer, on the meta device. Raises UserError for a tensor that is no layer's.
    """
    shapes = {name: module.weight.shape for name, module in network.named_modules()
              if isinstance(module, torch.nn.Linear)}
    own = {flat(name): name for name in shapes}
    theirs = {}
    for name, inside in released.parts_of(config).items():
        if name.endswith(".weight"):
            theirs[flat(name.removesuffix(".weight"))] = inside
    state = {}
    alphas = {}
    ranks = {}
    for key, of in sides_of(path, tensors).items():
        if key not in own and key not in theirs:
            raise UserError(f"{path}: this transformer has no layer {of['name']}")
        A, B, alpha = matrices_of(path, of)
        if key in own:
            made = {own[key]: (A, B, of.get("bias"))}
        else:
            if "bias" in of:
                raise UserError(f"{path}: {of['name']} has a bias under black-forest-labs' name, which "
                                "diffusers leaves out; merge it with the tool that made it, and give the full weights")
            made = {layer: (*AB, None) for layer, AB in split_rows(A, B, theirs[key]).items()}
        if key in theirs or "down" in of:  # kohya's meaning of alpha: without one a layer's factor is 1
            scale = 1 if alpha is None else alpha.item() / len(A)
            made = {layer: (A * scale, B, bias) for layer, (A, B, bias) in made.items()}  # in the file's dtype
            ranks |= {f"{PREFIX}{layer}.alpha": float(len(A)) for layer, (A, _, _) in made.items()}
        elif alpha is not None:
            alphas[f"{PREFIX}{own[key]}.alpha"] = alpha.item()
        for layer, (A, B, bias) in made.items():
            if f"{PREFIX}{layer}.lora_A.weight" in state:
                raise UserError(f"{path}: {layer} is there twice, once joined with others; keep one of them")
            if bias is not None and bias.shape != (len(B),):
                raise UserError(f"{path}: the bias of {layer} is {list(bias.shape)}, and must be [{len(B)}]")
            if shapes[layer] != (len(B), A.shape[1]):
                raise UserError(f"{path}: {layer} is {len(B)} x {A.shape[1]}, and in this transformer "
                                f"{' x '.join(map(str, shapes[layer]))}: another model's")
            state[f"{PREFIX}{layer}.lora_A.weight"] = A
            state[f"{PREFIX}{layer}.lora_B.weight"] = B
            if bias is not None:
                state[f"{PREFIX}{layer}.lora_B.bias"] = bias
    if alphas:
        alphas |= ranks
        without = {layer_of(name) for name in state if f"{PREFIX}{layer_of(name)}.alpha" not in alphas}
        if without and len(set(alphas.values())) > 1:  # diffusers takes that of some other layer
            raise UserError(f"{path}: {sorted(without)[0]} has no alpha, and the other layers have several; write its "
                            "alpha into the file: its rank, if it was trained without one")
    return state, alphas


def flat(layer):
    """A layer's name as kohya writes it, with _ for each dot."""
    return layer.replace(".", "_")


def bare(name):
    """A tensor's name without what stands before the transformer's own names."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def split(name):
    """(layer, its side: one of SIDES' values; None if the name has no known ending) of a tensor's name."""
    name = bare(name)
    for ending, side in SIDES.items():
        if name.endswith(ending):
            return name.removesuffix(ending), side
    return name, None


def split_rows(A, B, parts):
    """{diffusers' layer: (A, B)} of a layer with black-forest-labs' name, whose rows are several layers'.

    parts: as `released.parts_of` has them. Each gets A whole, or, if its rows of B use only their own share of the
    rank, as kohya's tool joins adapters, that share.
    """
    found = {}
    share = len(A) // len(parts)
    shares = []
    for number, (name, pieces) in enumerate(parts.items()):
        rows = torch.cat([torch.arange(*piece.of(len(B))) for piece in pieces])
        found[name.removesuffix(".weight")] = (A, B[rows])
        mine = slice(number * share, (number + 1) * share)
        rest = B[rows].clone()
        rest[:, mine] = 0
        shares.append(mine if not rest.any() else None)
    if len(A) % len(parts) == 0 and None not in shares:
        for mine, (name, (A, B)) in zip(shares, list(found.items()), strict=True):
            found[name] = (A[mine], B[:, mine].contiguous())
    return found


def scaled_by_peft(network, state, alphas, settings):
    """{layer: `Pair`}, with peft's factor of each layer in B. The adapters are injected into the network, which is on
    the meta device, by diffusers' loader. Raises what it raises."""
    if settings:
        settings = settings | {"target_modules": sorted({layer_of(name) for name in state})}
        settings = {PREFIX + key: value for key, value in settings.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of layers whose names end alike; the names are compared below
        network.load_lora_adapter(state, prefix="transformer", adapter_name="it", low_cpu_mem_usage=True,
                                  network_alphas=alphas or None, metadata=settings or None)
    found = {}
    for layer, module in network.named_modules():
        A, B, bias = (state.get(f"{PREFIX}{layer}.lora_{end}") for end in ("A.weight", "B.weight", "B.bias"))
        if A is not None and hasattr(module, "lora_A"):
            scale = float(module.scaling["it"])
            found[layer] = Pair(A.float(), scale * B.float(), None if bias is None else scale * bias.float())
    missing = {layer_of(name) for name in state} - found.keys()
    if missing:
        raise UserError(f"{sorted(missing)[0]}: diffusers does not load it")
    return found


def layer_of(name):
    """The layer of a tensor in diffusers' format."""
    return name.removeprefix(PREFIX).split(".lora_")[0]


# ------------------------------------------------------------------------------------------------------ writing
def in_kohyas_names(pairs, config):
    """{kohya's name: tensor in bf16} of a LoRA {layer: `Pair`}, for a transformer with this config. kohya's layers are
    black-forest-labs', some of which are several of diffusers': each of these gets its own share of the rank, so that
    reading gives the same matrices. Raises UserError for a bias, which kohya's files cannot hold."""
    tensors = {}
    for name, parts in released.parts_of(config).items():
        there = {ours: pairs[ours.removesuffix(".weight")] for ours in parts if ours.removesuffix(".weight") in pairs}
        if not there:
            continue
        if any(pair.bias is not None for pair in there.values()):
            raise UserError(f"--save-as kohya: {next(iter(there))} has a bias, which kohya's files cannot hold")
        share = max(len(pair.A) for pair in there.values())
        one, pair = next(iter(there.items()))
        pieces = parts[one]
        rows = len(pair.B) * pieces[0].marks // sum(piece.last - piece.first for piece in pieces)
        down = torch.zeros(share * len(parts), pair.A.shape[1])
        up = torch.zeros(rows, share * len(parts))
        for number, ours in enumerate(parts):
            if ours not in there:
                continue
            A, B, _ = there[ours]
            own = slice(number * share, number * share + len(A))
            down[own] = A.float()
            up[torch.cat([torch.arange(*piece.of(rows)) for piece in parts[ours]]), own] = B.float()
        layer = f"lora_unet_{flat(name.removesuffix('.weight'))}"
        tensors[f"{layer}.lora_down.weight"] = down.bfloat16()
        tensors[f"{layer}.lora_up.weight"] = up.bfloat16()
        tensors[f"{layer}.alpha"] = torch.tensor(float(len(down)))
    return tensors
