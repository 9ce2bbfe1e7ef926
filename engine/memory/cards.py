"""Which --memory fits a machine, as engine/memory/plan.py predicts. `--memory auto` chooses one; any other is checked
before anything is loaded; `python train.py --plan` prints a table for cards of every size."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from engine.errors import UserError
from engine.memory import gpus, modes
from engine.memory.counts import count
from engine.memory.plan import GIB, divide
from engine.memory.shown import in_time
from engine.memory.work import BUS, seconds

CONTEXT = 1.25 * GIB    # of a card, taken by CUDA itself and by the libraries' workspaces
USUAL_RANK = 32         # the rank of a LoRA that a message recommends
MOST_PROCESSES = 64     # the largest number of GPUs that a message recommends


class Machine(NamedTuple):
    """The memory that one process may use, in bytes, of its card and of the host. host: None if it is not known."""
    card: float
    host: float | None = None

    def has_room(self, prediction):
        """Whether a process with this `plan.Prediction` fits."""
        return not self.lacks(prediction)

    def lacks(self, prediction):
        """Which memory is too small, "card" or "host"; None if the process fits."""
        if prediction.peak + CONTEXT > self.card:
            return "card"
        if self.host is not None and prediction.host > self.host:
            return "host"
        return None

    def host_gib(self):
        """The host's GiB, as text."""
        return "?" if self.host is None else f"{self.host / GIB:.0f}"


def this_machine(world):
    """The `Machine` of one process of a `parallel.World`: its card, and its share of the host's memory."""
    card = float("inf")
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)  # so that what CUDA itself takes is taken already
        card = torch.cuda.mem_get_info(world.device)[0] + CONTEXT  # what other programs hold is not free
    host = host_bytes()
    return Machine(card, None if host is None else host / world.neighbours)


def host_bytes(meminfo="/proc/meminfo", group="/sys/fs/cgroup"):
    """Bytes of the host's memory that are still free for this process, within the limit of its container. None if
    Linux does not say. meminfo, group: where Linux reports them."""
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
            free.append(int(most) - taken + cached)  # Linux drops cached files when a process needs memory
    except (OSError, ValueError, IndexError):
        pass
    return min(free, default=None)


# --------------------------------------------------------------------------------------------- what fits them
def predictions(job, counts, world_size):
    """{--memory: its `plan.Prediction`} for a `counts.Job`, in order of preference."""
    found = {}
    for name in modes.choices(job.lora):
        found[name] = divide(replace(job, memory=name), counts, world_size, torch.bfloat16)
    return found


def flags_of(rank, name):
    """The flags for a LoRA of a rank (None: a full fine-tune) and a --memory."""
    return f"--lora {rank} --memory {name}" if rank else f"--memory {name}"


def others_that_fit(job, counts, world_size, machine):
    """[flags] that fit, for a user whose flags do not: another --memory, otherwise a LoRA; [] if nothing fits."""
    for rank in dict.fromkeys((job.lora, job.lora or USUAL_RANK)):
        for name, prediction in predictions(replace(job, lora=rank), counts, world_size).items():
            if name != job.memory and machine.has_room(prediction):
                return [flags_of(rank, name)]
    return []


def more_gpus(job, counts, world_size, machine):
    """How many GPUs of the same kind would be enough; None if MOST_PROCESSES are not."""
    more = 2 * world_size
    while more <= MOST_PROCESSES:
        host = None if machine.host is None else machine.host * world_size / more  # the processes share the host
        for name, prediction in predictions(job, counts, more).items():
            if job.memory in (name, "auto") and Machine(machine.card, host).has_room(prediction):
                return more
        more *= 2
    return None


def refuse(job, counts, world_size, machine, prediction):
    """Raise UserError, which says which memory is too small, and which flags would help."""
    what = "a full fine-tune" if not job.lora else f"--lora {job.lora}"
    if job.memory != "auto":
        what = flags_of(job.lora, job.memory)
    helps = others_that_fit(job, counts, world_size, machine)
    if not job.checkpointing:
        helps.append("--checkpointing")
    if not job.reward_apart:
        apart = replace(job, reward_apart=True)
        found = predictions(apart, counts, world_size)
        for name in found if job.memory == "auto" else [job.memory]:
            if machine.has_room(found[name]):
                helps.append(f"--reward-device cuda:{world_size}, another GPU with "
                             f"{(found[name].rewards + CONTEXT) / GIB:.0f} GiB for each process's reward")
                break
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


def choose(job, counts, world_size, machine):
    """For --memory auto: (name, why in one line) of the first --memory that fits. Raises UserError, with flags that
    would fit, if none does."""
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
    return (f"--memory {name}: predicted {(prediction.peak + CONTEXT) / GIB:.1f} GiB, {CONTEXT / GIB:.2f} of them "
            f"CUDA's own, of the card's {machine.card / GIB:.1f}{host}{tried}")


def check_reward(job, world, room):
    """Raise UserError if the rewards do not fit a device of their own. room: its bytes."""
    batch, _ = job.share(world.size)
    needed = count(job, torch.bfloat16).rewards.held(modes.is_lean(job.memory), batch) + CONTEXT
    if needed > room:
        raise UserError(f"--reward-device: predicted {needed / GIB:.0f} GiB for the rewards, this GPU has "
                        f"{room / GIB:.0f}; what helps: a GPU with {needed / GIB:.0f} GiB, or another --reward")


def settle(job, world, reward_device=None):
    """Choose --memory auto, or check any other, before anything is loaded. reward_device: the rewards' own, or None.
    Returns (--memory, why in one line, or None). Raises UserError, with flags that would fit, if it does not fit."""
    modes.check(job.lora, job.memory)
    if reward_device is not None and reward_device.type == "cuda":
        check_reward(job, world, torch.cuda.mem_get_info(reward_device)[0] + CONTEXT)
    if job.memory == "auto" and world.device.type == "cpu":
        return modes.on_a_cpu(job.lora), None
    machine = this_machine(world)
    if job.memory == "auto":
        return choose(job, count(job, torch.bfloat16), world.size, machine)
    if world.device.type == "cuda" or job.memory in modes.ON_THE_HOST:
        counts = count(job, torch.bfloat16)
        prediction = divide(job, counts, world.size, torch.bfloat16)
        if not machine.has_room(prediction):
            refuse(job, counts, world.size, machine, prediction)
    return job.memory, None


def settle_for(job, counts, world_size, card):
    """The same for --plan, on GPUs that are named, with a host that has room: (--memory, a line or None)."""
    machine = Machine(gpus.gib(card) * GIB)
    if job.memory == "auto":
        return choose(job, counts, world_size, machine)
    prediction = divide(job, counts, world_size, torch.bfloat16)
    if machine.has_room(prediction):
        return job.memory, None
    return job.memory, (f"{flags_of(job.lora, job.memory)} does not fit {card}: predicted "
                        f"{(prediction.peak + CONTEXT) / GIB:.1f} GiB a GPU, it has {gpus.gib(card):.1f}; --memory "
                        "auto chooses one that fits")


# -------------------------------------------------------------------------------------------------- the table
def show_cards(job, counts, share):
    """Print, for one card of every size, the first --memory that fits: for a full fine-tune, and for a LoRA. share: of
    the card's peak that is reached, 0 to 1."""
    print(f"\nwhat fits one card, predicted (with {CONTEXT / GIB:.2f} GiB for CUDA itself; an update of "
          f"{job.images} images at {share:.0%} of the card's peak,\nand {BUS} GB/s over the bus; "
          "without the optimizer's step on the host)")
    print(f"    {'card':20}{'flags':34}{'GiB':>8}{'host GiB':>10}{'an update':>11}{f'{job.updates} updates':>12}")
    for card in gpus.CARDS:
        for rank in (None, job.lora or USUAL_RANK):
            shown = card.name if rank is None else ""
            print(f"    {shown:20}{row(replace(job, lora=rank, replicas=1), counts, card, share)}")


def row(job, counts, card, share):
    """A line of the table, without the card's name. job: a `counts.Job`, whose lora says what is trained."""
    for name, prediction in predictions(job, counts, 1).items():
        if Machine(card.gib * GIB).has_room(prediction):
            flags = flags_of(job.lora, name)
            host = f"{prediction.host / GIB:.0f}" if prediction.host else "-"
            each = seconds(prediction, card.peak, share)
            return (f"{flags:34}{(prediction.peak + CONTEXT) / GIB:8.1f}{host:>10}{in_time(each):>11}"
                    f"{in_time(job.updates * each):>12}")
    return f"{'--lora ' + str(job.lora) if job.lora else 'a full fine-tune':34}{'no':>8}"
