"""Which --memory fits a machine: chosen for `--memory auto`, checked before anything is loaded, and shown for
cards of every size by `python train.py --plan`. All of it is predicted by engine/memory/plan.py."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from engine.errors import UserError
from engine.memory import gpus, modes
from engine.memory.plan import GIB, GIGA, MOST_PROCESSES, TERA, count, divide, in_time

CONTEXT = 1.25 * GIB    # what CUDA itself and the libraries' workspaces take of a card
BUS = 25                # GB/s between host and card: PCIe 4.0 x16, as copies from pinned memory reach it
USUAL_RANK = 32         # of a LoRA that is advised


class Machine(NamedTuple):
    """What one process may take, in bytes; a host of None is not known."""
    card: float
    host: float | None = None

    def has_room(self, prediction):
        """Whether a process of a `plan.Prediction` fits."""
        return not self.lacks(prediction)

    def lacks(self, prediction):
        """What there is too little of: "card", "host", or None."""
        if prediction.peak + CONTEXT > self.card:
            return "card"
        if self.host is not None and prediction.host > self.host:
            return "host"
        return None


def this_machine(world):
    """The `Machine` of one process of a `parallel.World`: its card, and its share of the host's memory."""
    if world.device.type == "cuda":
        card = torch.cuda.get_device_properties(world.device).total_memory
    else:
        card = float("inf")
    host = host_bytes()
    return Machine(card, None if host is None else host / world.neighbours)


def host_bytes(meminfo="/proc/meminfo", group="/sys/fs/cgroup"):
    """Bytes of the host's memory that can still be taken, by this process or its container; None where Linux
    does not say."""
    free = []
    try:
        for line in Path(meminfo).read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        most = (Path(group) / "memory.max").read_text().strip()
        if most != "max":
            lines = (Path(group) / "memory.stat").read_text().splitlines()
            cached = sum(int(line.split()[1]) for line in lines if line.startswith("file "))
            taken = int((Path(group) / "memory.current").read_text())
            free.append(int(most) - taken + cached)  # files in memory make room for who needs it
    except (OSError, ValueError, IndexError):
        pass
    return min(free, default=None)


# --------------------------------------------------------------------------------------------- what fits them
def predictions(job, counts, world_size):
    """{--memory: its `plan.Prediction`} for what a job trains, those that are preferred first."""
    found = {}
    for name in modes.choices(job.lora):
        found[name] = divide(replace(job, memory=name), counts, world_size, torch.bfloat16)
    return found


def flags_of(rank, name):
    """The flags that say what is trained and how it fits."""
    return f"--lora {rank} --memory {name}" if rank else f"--memory {name}"


def others_that_fit(job, counts, world_size, machine):
    """Flags, for a user whose choice does not fit: another --memory for the same, or else a LoRA."""
    for rank in dict.fromkeys((job.lora, job.lora or USUAL_RANK)):
        for name, prediction in predictions(replace(job, lora=rank), counts, world_size).items():
            if name != job.memory and machine.has_room(prediction):
                return [flags_of(rank, name)]
    return []


def more_gpus(job, counts, world_size, machine):
    """How many GPUs of the same kind would do, or None if no advisable number does."""
    more = 2 * world_size
    while more <= MOST_PROCESSES:
        host = None if machine.host is None else machine.host * world_size / more  # they share what there is
        for name, prediction in predictions(job, counts, more).items():
            if job.memory in (name, "auto") and Machine(machine.card, host).has_room(prediction):
                return more
        more *= 2
    return None


def refuse(job, counts, world_size, machine, prediction):
    """Raise UserError: what there is too little of, and the flags that would help."""
    what = "a full fine-tune" if not job.lora else f"--lora {job.lora}"
    if job.memory != "auto":
        what = flags_of(job.lora, job.memory)
    helps = others_that_fit(job, counts, world_size, machine)
    if not job.checkpointing:
        helps.append("--checkpointing")
    more = more_gpus(job, counts, world_size, machine)
    if more is not None:
        helps.append(f"{more} GPUs (torchrun --nproc_per_node)")
    batch, _ = job.share(world_size)
    helps.append("a smaller --batch" if batch > 1 else "a smaller --size")
    if machine.lacks(prediction) == "host":
        seen = (f"predicted {prediction.host / GIB:.0f} GiB of the host's memory a process, "
                f"{machine.host / GIB:.0f} are free")
    else:
        seen = (f"predicted peak {(prediction.peak + CONTEXT) / GIB:.0f} GiB a GPU, this one has "
                f"{machine.card / GIB:.0f}")
    raise UserError(f"--model {job.model}, {what}: {seen}; what helps: " + ", or ".join(helps))


def choose(job, world_size, machine):
    """For --memory auto: (name, why in one line), the first that fits. Raises UserError if none does, naming
    flags that would."""
    counts = count(job, torch.bfloat16)
    found = predictions(job, counts, world_size)
    for name, prediction in found.items():
        if machine.has_room(prediction):
            return name, because(name, prediction, machine, list(found))
    smallest = min(found.values(), key=peak_of)
    refuse(job, counts, world_size, machine, smallest)


def peak_of(prediction):
    return prediction.peak


def because(name, prediction, machine, names):
    """Why a --memory was chosen, in one line."""
    host = f" and {prediction.host / GIB:.0f} of the host" if prediction.host else ""
    passed = names[:names.index(name)]
    tried = f"; {', '.join(passed)} would not fit" if passed else ""
    return (f"--memory {name}: predicted {(prediction.peak + CONTEXT) / GIB:.1f} GiB of the card's "
            f"{machine.card / GIB:.1f}{host}{tried}")


def settle(job, world):
    """Before anything is loaded: (--memory, a line that says why, or None). What was asked for is checked;
    auto is chosen. Raises UserError if it does not fit, with flags that do."""
    modes.check(job.lora, job.memory)
    if job.memory == "auto" and world.device.type == "cpu":
        return modes.on_a_cpu(job.lora), None
    machine = this_machine(world)
    if job.memory == "auto":
        return choose(job, world.size, machine)
    if world.device.type == "cuda" or job.memory in modes.ON_THE_HOST:
        counts = count(job, torch.bfloat16)
        prediction = divide(job, counts, world.size, torch.bfloat16)
        if not machine.has_room(prediction):
            refuse(job, counts, world.size, machine, prediction)
    return job.memory, None


# -------------------------------------------------------------------------------------------------- the table
def seconds(prediction, peak, share):
    """Of an update: computing, or copying between host and card where that takes longer. They overlap."""
    return max(prediction.flop / TERA / (peak * share), prediction.bus / GIGA / BUS)


def show_cards(job, share):
    """Print what fits one card of every size: a full fine-tune, and a LoRA, each with the first --memory that
    fits."""
    counts = count(job, torch.bfloat16)
    print(f"\nwhat fits one card, predicted ({CONTEXT / GIB:.2f} GiB of CUDA's own counted; an update of "
          f"{job.images} images at {share:.0%} of the card's peak,\nor of the bus at {BUS} GB/s if that takes longer; "
          "the optimizer's step on the host apart)")
    print(f"    {'card':20}{'flags':34}{'GiB':>8}{'host GiB':>10}{'an update':>11}{f'{job.updates} updates':>12}")
    for card in gpus.CARDS:
        for rank in (None, job.lora or USUAL_RANK):
            shown = card.name if rank is None else ""
            print(f"    {shown:20}{row(replace(job, lora=rank), counts, card, share)}")


def row(job, counts, card, share):
    """A line of the table, behind the card's name."""
    for name, prediction in predictions(job, counts, 1).items():
        if Machine(card.gib * GIB).has_room(prediction):
            flags = flags_of(job.lora, name)
            host = f"{prediction.host / GIB:.0f}" if prediction.host else "-"
            each = seconds(prediction, card.peak, share)
            return (f"{flags:34}{(prediction.peak + CONTEXT) / GIB:8.1f}{host:>10}{in_time(each):>11}"
                    f"{in_time(job.updates * each):>12}")
    return f"{'--lora ' + str(job.lora) if job.lora else 'a full fine-tune':34}{'no':>8}"
