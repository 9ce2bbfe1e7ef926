"""What a whole run costs beside its updates: the pictures that are evaluated, the disk, what is downloaded. Predicted
from the `counts.Job`, without weights."""

from engine.memory.work import flop_per_call, flop_per_step

AT_MOST = 0.1  # of the run's work, for the evaluation before and after it
EVALUATED = (256, 128, 64, 32, 16)  # pictures; the largest number that costs so little is taken


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
