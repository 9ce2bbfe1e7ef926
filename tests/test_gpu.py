"""Claims about experiments/gpu.py: it measures part by part, goes on after what fails and after a kill, and keeps to
its time. On the miniature's CPU, and wholly on the stub of CUDA."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rehearsal import build
from test_rehearsal import stub  # noqa: F401

from engine.files import write_json
from experiments import bench, gpu, on_a_card

TINY = "--rollout-steps 1 --eval-steps 1 --watch 1"
UPDATES = [part.name for part in gpu.PARTS if part.module == gpu.UPDATE]


def measure(home, *argv):
    gpu.main(["--model", "miniature", "--home", str(home), "--flags", TINY, *argv])
    return json.loads((home / "pages" / "gpu.json").read_text())["found"]


def told(**more):
    return {"phases": dict.fromkeys(bench.PHASES, 1.0), "seconds": 3.0, "first": 4.0, "images": 2, "planned": 5.0,
            "reserved": 5.1} | more


@pytest.fixture
def asked(monkeypatch):
    """The command lines of the parts, which are not run; each takes no time, and one fails."""
    asked = []

    def in_a_process(words, seconds, printed):
        asked.append(words)
        if "split" in words:
            return "torch.OutOfMemoryError: CUDA out of memory"
        file = words[words.index("--json") + 1] if "--json" in words else words[3]
        write_json(file, told() if "--json" in words else {"seconds": 2.0} if "sampling" in words else {"cosine": 1.0})
        return None

    monkeypatch.setattr(gpu, "in_a_process", in_a_process)
    return asked


def test_what_runs_out_of_memory_is_noted_and_the_next_goes_on(asked, tmp_path, capsys):
    found = measure(tmp_path)
    assert list(found) == gpu.NAMES and len(asked) == len(gpu.PARTS)
    assert found["all weights, split"] == {"failed": "torch.OutOfMemoryError: CUDA out of memory"}
    page = (tmp_path / "pages" / "gpu.md").read_text()
    assert "- all weights, split: torch.OutOfMemoryError: CUDA out of memory" in page
    # README.md's columns: 5.1 GiB and CUDA's 1.25; 32 images take 16 times the 3 s of two
    assert "| `--lora 32 --memory fp8` | 6.3 | 48 s | 15.2 min |" in page
    assert (tmp_path / "pages" / "gpu.png").exists()


def test_after_a_kill_it_goes_on(monkeypatch, asked, tmp_path, capsys):
    """What is measured is not measured again, and what failed is not tried again; other flags are other numbers."""
    run = gpu.in_a_process

    def killed(words, seconds, printed):
        if len(asked) == 3:
            raise KeyboardInterrupt
        return run(words, seconds, printed)

    monkeypatch.setattr(gpu, "in_a_process", killed)
    parts = ["--parts", *gpu.NAMES[:5]]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        measure(tmp_path, *parts)
    so_far = json.loads((tmp_path / "pages" / "gpu.json").read_text())["found"]
    assert list(so_far) == gpu.NAMES[:3]
    monkeypatch.setattr(gpu, "in_a_process", run)
    assert list(measure(tmp_path, *parts)) == gpu.NAMES[:5] and len(asked) == 5
    measure(tmp_path, "--flags", "--rollout-steps 2", *parts)
    assert len(asked) > 5


def test_the_least_important_is_left_out_when_time_ends(monkeypatch, asked, tmp_path, capsys):
    """Also after a kill, for what was measured before counts; and a part is stopped at the end of the time."""
    clock = iter(range(0, 10**6, 300))  # every part takes five minutes
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    assert list(measure(tmp_path, "--minutes", "14")) == gpu.NAMES[:3]
    assert list(measure(tmp_path, "--minutes", "14")) == gpu.NAMES[:3] and len(asked) == 3
    assert "determinism: not reached" in (tmp_path / "pages" / "gpu.md").read_text()

    def endless(words, seconds, printed):
        raise subprocess.TimeoutExpired(words, seconds)

    monkeypatch.setattr(gpu, "in_a_process", endless)
    assert list(measure(tmp_path, "--minutes", "20")) == gpu.NAMES[:3]  # 5 are left, less than MOST


def test_a_part_that_hangs_is_stopped_and_the_next_goes_on(monkeypatch, asked, tmp_path, capsys):
    """After MOST minutes; so 16 that hang take the time of --minutes and no more."""
    run = gpu.in_a_process

    def hangs(words, seconds, printed):
        assert seconds <= 60 * gpu.MOST
        if "offload" in words:
            raise subprocess.TimeoutExpired(words, seconds)
        return run(words, seconds, printed)

    monkeypatch.setattr(gpu, "in_a_process", hangs)
    parts = ("LoRA, float8 base", "all weights, on the host", "all weights, streamed")
    found = measure(tmp_path, "--parts", *parts)
    assert list(found) == list(parts)
    assert found["all weights, on the host"] == {"failed": "it took more than 8 minutes"}


@pytest.mark.parametrize("code, told", [
    ("pass", None), ("raise ValueError('no such thing')", "ValueError: no such thing"),
    ("import sys; sys.exit(3)", "exit status 3"),
    ("import sys; print('bench: a line of its own'); sys.exit('bench: does not fit')", "bench: does not fit")])
def test_what_went_wrong_is_one_line(tmp_path, code, told):
    assert gpu.in_a_process(["-c", code], 60, tmp_path / "printed") == told


def test_a_process_of_a_part_that_lives_on_is_not_waited_for(tmp_path):
    """As that which numerics starts: it writes where its parent writes."""
    code = "import subprocess, time; subprocess.Popen(['sleep', '20']); time.sleep(20)"
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        gpu.in_a_process(["-c", code], 2, tmp_path / "printed")
    assert time.monotonic() - began < 15


def test_the_parts_run_on_the_miniature(monkeypatch, tmp_path, capsys):
    """In this process: an update, a picture, and the gradient twice, which is the same bit for bit on a CPU."""

    def here(words, seconds, printed):
        module = bench if words[1] == "experiments.bench" else on_a_card
        monkeypatch.setattr(sys, "argv", words[1:])
        module.main()

    monkeypatch.setattr(gpu, "in_a_process", here)
    found = measure(tmp_path, "--parts", "all weights, float32 masters", "picture, bf16", "determinism")
    assert found["all weights, float32 masters"]["seconds"] > 0 < found["picture, bf16"]["seconds"]
    assert found["determinism"]["the same bits"] == 1 and found["determinism"]["largest"] == 0


@pytest.mark.slow
def test_numerics_compares_with_the_cpu(tmp_path):
    on_a_card.main(["numerics", str(tmp_path / "numerics.json"), *TINY.split()])
    found = json.loads((tmp_path / "numerics.json").read_text())
    assert found["cosine"] == pytest.approx(1) and found["reward"] == found["reward on the CPU"]


@pytest.mark.slow
@pytest.mark.skipif(build.missing() is not None, reason=f"no rehearsal of CUDA: {build.missing()}")
@pytest.mark.parametrize("gib, card, fits, does_not", [
    ("23.6", "NVIDIA GeForce RTX 4090", {"LoRA, float8 base", "picture, float8"}, "all weights, split"),
    ("139.8", "NVIDIA H200", {"all weights, split", "all weights, compiled", "LoRA, bf16 base, rollout in float8",
                              "picture, bf16"}, "all weights, float32 masters")])
def test_it_is_rehearsed_on_cuda(stub, tmp_path, gib, card, fits, does_not):  # noqa: F811
    """All parts, each in a process of its own. What fits reserves what the plan says, within 5 %."""
    path = os.pathsep.join([str(Path.cwd()), str(Path("tests/rehearsal").resolve()),
                            str(Path("tests/rehearsal/always").resolve())])
    environment = os.environ | stub | {"PYTHONPATH": path, "STUB_GIB": gib, "STUB_NAME": card, "HF_HUB_OFFLINE": "1"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, "-m", "experiments.gpu", "--home", str(tmp_path), "--minutes", "60",
                           "--flags", "--rollout-steps 1"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "pages" / "gpu.json").read_text())["found"]
    assert list(found) == gpu.NAMES
    measured = {name for name, each in found.items() if "failed" not in each}
    assert measured >= fits and does_not not in measured
    for name, each in found.items():  # the stub computes no numbers, so its reward reads all words alike
        why = "reads --control" if name in ("numerics", "determinism") else "predicted "
        assert name in measured or why in each["failed"], name
        if name in measured and "planned" in each:
            assert each["planned"] == pytest.approx(each["reserved"], rel=0.05), name
