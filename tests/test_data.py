"""Claims about engine/data/: the files that prompts come in, and which are held out."""

import pytest

from engine.data import draws, prompt_files

FOX, DOG = "a fox, asleep", 'a "dog"'
FILES = {
    "lines.txt": f"{FOX}\n\n  {DOG}  \n",
    "lines.prompts": f"{FOX}\n{DOG}\n",
    "list.json": '["a fox, asleep", {"prompt": "a \\"dog\\""}]',
    "texts.jsonl": '"a fox, asleep"\n\n"a \\"dog\\""\n',
    "objects.jsonl": '{"id": 1, "prompt": "a fox, asleep"}\r\n{"id": 2, "caption": "a \\"dog\\""}',
    "both.jsonl": '{"text": "no", "prompt": "a fox, asleep"}\n{"prompt": null, "text": "a \\"dog\\""}',
    "UPPER.JSONL": '{"text": "a fox, asleep"}\n{"text": " "}\n{"text": "a \\"dog\\""}',
    "header.csv": 'id,Prompt\n1,"a fox, asleep"\n2,"a ""dog"""\n',
    "caption.csv": '\ufeffCAPTION,file\r\n"a fox, asleep",a.png\r\n\r\n"a ""dog""",b.png\r\n',
    "one_column.csv": 'prompt\n"a fox, asleep"\n"a ""dog"""\n',
    "semicolons.csv": 'id;text\n1;a fox, asleep\n2;"a ""dog"""\n',
    "tabs.csv": '"id"\t"text"\n1\ta fox, asleep\n2\t"a ""dog"""\n',
    "tabs.tsv": 'Prompt\tCategory\na fox, asleep\tAbstract\n"a ""dog"""\tAbstract\n',
    "tabs.TAB": 'id\ttext\n1\ta fox, asleep\n2\t"a ""dog"""\n',
    "commas.tsv": 'id,prompt\n1,"a fox, asleep"\n2,"a ""dog"""\n',
    "bars.csv": 'id|prompt\n1|a fox, asleep\n2|"a ""dog"""\n',
    "one_column.tsv": 'Texts\na fox, asleep\n"a ""dog"""\n',
    "plural.csv": 'id, Prompts\n1, "a fox, asleep"\n2, "a ""dog"""\n',
    "joined.txt": '\ufeffa fox, asleep\n\ufeffa "dog"\n\u200b\n',
    "lines.ndjson": '"a fox, asleep"\n{"Prompt": "a \\"dog\\""}\n',
    "captions.json": '[{"caption": "a fox, asleep"}, {"text": "a \\"dog\\""}]'}


@pytest.mark.parametrize("name", FILES)
def test_prompts_come_in_any_of_these_files(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name].encode())
    assert prompt_files.read_prompts(tmp_path / name) == [FOX, DOG]


def test_a_prompt_may_run_over_lines_and_hold_a_line_break_of_unicode(tmp_path):
    (tmp_path / "p.csv").write_text('prompt,id\n"a fox\nasleep",1\na dog,2\n')
    assert prompt_files.read_prompts(tmp_path / "p.csv") == ["a fox\nasleep", "a dog"]
    for separator in "\u2028\x0b\x0c\x1c\x1d\x1e\x85":
        (tmp_path / "p.txt").write_text(f"a fox{separator}asleep\na dog\n", encoding="utf-8")
        assert prompt_files.read_prompts(tmp_path / "p.txt") == [f"a fox{separator}asleep", "a dog"]
    (tmp_path / "p.jsonl").write_text('"a fox\u2028asleep"\n"a dog"\n')
    assert prompt_files.read_prompts(tmp_path / "p.jsonl") == ["a fox\u2028asleep", "a dog"]


LINES = {  # of a text file, although they begin with the name of a column or hold its separators
    "prose": ["text, bold, red poster", "a fox, asleep"], "one word": ["promptly", "a fox"],
    "one in quotes": ['"a fox"', "a dog"], "brackets": ["[red] fox", "{fox}"],
    "a table of one line": ["prompt, category"]}


@pytest.mark.parametrize("lines", LINES.values(), ids=LINES)
def test_lines_of_prose_stay_lines(tmp_path, lines):
    (tmp_path / "p.txt").write_text("\n".join(lines))
    assert prompt_files.read_prompts(tmp_path / "p.txt") == lines


@pytest.mark.parametrize("items, n, held, left", [
    (range(100), 4, [0, 25, 50, 75], 96),       # evenly spread
    (range(30), 4, [0, 10, 20], 27),            # a tenth at most
    (range(9), 4, [], 9),                       # of a few, none
    ([*range(20), 0, 0, 10], 2, [0, 10], 18)])  # nor any that is equal to one of them
def test_what_is_held_out_is_not_trained_on(items, n, held, left):
    held_out, others = draws.hold_out(list(items), n)
    assert held_out == held and len(others) == left and not set(held) & set(others)
