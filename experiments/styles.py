"""Fig. 8: other words than "realistic photo". Fig. 9 c: the same words also in the prompt, when pictures are sampled.

    python -m experiments.styles

Each pair of words is trained for the recipe's updates and for half of them, because some words need fewer. The second
table has pictures whose prompts begin with the wanted word: of the base, and of the model that was trained with it.
"""

from pathlib import Path

import command
from engine.data import prompt_files
from engine.errors import frame
from engine.files import write_whole
from experiments import pages, runs
from experiments.pages import shown
from experiments.runs import Setting
from srpo_reward import with_words

WORDS = [("realistic photo", "CG render"), ("dark", "bright"), ("bright", "dark"), ("painting", "print")]
COLUMNS = {"realism": ("realism", ".1%"), "brightness": ("brightness", ".3f"),
           "painting": ("painting", ".1%"), "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%")}


def flags_of(words):
    """The flags of train.py for a pair of words: the wanted and the unwanted one."""
    wanted, unwanted = words
    return f"--control '{wanted}' --neg '{unwanted}' --threshold off"


def in_the_prompt(own, wanted, setting):
    """Two rows {row: {column: `Spread`}}: the base, and the model trained as `setting` says, sampled from prompts that
    begin with the word `wanted`."""
    prompts = prompt_files.read_prompts(command.flags(["--model", own.model]).eval_prompts)
    file = Path(own.home) / f"prompts_{wanted.replace(' ', '_')}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "\n".join(with_words(wanted, prompts)) + "\n")
    rows = runs.measured(own, [setting], f"prompt_{wanted.replace(' ', '_')}", prompts=file)
    return {f"base, prompts with {wanted!r}": rows["base"],
            f"trained with {wanted!r}, prompts with it": rows[setting.name]}


def main(argv=None):
    with frame("styles"):
        own = runs.parse(runs.parser(__doc__, seeds=3), argv)
        half = command.flags(["--model", own.model]).steps // 2
        settings = []
        with_word = {}
        for wanted, unwanted in WORDS:
            name = f"{wanted} against {unwanted}"
            flags = flags_of((wanted, unwanted))
            short = Setting(f"{name}, {half} updates", f"{flags} --steps {half}")
            settings += [Setting(name, flags), short]
            with_word |= in_the_prompt(own, wanted, short)
        rows = runs.measured(own, settings, "styles", WORDS[0][0])
        dark, bright, base = (rows[name]["brightness"] for name in
                              (settings[3].name, settings[5].name, "base"))
        word, both = with_word["base, prompts with 'painting'"], with_word["trained with 'painting', prompts with it"]
        result = pages.verdict(
            dark.mean < base.mean < bright.mean and both["painting"].mean > word["painting"].mean,
            f"brightness goes from {shown(base, '.3f')} to {shown(dark, '.3f')} (dark) and {shown(bright, '.3f')} "
            f"(bright) in {half} updates. Prompts with 'painting' make {shown(word['painting'], '.1%')} paintings on "
            f"the base, and {shown(both['painting'], '.1%')} after {half} updates with that word.")
        told = (f"The first table: words in training. The second table: the same words at the start of the prompts, "
                f"on the base and after {half} updates with that word. {pages.counted(rows)} {pages.ERROR} Brightness "
                "is the mean luma.")
        claim = "Other words steer as well (Fig. 8); a style word in the prompt works better after training (Fig. 9 c)."
        page = pages.Page("Other words (Figs. 8 and 9 c)", claim, result, told, [(rows, COLUMNS), (with_word, COLUMNS)])
        pages.write(own, "styles", page, pages.bar_figure(rows | with_word, ("realism", "brightness", "painting")))


if __name__ == "__main__":
    main()
