"""What a whole run costs beside its updates: the pictures that are sampled to look at, the disk, what is downloaded.
Predicted from the `counts.Job`, without weights."""

from engine.memory import gpus
from engine.memory.plan import divide
from engine.memory.shown import in_time
from engine.memory.work import GIGA, TERA, flop_per_call, flop_per_step
from engine.memory.work import seconds as seconds_of

AT_MOST = 0.1  # of the run's work, for the evaluation before and after it
EVALUATED = (256, 128, 64, 32, 16)  # pictures; the largest number that costs so little is taken
# Bytes of a checkpoint for each number that is trained: a float32 master and Adam's two moments; --memory split stores
# the moments in bf16.
IN_CHECKPOINT = 12
IN_SPLIT = 8


def share_of_evaluation(job, eval_steps, pictures):
    """The work of evaluating so many pictures before and after a run, as a share of that of its updates. Both are
    counted in calls of the transformer."""
    step = flop_per_step(job, 1)
    of_image = job.rollout_steps * step + job.calls * flop_per_call(job, 1)
    return 2 * pictures * eval_steps * step / (job.updates * job.images * of_image)


def evaluated(job, eval_steps):
    """How many pictures a run evaluates before and after it where --eval does not say: the largest of EVALUATED that
    costs AT_MOST of its updates' work; 0 if each costs more."""
    return next((n for n in EVALUATED if share_of_evaluation(job, eval_steps, n) <= AT_MOST), 0)


def disk(job, trained, keep, save_as):
    """{what: bytes} that a run writes. trained: how many numbers it trains; keep: checkpoints that stay, to which a new
    one is added before the oldest goes; save_as: whether one more file of the weights is written."""
    each = trained * (IN_SPLIT if job.memory == "split" else IN_CHECKPOINT)
    return {f"{keep + 1} checkpoints": (keep + 1) * each, "weights, weights_best": (2 + save_as) * 2 * trained}


def told(job, a, model, counts, dtype):
    """The plan of the whole run with the flags `a` and a `Model`, on --world-size GPUs --card: a text. counts: the
    `counts.Counts`; dtype: of the computation."""
    prediction = divide(job, counts, a.world_size, dtype)
    trained = job.lora * counts.adapters if job.lora else counts.parameters
    rate = gpus.PEAK[a.card] * a.share * TERA  # FLOP a second
    of_picture = a.eval_steps * flop_per_step(job, counts.forward) + counts.decode
    sampled = of_picture / rate / a.world_size  # seconds of a picture
    looks = 1 + -(-a.steps // a.watch_every)
    seconds = {f"{a.steps} updates": a.steps * seconds_of(prediction, gpus.PEAK[a.card], a.share),
               f"{a.watch} pictures watched, {looks} times": looks * a.watch * sampled}
    if a.eval:
        seconds[f"{a.eval} pictures evaluated, twice"] = 2 * a.eval * sampled
    lines = [f"\nthe whole run on {a.world_size} {a.card}, without loading and communication: "
             f"{in_time(sum(seconds.values()))}"]
    lines += [f"    {what:32}{in_time(amount):>10}" for what, amount in seconds.items()]
    lines.append("disk")
    for what, amount in disk(job, trained, a.keep, a.save_as is not None).items():
        lines.append(f"    {what:32}{amount / GIGA:10.3g} GB")
    if model.is_remote:
        amount = 2 * (counts.parameters + job.text_parameters)
        lines.append(f"downloads, unless they are here: {amount / GIGA:.3g} GB of {job.model}, and the rewards and "
                     "prompts")
    return "\n".join(lines)
