"""Claims about CUDA, on a machine without a GPU: every path of the project on the real torch above a stub of CUDA
(tests/rehearsal). Seen are dtypes, devices, memory, copies, launches and waits; no values, no time. Every --memory runs
with the usual tests; `pytest -m slow tests/test_rehearsal.py` runs the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import make_aesthetic, make_photographs, make_pickscore
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
ON_THE_HOST = 2  # the same where the optimizer and the gradient's norm are on the host
WAITS = 3  # of an update: for the flags and the gradient's norm, for what the step made, for the log's numbers


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """The environment of a process that has the stub."""
    return build.compiled(tmp_path_factory.mktemp("stub"))


def rehearse(stub, folder, *lines, ranks=0, **card):
    """Run lines, each a script and its flags, in one process, or in one for each rank. card: STUB_... of stub.c.
    Returns what rank 0 reports, without the lines' common start: {line: ...}."""
    path = os.pathsep.join([str(Path.cwd()), str(Path("tests/rehearsal").resolve())])
    common = os.environ | stub | card | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    common.pop("CUDA_VISIBLE_DEVICES", None)  # conftest.py hides real ones; this one is not
    started = []
    for rank, place in enumerate(places(ranks)):
        command = [sys.executable, "tests/rehearsal/run.py", str(folder / f"{rank}.json"), *lines]
        with open(folder / f"{rank}.txt", "w") as printed:
            started.append(subprocess.Popen(command, env=common | place, stdout=printed, stderr=printed))
    try:
        for rank, process in enumerate(started):
            assert process.wait(900) == 0, (folder / f"{rank}.txt").read_text()[-4000:]
    finally:
        for process in started:
            process.kill()
    reports = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(started))]
    for rank, report in enumerate(reports):
        assert report.pop("wrong_device") == 0
        wrong = {line: told["said"] for line, told in report.items() if told["said"]}
        assert not wrong, (folder / f"{rank}.txt").read_text()[-6000:]
    return reports[0]


def of_training(folder, *flags):
    """A line of train.py for each text of flags, each with a folder of its own."""
    return [f"train.py {SHORT} --out {folder}/run{number} {words}" for number, words in enumerate(flags)]


# ------------------------------------------------------------------------------------------------------ every path
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
    report = rehearse(stub, folder, *lines, shown)
    assert (folder / "samples" / "00000.png").exists()
    return {name: report[line]["update"] for name, line in zip(named, lines, strict=True)}


def test_every_memory_runs_from_the_set_up_to_the_export(updates):
    assert all(update["launches"] > 1000 for update in updates.values())


@pytest.mark.parametrize("name", MEMORY)
def test_nothing_is_copied_to_the_gpu_that_the_process_waits_for(updates, name):
    assert updates[name]["up_blocking"] == 0


@pytest.mark.parametrize("name", ["masters", "split", "bf16", "fp8", "more", "accumulated"])
def test_an_update_waits_three_times_however_much_it_computes(updates, name):
    """Not once more for a rollout step, a term, a batch or a parameter."""
    update = updates[name]
    assert (update["stream_syncs"], update["device_syncs"], update["down"]) == (WAITS, 0, WAITS)


def test_uploads_of_an_update(updates):
    """Of a batch: its embeddings (txt, pooled), its noise twice (the start and what is injected), and where its
    branches meet, one an injection. The rest comes with FSDP2's own tables of pointers, none a term or a parameter."""
    masters = updates["masters"]
    assert updates["more"]["up"] <= masters["up"] + 1 + 2 * 20
    assert masters["up_bytes"] < 10**6


@pytest.mark.parametrize("name, parameters, batches", [
    ("offload", 140, 1), ("stream", 140, 1), ("fp8-offload", 88, 1), ("offload, accumulated", 140, 4)])
def test_gradients_come_to_the_host_once_a_batch_and_nothing_waits_for_them(updates, name, parameters, batches):
    """Into pinned memory. Both branches are one call, so a batch has one backward."""
    update = updates[name]
    assert update["down"] == parameters * batches + ON_THE_HOST
    assert (update["down_blocking"], update["stream_syncs"], update["device_syncs"]) == (ON_THE_HOST, ON_THE_HOST, 0)


def test_a_rollout_in_float8_waits_no_more(updates):
    """And fewer products are left to the libraries of bf16."""
    ours, theirs = updates["float8"], updates["masters"]
    assert (ours["stream_syncs"], ours["down"], ours["up"]) == (WAITS, WAITS, theirs["up"])
    assert ours["products"] < theirs["products"]


@pytest.mark.slow
def test_methods_photographs_and_explanations(stub, tmp_path):
    make_photographs(tmp_path / "photographs")
    lora = "--lora 4 --memory fp8"
    lines = of_training(
        tmp_path, "--method refl", "--method draft-lv", "--method dancegrpo --group 2",
        f"--images {tmp_path}/photographs", "--recover epsilon --meet call --form branches --injections 2 "
        "--noise fresh --batch 2", "--explain", f"--explain {lora}", lora)
    weights = f"{tmp_path}/run{len(lines) - 1}/weights"
    goes_on = f"train.py --out {tmp_path}/run0 --resume --steps 3"
    more = of_training(tmp_path / "more", f"--weights {weights} {lora}", f"--weights {weights}")
    rehearse(stub, tmp_path, *lines, goes_on, *more)


@pytest.mark.slow
def test_every_reward_with_every_lean_memory(stub, tmp_path):
    """SigLIP is kept in bf16 there, and the head beside it stays float32."""
    make_aesthetic(tmp_path / "aesthetic")
    make_pickscore(tmp_path / "pickscore")
    rewards = ("miniature/reward", f"aesthetic={tmp_path}/aesthetic", f"pickscore={tmp_path}/pickscore",
               f"miniature/reward:0.5,aesthetic={tmp_path}/aesthetic:0.5")
    lean = ("--memory stream", "--lora 4 --memory fp8", "--lora 4 --memory fp8-offload")
    lines = of_training(tmp_path, *(f"--reward {reward} {memory}" for reward in rewards for memory in lean))
    rehearse(stub, tmp_path, *(line.replace("--steps 2", "--steps 1") for line in lines))


@pytest.mark.slow
def test_pictures_are_sampled_and_evaluated(stub, tmp_path):
    lines = []
    for memory in sampling.NAMES:
        lines += [f"sample.py {SAMPLED} --memory {memory} --out {tmp_path}/{memory} 'a red circle' 'a blue square'",
                  f"evaluate.py {SAMPLED} --memory {memory} --first 2 --metrics reward,look --out {tmp_path}/t{memory}"]
    rehearse(stub, tmp_path, *lines)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--memory masters", "--lora 4 --memory fp8"])
def test_two_processes(stub, tmp_path, flags):
    """Each uses its own card alone."""
    report = rehearse(stub, tmp_path, *of_training(tmp_path, flags), ranks=2, STUB_GPUS="2")
    assert report.popitem()[1]["update"]["collectives"] > 0


@pytest.mark.slow
def test_compiled_blocks(stub, tmp_path):
    """By the real compiler, whose kernels compute nothing. Nowhere it has to stop."""
    told = rehearse(stub, tmp_path, *of_training(tmp_path, "--compile")).popitem()[1]
    assert told["graphs"] > 0 == told["breaks"] == told["update"]["up_blocking"]


# ---------------------------------------------------------------------------------------------------------- the card
def told_by(stub, *command, **card):
    """(exit status, output) of a command with the stub, with the GPUs that the card's STUB_... give it."""
    environment = os.environ | stub | card | {"PYTHONPATH": f".{os.pathsep}tests"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_card_without_bf16_is_refused(stub):
    status, told = told_by(stub, "train.py", "--model", "miniature", STUB_SM="75", STUB_NAME="Tesla T4")
    assert status == 2 and told.count("\n") == 1
    assert "Tesla T4: compute capability 7.5, and bf16 needs 8.0" in told


@pytest.mark.slow
def test_the_tests_hide_gpus_from_themselves(stub):
    """Several put a network on a GPU beside inputs on a CPU, or two processes on one card."""
    assert told_by(stub, "-c", "import torch; print(torch.cuda.is_available())")[1].strip() == "True"
    assert told_by(stub, "-c", "import conftest, torch; print(torch.cuda.is_available())")[1].strip() == "False"


# --------------------------------------------------------------------------------------------- FLUX.1-dev's real size
LINES = {1: [*(flags.replace("--lora 4", "--lora 32") or "--memory masters" for flags in MEMORY.values()),
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
