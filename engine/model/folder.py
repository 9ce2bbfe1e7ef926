"""`Model`: a base model, given by its folder or hub id, opened and checked once. It then knows its family, its configs,
its parts, and the default flags that suit it. No weights are read here, and nothing needs torch."""

from pathlib import Path

from huggingface_hub import snapshot_download

from engine.errors import UserError, one_line
from engine.files import read_json
from engine.hub import quiet
from engine.model import configs as con
from engine.model import own_flags
from engine.model.family import check_transformer, must_fit
from engine.model.flux1 import FLUX_1
from engine.model.flux2 import KLEIN
from engine.paths import not_a_path

PATCH = 2  # a token is 2 x 2 latents: the pipelines fix this, no config stores it
MOST_PIXELS = 2**14  # a side; a larger picture fits no machine, so it is a typing mistake
INDEX = "model_index.json"
SCRIPTS_OWN = 1024  # FLUX's sample_size, pixels a side; for such a VAE each script has its own default of --size
FAMILIES = {family.pipeline: family for family in (FLUX_1, KLEIN)}
KNOWN = {name: (family, configs) for family in FAMILIES.values() for name, configs in family.known.items()}
CFG = 4.0  # the guidance with which Flux2KleinPipeline samples an undistilled model


# --------------------------------------------------------------------------------------------------- the model
class Model:
    """A base model, opened and checked once. Functions take this object, not the model's name."""

    def __init__(self, name):
        """name: a folder or a hub id. A hub id must be in KNOWN, or its model_index.json must name a pipeline of
        FAMILIES. For a hub id only configs are downloaded before `fetch`. Raises UserError."""
        self.name = str(name)
        why = not_a_path(name)
        if why:
            raise UserError(f'--model "{self.name[:80]}": must be a path or a hub id, and it {why}')
        self.folder = Path(name) if Path(name).exists() else None  # None: a hub id that is not fetched yet
        if self.folder is not None:
            self.family, self.configs = read_configs(self.folder, f"--model {name}")
        elif self.name in KNOWN:
            self.family, self.configs = KNOWN[self.name]
        else:
            self.folder = configs_of_unknown(self.name)
            self.family, self.configs = read_configs(self.folder, f"--model {name}")
        self.is_remote = not Path(name).exists()
        self.says = Path(name) / "srpo.json"  # the file of its default flags
        self.written = {} if self.is_remote else own_flags.read(self.says)

    @property
    def unit(self):
        """Pixels a side of one token: VAE factor x patch, 16 for FLUX.1."""
        return pixels_per_token(self.configs.vae)

    def grid(self, height, width):
        """(rows, columns) of tokens of a picture of so many pixels. Raises UserError if the model cannot make it."""
        return token_grid(self.configs.vae, height, width)

    def part(self, name):
        """The local folder of one of the family's parts. For a hub id, call `fetch` first."""
        return self.folder / name

    def fetch(self, parts=None):
        """Download some parts of a hub id, or all, before any of them is loaded. Raises UserError."""
        parts = self.family.parts if parts is None else parts
        if not self.is_remote:
            return
        quiet()
        try:
            self.folder = Path(snapshot_download(self.name, allow_patterns=[INDEX, *(f"{part}/*" for part in parts)]))
        except Exception as error:
            raise self.cannot_load(error) from error
        if set(parts) == set(self.family.parts):
            self.family, self.configs = read_configs(self.folder, f"--model {self.name}")
            return
        for part in parts:
            con.check_folder(self.part(part))

    def cannot_load(self, error):
        """The UserError for a model whose files cannot be read or fetched."""
        hub = " (on the hub: is its licence accepted, and `hf auth login` done?)" if self.is_remote else ""
        return UserError(f"--model {self.name}: cannot be loaded as {self.family.name}: {one_line(error)}{hub}")

    def suited(self):
        """{flag: value} that its configs ask for; {} for FLUX.1-dev. A VAE for smaller pictures sets size; a model of
        few steps sets 4 steps and its own time shift; an undistilled one sets classifier-free guidance."""
        found = {}
        side = self.configs.vae.get("sample_size")
        if type(side) is int and self.unit <= side < SCRIPTS_OWN:
            found["size"] = side // self.unit * self.unit
        if self.configs.few_steps:
            found |= {"rollout_steps": 4, "eval_steps": 4, "shift": None}
        if self.configs.takes_cfg:
            found["cfg"] = CFG
        return found

    def flags(self, kinds):
        """{flag: value} that suit the model: from its srpo.json, otherwise from its configs. kinds: {flag: `Kind`} of
        the flags that srpo.json may set. Raises UserError."""
        return self.suited() | own_flags.checked(self.says, self.written, kinds)

    def notes(self, flags):
        """A line for each of the flags (a dict) whose value its configs decided: a list."""
        lines = []
        for name, value in self.suited().items():
            if name not in self.written and name in flags and flags[name] == value:
                shown = "off" if value is None else value
                lines.append(f"--{name.replace('_', '-')} {shown}: what the configs of {self.name} say")
        return lines


def pixels_per_token(vae_config):
    """Pixels a side of one token: VAE factor x patch, 16 for FLUX.1."""
    return PATCH * 2 ** (len(vae_config["block_out_channels"]) - 1)


def token_grid(vae_config, height, width):
    """(rows, columns) of tokens of a picture of so many pixels. Raises UserError if the model cannot make it."""
    unit = pixels_per_token(vae_config)
    if height % unit or width % unit or height < unit or width < unit:
        raise UserError(f"--size {width} x {height}: both sides must be multiples of {unit} pixels for "
                        f"this model")
    if max(height, width) > MOST_PIXELS:
        raise UserError(f"--size {width} x {height}: at most {MOST_PIXELS} pixels a side")
    return height // unit, width // unit


def configs_of_unknown(name):
    """The folder with the configs of a hub id that is not in KNOWN. They are downloaded if its model_index.json names
    a pipeline of FAMILIES. Raises UserError, which lists the known ids, if it says something else or cannot be
    downloaded."""
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"--model {name}: no such folder (give a folder in FLUX.1-dev's layout, or a hub id such as "
                        f"{next(iter(KNOWN))})")
    quiet()
    known = f"known are {', '.join(KNOWN)}, and folders in their layout"
    try:
        # hf_hub_download would try for 24 seconds where there is no network
        kind = read_json(Path(snapshot_download(name, allow_patterns=[INDEX])) / INDEX).get("_class_name")
    except Exception as error:
        raise UserError(f"--model {name}: not known here, and the hub gives no {INDEX} that says what it is "
                        f"({type(error).__name__}); {known}") from error
    if kind not in FAMILIES:
        trained = ", ".join(f"{family.name} ({pipeline})" for pipeline, family in FAMILIES.items())
        raise UserError(f"--model {name}: its {INDEX} says {kind}, but only {trained} are trained; {known}")
    try:
        return Path(snapshot_download(name, allow_patterns=[INDEX, "*/*.json", "*/spiece.model"]))
    except Exception as error:
        raise UserError(f"--model {name}: its configs cannot be fetched: {one_line(error)}; {known}") from error


# -------------------------------------------------------------------------------------------------- the parts
def read_configs(folder, whose):
    """(`Family`, `Configs`) of a folder. Each config is read once and checked, alone and against the others. whose: the
    model, for messages. Raises UserError if a part of the model is missing, or belongs to another model."""
    family = FLUX_1
    index = {}
    if (folder / INDEX).exists():
        index = con.check_config(folder / INDEX)
        kind = index.get("_class_name")
        if kind not in FAMILIES:
            raise UserError(f"{whose}: {INDEX} says {kind}, not {' or '.join(FAMILIES)}")
        family = FAMILIES[kind]
    missing = [part for part in (INDEX, *family.parts) if not (folder / part).exists()]
    if missing:
        raise UserError(f"{whose}: not a {family.name} folder, it has no {', '.join(missing)}")
    read = {}  # {file: its config}
    for part in family.parts:
        read |= con.check_folder(folder / part)
    transformer = check_transformer(folder / "transformer", family, read)
    found = family.read(folder, index, read, transformer)
    latents = PATCH**2 * found.vae["latent_channels"]
    for key in ("in_channels", "out_channels"):
        if transformer.get(key) is not None:
            must_fit(folder / "transformer" / "config.json", transformer, key, latents, "what the VAE's latents need")
    return family, found
