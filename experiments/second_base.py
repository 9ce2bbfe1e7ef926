"""Does SRPO hold on another architecture, with classifier-free guidance? Table 1's first rows on the second miniature.

    python -m experiments.second_base

miniature2 is a FLUX.2-klein of the same world. It is not distilled, so its rollouts and samples are guided (--cfg 4).
For the calls with a gradient there are three choices (--cfg-gradient): off, the prompt's alone; both, guided; prompt,
guided, with a gradient only through the prompt's call.
"""

from pathlib import Path

from engine.data import prompt_files
from engine.errors import frame
from experiments import landing, offline, pages, runs, table1
from experiments.pages import shown
from experiments.runs import Setting

COLUMNS = {"updates": ("updates", ".1f")} | {
    name: column for name, column in table1.COLUMNS.items() if name not in ("diversity", "optimizer_steps")}
PLAIN = "plain reward"
GRADIENTS = [Setting("SRPO, both with a gradient", "--cfg-gradient both"),
             Setting("SRPO, the prompt's with a gradient", "--cfg-gradient prompt"),
             Setting("SRPO, norm kept", "--cfg-keep-norm")]


def settings(photographs):
    """The `Setting`s of the page. photographs: the folder whose SGP gap a run lands at."""
    return [Setting("SRPO", ""), Setting("SRPO fast", "--recipe fast"),
            Setting("SRPO fast, landing", f"--recipe fast --land {photographs} --steps {landing.MOST}"),
            Setting(PLAIN, "--recipe direct-align"), *GRADIENTS]


def verdict(found):
    """What the page says of its claim."""
    ours = found["SRPO"]
    base = found["base"]
    plain = found[PLAIN]
    gradients = "; ".join(f"{setting.name.removeprefix('SRPO, ')}: {shown(found[setting.name]['realism'], '.1%')} and "
                          f"{shown(found[setting.name]['alignment'], '.1%')}" for setting in GRADIENTS)
    holds = (ours["realism"].mean > base["realism"].mean + 0.5 and ours["broken"].mean <= runs.BROKEN
             and ours["alignment"].mean >= base["alignment"].mean - 0.05)
    return pages.verdict(
        holds, f"SRPO's realism is {shown(ours['realism'], '.1%')}, the base's {shown(base['realism'], '.1%')}, with "
        f"the plain reward {shown(plain['realism'], '.1%')} at a redness of {shown(plain['redness'], '+.3f')} (SRPO "
        f"{shown(ours['redness'], '+.3f')}). Alignment: {shown(ours['alignment'], '.1%')}, base "
        f"{shown(base['alignment'], '.1%')}. Broken: {shown(ours['broken'], '.1%')}. Realism and alignment of the "
        f"other ways of guidance: {gradients}.")


def main(argv=None):
    with frame("second_base"):
        common = runs.parser(__doc__, seeds=3, pictures=256)
        common.set_defaults(model="miniature2")
        own = runs.parse(common, argv)
        photographs = Path(own.home) / "references"  # as landing draws them
        held_out = {prompt for name in ("prompts_eval", "prompts_select")
                    for prompt in prompt_files.read_prompts(f"miniature/{name}.txt")}
        offline.draw(photographs, landing.REFERENCES, held_out)
        rows = settings(photographs)
        seeds = runs.by_seed(own, rows, "second_base", table1.WORDS, looks=runs.watching(own))
        found = {row: pages.pooled(each) for row, each in seeds.items()}
        for setting in rows:
            logs = [runs.log_of(runs.trained(own, setting.flags, seed, runs.watching(own)))
                    for seed in setting.seeds(own)]
            found[setting.name] |= pages.over_seeds([landing.ends(log) for log in logs])
            found[setting.name] |= pages.over_seeds([table1.cost(own, setting.flags)])
        told = (f"{pages.counted(found)} {pages.ERROR} Rollouts and samples are guided with weight 4. TFLOP are the "
                "transformer's, with guidance. Of the row that lands they are those of all its updates, though it "
                "stops before.")
        claim = "SRPO fine-tunes rectified flows, whatever their network. Does it hold on FLUX.2-klein's, guided?"
        page = pages.Page("A second base: FLUX.2-klein's layout, with classifier-free guidance", claim, verdict(found),
                          told, [(found, COLUMNS)])
        pages.write(own, "second_base", page, pages.bar_figure(found, ("realism", "alignment", "broken", "redness")))


if __name__ == "__main__":
    main()
