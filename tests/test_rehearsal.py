"""Claims about CUDA, on a machine without a GPU: every path of the project on the real torch above a stub of CUDA
(tests/rehearsal). Seen are dtypes, devices, memory, copies, launches and waits; no values, no time. Every --memory runs
with the usual tests; `pytest -m slow tests/test_rehearsal.py` runs the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import make_aesthetic, make_hpsv3, make_photographs, make_pickscore
from rehearsal import build
from scripts import places

from engine.memory import sampling

WHY = build.missing()
pytestmark = pytest.mark.skipif(WHY is not None, reason=f"no rehearsal of CUDA: {WHY}")

SHORT = "--model miniature --rollout-steps 2 --eval-steps 1 --watch 1 --eval 0 --global-batch 2 --steps 2 --cache off"
SAMPLED = "--model miniature --eval-steps 1"
MEMORY = {"masters": "", "split": "--memory split", "offload": "--memory offload", "stream": "--memory stream",
          "bf16": "--lora 4 --memory bf16", "fp8": "--lora 4 --memory fp8",
          "fp8-offload": "--lora 4 --memory fp8-offload"}
LEAN = [MEMORY[name] for name in ("stream", "fp8", "fp8-offload")]


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """The environment of a process that has the stub."""
    return build.compiled(tmp_path_factory.mktemp("stub"))


def rehearse(stub, folder, *groups, ranks=False, **card):
    """Run groups of lines, each a script and its flags, all at once: a group is one process, or one rank of those that
    meet. card: STUB_... of stub.c. Returns what they report: {line: ...}; of ranks, what rank 0 reports. All lines must
    succeed."""
    path = os.pathsep.join([str(Path.cwd()), str(Path("tests/rehearsal").resolve())])
    common = os.environ | stub | card | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                                         "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    common.pop("CUDA_VISIBLE_DEVICES", None)  # conftest.py hides real ones; this one is not
    environments = places(len(groups)) if ranks else places(0) * len(groups)
    started = []
    for number, (lines, place) in enumerate(zip(groups, environments, strict=True)):
        command = [sys.executable, "tests/rehearsal/run.py", str(folder / f"{number}.json"), *lines]
        with open(folder / f"{number}.txt", "w") as printed:
            started.append(subprocess.Popen(command, env=common | place, stdout=printed, stderr=printed))
    found = {}
    try:
        for number, process in enumerate(started):
            assert process.wait(3600) == 0, (folder / f"{number}.txt").read_text()[-4000:]
    finally:
        for process in started:
            process.kill()
    for number in reversed(range(len(groups))):
        report = json.loads((folder / f"{number}.json").read_text())
        assert report.pop("wrong_device") == 0
        wrong = {line: told["said"] for line, told in report.items() if told["said"]}
        assert not wrong, (folder / f"{number}.txt").read_text()[-6000:]
        found |= report
    return found


def of_training(folder, *flags):
    """A line of train.py for each text of flags, each with a folder of its own."""
    return [f"train.py {SHORT} --out {folder}/run{number} {words}" for number, words in enumerate(flags)]


# ------------------------------------------------------------------------------------------------------ every path
# What the second update does: copies to the GPU; copies from it; how often the process waits for the stream, and for an
# event. The events are marks of the log's seconds, one a batch and two more; where parameters are on the host also each
# gradient that comes there, at the end of a backward (FSDP2) and before it is added to that of another batch.
WAITS = 3  # for the flags and the gradient's norm, for what the step made, for the log's numbers
ON_THE_HOST = 2  # the same where the optimizer and the gradient's norm are on the host
COUNTS = {"masters": (23, 3, 3, 3), "split": (9, 3, 3, 3), "offload": (436, 142, 2, 144), "stream": (572, 142, 2, 144),
          "bf16": (21, 3, 3, 3), "fp8": (17, 3, 3, 3), "fp8-offload": (1131, 90, 2, 92), "more": (38, 3, 3, 3),
          "accumulated": (84, 3, 3, 6), "offload, accumulated": (1736, 562, 2, 987), "float8": (23, 3, 3, 3),
          "fp8, float8": (17, 3, 3, 3), "stream, float8": (572, 142, 2, 144)}


@pytest.fixture(scope="module")
def updates(stub, tmp_path_factory):
    """{--memory, or a name: what the stub counted in the second update}, and after it pictures of a LoRA. All of it is
    one process, for importing takes as long as two of these runs."""
    folder = tmp_path_factory.mktemp("updates")
    named = MEMORY | {"more": "--rollout-steps 4 --injections 2", "accumulated": "--global-batch 4 --batch 1",
                      "offload, accumulated": "--memory offload --global-batch 4 --batch 1",
                      "float8": "--rollout-dtype fp8", "fp8, float8": "--lora 4 --memory fp8 --rollout-dtype fp8",
                      "stream, float8": "--memory stream --rollout-dtype fp8"}
    lines = of_training(folder, *named.values())
    lora = f"{folder}/run{list(named).index('fp8')}/weights"
    shown = f"sample.py {SAMPLED} --memory fp8-offload --weights {lora} --out {folder}/samples 'a red circle'"
    report = rehearse(stub, folder, [*lines, shown])
    assert (folder / "samples" / "00000.png").exists()
    return {name: report[line]["update"] for name, line in zip(named, lines, strict=True)}


def test_every_memory_runs_from_the_set_up_to_the_export(updates):
    assert all(update["launches"] > 1000 for update in updates.values())


@pytest.mark.parametrize("name", COUNTS)
def test_copies_and_waits_of_an_update(updates, name):
    """Exactly, so that none is added unseen. Nothing that is copied to the GPU makes the process wait."""
    update = updates[name]
    assert (update["up"], update["down"], update["stream_syncs"], update["event_syncs"]) == COUNTS[name]
    assert (update["up_blocking"], update["device_syncs"]) == (0, 0)
    assert update["down_blocking"] == update["stream_syncs"]


def test_an_update_waits_as_often_however_much_it_computes():
    """Not once more for a rollout step, a term, a batch or a parameter."""
    for name, (_, _, waits, _) in COUNTS.items():
        assert waits == (ON_THE_HOST if "offload" in name or "stream" in name else WAITS)


@pytest.mark.parametrize("name, parameters, batches", [
    ("offload", 140, 1), ("stream", 140, 1), ("fp8-offload", 88, 1), ("offload, accumulated", 140, 4)])
def test_gradients_come_to_the_host_once_a_batch(name, parameters, batches):
    """Into pinned memory. Both branches are one call, so a batch has one backward."""
    assert COUNTS[name][1] == parameters * batches + ON_THE_HOST


def test_a_rollout_in_float8_leaves_fewer_products_to_the_libraries_of_bf16(updates):
    assert updates["float8"]["products"] < updates["masters"]["products"]


def every_other_path(folder):
    """{what: lines}."""
    make_photographs(folder / "photographs")
    make_aesthetic(folder / "aesthetic")
    make_pickscore(folder / "pickscore")
    make_hpsv3(folder / "hpsv3")
    rewards = ("miniature/reward", f"aesthetic={folder}/aesthetic", f"pickscore={folder}/pickscore",
               "imagereward=miniature/reward_cross", f"hpsv3={folder}/hpsv3")
    mixture = ",".join(f"{reward}:1" for reward in rewards)
    rewards = [f"--reward {reward} {memory}" for reward, memory in zip(rewards, 2 * LEAN, strict=False)]
    paths = {
        "methods": ["--method refl", "--method draft-lv", "--method dancegrpo --group 2",
                    "--method refl --memory stream", "--method draft-lv --lora 4 --memory fp8-offload",
                    "--method dancegrpo --group 2 --lora 4 --memory fp8"],
        "photographs and explanations": [
            f"--images {folder}/photographs", "--recover epsilon --meet call --form branches --injections 2 "
            "--noise fresh --batch 2", "--explain", "--explain --lora 4 --memory fp8"],
        "rewards": [f"--steps 1 {flags}" for flags in [*rewards, *(f"--reward {mixture} {each}" for each in LEAN)]],
        "a GPU of its own": ["--reward-device cuda:1", f"--reward-device cuda:1 --reward hpsv3={folder}/hpsv3"],
        "FLUX.2-klein": [f"--steps 1 --model miniature2 {memory}" for memory in MEMORY.values()],
        "compiled": [f"--steps 1 --watch 2 --compile {flags}"
                     for flags in ("", f"{MEMORY['fp8']} --rollout-dtype fp8")],
        "begun": ["--memory split", "--lora 4 --memory fp8", "--lora 4 --memory fp8-offload"]}
    lines = {what: of_training(folder / what.replace(" ", "_"), *flags) for what, flags in paths.items()}
    begun = [folder / "begun" / f"run{number}" for number in range(len(paths["begun"]))]
    lines["resumed"] = [f"train.py --out {run} --resume --steps 3" for run in begun]
    weights = f"--weights {begun[1]}/weights"
    lines["a LoRA continued and merged"] = of_training(
        folder / "weights", f"{weights} --lora 4 --memory fp8", weights)
    lines["experiments.gpu's gradients"] = [f"experiments.on_a_card.py {what} {folder}/{what}.json {SHORT}"
                                            for what in ("determinism", "numerics")]
    lines["sampled and evaluated"] = []
    for memory in sampling.NAMES:
        out = f"--memory {memory} --out {folder}/{memory}"
        lines["sampled and evaluated"] += [
            f"sample.py {SAMPLED} {out} 'a red circle' 'a blue square'",
            f"evaluate.py {SAMPLED} {out}_table --first 2 --metrics reward,look"]
    return lines


@pytest.mark.slow
def test_every_other_path_runs(stub, tmp_path):
    """In two processes, two and a half minutes. SigLIP is kept in bf16 in lean memory, and the head beside it stays
    float32. The compiled blocks are made by the real compiler: nowhere it has to stop, and no block runs uncompiled."""
    paths = every_other_path(tmp_path)
    compiled = paths.pop("compiled")
    report = rehearse(stub, tmp_path, compiled, [line for lines in paths.values() for line in lines], STUB_GPUS="2")
    for line in compiled:
        print(f"{line}: {report[line]['cpu']:.0f} s of a CPU core")
        assert report[line]["graphs"] > 0 == report[line]["breaks"] == report[line]["update"]["up_blocking"]
    assert "recompile_limit" not in (tmp_path / "0.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("flags, collectives", [("--memory masters", 29), ("--lora 4 --memory fp8", 35)])
def test_two_processes(stub, tmp_path, flags, collectives):
    """Each uses its own card alone. They meet once, so each case starts its own. Parameters are gathered once for the
    rollout (fp8: for each of its two steps) and twice for both branches, and gradients leave once."""
    report = rehearse(stub, tmp_path, *2 * [of_training(tmp_path, flags)], ranks=True, STUB_GPUS="2")
    assert report.popitem()[1]["update"]["collectives"] == collectives


@pytest.mark.slow
def test_two_processes_evaluate(stub, tmp_path):
    line = f"evaluate.py {SAMPLED} --memory fp8 --out {tmp_path}/table --first 2 --metrics reward,look"
    rehearse(stub, tmp_path, [line], [line], ranks=True, STUB_GPUS="2")
    assert (tmp_path / "table" / "table.md").exists()


# ---------------------------------------------------------------------------------------------------------- the card
def told_by(stub, *command, **card):
    """(exit status, output) of a command with the stub, with the GPUs that the card's STUB_... give it."""
    environment = os.environ | stub | card | {"PYTHONPATH": f".{os.pathsep}tests"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_card_without_bf16_is_refused(stub):
    status, told = told_by(stub, "train.py", "--model", "miniature", STUB_SM="75", STUB_NAME="Tesla T4")
    assert status == 2 and "Traceback" not in told
    assert told.splitlines()[-1].startswith("train.py: Tesla T4: compute capability 7.5, and bf16 needs 8.0")


@pytest.mark.slow
def test_the_tests_hide_gpus_from_themselves(stub):
    """Several put a network on a GPU beside inputs on a CPU, or two processes on one card. Without conftest.py the
    same process has a GPU, or nothing of all this would run."""
    assert told_by(stub, "-c", "import conftest, torch; print(torch.cuda.is_available())")[1].strip() == "False"


# --------------------------------------------------------------------------------------------- FLUX.1-dev's real size
LINES = {1: [*(flags.replace("--lora 4", "--lora 32") or "--memory masters" for flags in MEMORY.values()),
             "--lora 32 --memory bf16 --rollout-dtype fp8",
             *(f"sample --memory {name}" for name in sampling.NAMES[1:])],
         8: ["--memory masters", "--lora 32 --memory fp8"]}


@pytest.fixture(scope="module", params=LINES)
def at_full_size(stub, tmp_path_factory, request):
    """(number of processes, what full.py reports of every line), on a card of 400 GiB, so that nothing is freed for
    room."""
    processes = request.param
    report = tmp_path_factory.mktemp("full") / "report.json"
    path = os.pathsep.join([str(Path.cwd()), str(Path("tests/rehearsal").resolve())])
    environment = os.environ | stub | {"PYTHONPATH": path, "STUB_GIB": "400", "HF_HUB_OFFLINE": "1"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    subprocess.run([sys.executable, "tests/rehearsal/full.py", str(report), str(processes), *LINES[processes]],
                   env=environment, check=True, capture_output=True, timeout=1800)
    return processes, json.loads(report.read_text())


@pytest.mark.slow
def test_the_plan_is_what_the_allocator_reserves(at_full_size):
    """Within 5 %, for every --memory, and for sampling."""
    processes, told = at_full_size
    assert list(told) == LINES[processes]
    off = {line: each["planned"] / each["reserved"] - 1 for line, each in told.items()}
    assert all(abs(share) < 0.05 for share in off.values()), off


@pytest.mark.slow
def test_the_optimizers_launches_at_full_size(at_full_size):
    """--memory split joins and splits the halves of every matrix: 16 launches for each of 500, beside clipping."""
    processes, told = at_full_size
    if processes == 1:
        assert told["--memory masters"]["optimizer"] < 2000 < told["--memory split"]["optimizer"] < 10_000
