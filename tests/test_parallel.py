"""Claims about many processes, on the CPU over gloo: the same code that runs on GPUs over NCCL."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from scripts import call, start

import flow
from engine.memory import parallel
from engine.model import export, single_file
from engine.model.folder import Model
from engine.run import checkpoint
from engine.run import folder as run_folder
from evaluation.report.curves import read_log

SMALL = ["train.py", "--model", "miniature", "--rollout-steps", "3", "--eval-steps", "2",
         "--watch", "2", "--watch-every", "1", "--eval", "0"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """one_process(n): the gradient of four images in one process that takes the shares of n ranks in turn."""
    @cache
    def gradient(n):
        path = tmp_path_factory.mktemp("gradient") / "one"
        call(path.with_name("printed"), "tests/worker.py", path, 1, n, 4, 4 // n)
        return load_file(path)
    return gradient


def flat(gradient):
    return torch.cat([gradient[k].flatten() for k in sorted(gradient) if k != "gathers"])


@pytest.mark.parametrize("n, replicas", [
    pytest.param(2, 1, id="2 ranks"), pytest.param(4, 2, id="HSDP 2 x 2", marks=pytest.mark.slow)])
def test_ranks_compute_the_gradient_of_one_process(one_process, tmp_path, n, replicas):
    """Within 1e-6, relative, in fp32 (one process takes the ranks' shares in turn, so that the matrices have
    the same shapes); and the rollout of 5 steps gathers every unit once: 6 blocks and the root."""
    call(tmp_path / "printed", "tests/worker.py", tmp_path / "n", replicas, n, 4, 4 // n, ranks=n)
    got, reference = load_file(tmp_path / "n"), one_process(n)
    assert got["gathers"].item() == 7 and reference["gathers"].item() == 0
    assert (flat(got) - flat(reference)).norm() / flat(reference).norm() < 1e-6


def test_the_dtypes_of_a_gpu_work_and_stay_near(one_process, tmp_path):
    """float32 masters and gradients, bf16 compute, bf16 VAE, activation checkpointing, 2 ranks: the code of a
    GPU run, on the CPU. The gradient is float32's to a few per cent, as bf16 is."""
    call(tmp_path / "printed", "tests/worker.py", tmp_path / "bf16", 1, 2, 4, 2, "bf16", ranks=2)
    got = load_file(tmp_path / "bf16")
    assert all(g.dtype == torch.float32 for k, g in got.items() if k != "gathers")
    assert torch.nn.functional.cosine_similarity(flat(got), flat(one_process(2)), dim=0) > 0.97


@pytest.mark.slow
def test_32_accumulated_batches_in_bf16(tmp_path):
    """Released: 32 images on 32 GPUs. Here on one, in bf16 with float32 masters: 32 batches of one image,
    whose gradients FSDP2 sums in float32, are as near to float32's gradient as one batch of 32. (pytest -m
    slow -s)"""
    cases = {"float32": (2, 16), "one batch": (2, 16, "bf16"), "32 batches": (2, 1, "bf16")}
    gradient = {}
    for name, (ranks, size, *mode) in cases.items():
        call(tmp_path / "printed", "tests/worker.py", tmp_path / name, 1, ranks, 32, size, *mode, ranks=ranks)
        gradient[name] = flat(load_file(tmp_path / name))
    off = {}
    for name in ("one batch", "32 batches"):
        off[name] = ((gradient[name] - gradient["float32"]).norm() / gradient["float32"].norm()).item()
        print(f"{name}: relative distance to float32 {off[name]:.4f}")
    assert off["32 batches"] < 1.5 * off["one batch"]


@pytest.mark.slow
def test_a_process_that_dies_ends_all_and_its_error_is_shown_once(tmp_path):
    """A prompt whose reward is NaN on rank 1 alone would be the polite case; here rank 1 raises in the middle
    of a step."""
    script = tmp_path / "dies.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {os.getcwd()!r})
import srpo_reward, train
if os.environ["RANK"] == "1":
    srpo_reward.loss = lambda *_: (_ for _ in ()).throw(ArithmeticError("the cause"))
train.main()
""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, str(script), *SMALL[1:], "--global-batch", "2", "--steps", "3",
                           "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("ArithmeticError: the cause") == 1 and "RuntimeError" not in done.stderr


def finished(out):
    """The finished checkpoints of the run in a folder, oldest first."""
    return run_folder.finished(out)


def weights(out):
    return load_file(out / "weights" / "diffusion_pytorch_model.safetensors")


def assert_saved_for_comfyui(out):
    """The file of --save-as comfyui holds the run's weights, in bf16."""
    found = single_file.tensors_of(out / "weights" / "comfyui.safetensors")
    for name, tensor in weights(out).items():
        assert torch.equal(found[name][0:len(tensor)], tensor.bfloat16()), name


@pytest.mark.parametrize("ranks", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_two_ranks_train_as_one_process_and_resume_on_one_and_three(tmp_path, ranks):
    """Two ranks = one process, weights and log, of six images an update; a run saved on 2 ranks goes on, on 1 and
    on 3, with no other flag than more updates."""
    two, one, printed = (tmp_path / n for n in ("two", "one", "printed"))
    flags = [*SMALL, "--global-batch", 6]
    call(printed, *flags, "--steps", 1, "--out", two, "--save-as", "comfyui", ranks=2)
    assert_saved_for_comfyui(two)
    call(printed, *flags, "--steps", 2, "--out", one)
    call(printed, "train.py", "--steps", 2, "--out", two, "--resume", ranks=ranks)
    assert json.loads((two / "weights_best" / "config.json").read_text())["_class_name"] == "FluxTransformer2DModel"
    reference = weights(one)
    difference = max((reference[k] - w).abs().max().item() for k, w in weights(two).items())
    # an update moves a weight by 4e-5: Adam turns 1e-8 of a small gradient into more
    assert difference < 2e-6
    logs = [read_log(o / "log.jsonl") for o in (one, two)]
    for a, b in zip(*logs, strict=True):
        assert b["reward_denoise"] == pytest.approx(a["reward_denoise"], abs=1e-5)
        assert b["watch"]["sgp"] == pytest.approx(a["watch"]["sgp"], abs=1e-5)


def test_killed_at_any_moment_it_resumes_bit_identically(tmp_path):
    """kill -9 at random moments of training and writing (KILLS of them, default 2; KILLS=10 for the long
    version); the end is that of the uninterrupted run."""
    whole, killed, printed = tmp_path / "whole", tmp_path / "killed", tmp_path / "printed"
    kills = int(os.environ.get("KILLS", 2))
    flags = [*SMALL, "--global-batch", "2", "--steps", str(kills + 6), "--save-every", "1"]
    call(printed, *flags, "--out", whole)
    for after in (0.8 * random.random() for _ in range(kills)):
        resume = ["--resume"] if finished(killed) else ["--overwrite"]
        before = len(finished(killed)) and int(finished(killed)[-1].name[5:])
        process, = start(printed, *flags, "--out", killed, *resume)
        while (not [c for c in finished(killed) if int(c.name[5:]) > before]
               and process.is_alive()):
            time.sleep(0.02)
        time.sleep(after)
        process.kill()
        process.join()
    call(printed, *flags, "--out", killed, "--resume")
    a, b = weights(whole), weights(killed)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_status_says_so(tmp_path, number):
    out = tmp_path / "run"
    process, = start(tmp_path / "printed", *SMALL, "--global-batch", 1, "--steps", 500, "--out", out)
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number and (out / "weights" / "config.json").is_file()
    newest = finished(out)[-1]
    last = checkpoint.step_of(newest)
    assert f"stopped after step {last}, saved; --resume continues" in (tmp_path / "printed").read_text()
    logged = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    waits = checkpoint.state_of(newest)["unlogged"]  # the line of a step whose watch was cut short
    assert logged == list(range(1, last + (waits is None)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_whose_neighbour_never_comes_can_be_stopped(tmp_path, number):
    """The first of two waits for the other, which was stopped before it could say that it is there."""
    printed = tmp_path / "printed"
    first, second = start(printed, *SMALL, "--global-batch", 1, "--steps", 1, "--out", tmp_path / "run", ranks=2)
    second.kill()
    time.sleep(3)  # it is waiting by now
    os.kill(first.pid, number)
    first.join(20)
    first.kill()  # if it is still there
    first.join()
    assert first.exitcode == 0
    assert "stopped before the first update" in printed.read_text()


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path, monkeypatch, capsys):
    import train
    save, out = checkpoint.dcp.save, tmp_path / "run"
    monkeypatch.setattr(sys, "argv", [*SMALL, "--global-batch", "1", "--steps", "3", "--save-every", "1",
                                      "--out", str(out)])

    def full(*args, **kwargs):
        if finished(out):
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 1
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py:")]
    assert len(message) == 1 and "No space left on device" in message[0] and "step_00001" in message[0]
    assert [c.name for c in finished(out)] == ["step_00001"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_export_is_one_file_in_diffusers_layout(tmp_path, miniature, dtype):
    export.export(miniature.transformer, tmp_path / "w", parallel.World(), dtype)
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "w")
    assert all(torch.equal(x, y.to(dtype).float())
               for x, y in zip(again.parameters(), miniature.transformer.parameters(), strict=True))
    ours = flow.load(Model("miniature"), tmp_path / "w").transformer
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), again.parameters(), strict=True))


def test_the_export_has_the_keys_that_comfyui_converts(tmp_path, miniature):
    """ComfyUI knows a diffusers FLUX by these names, all of them, and needs one file."""
    export.export(miniature.transformer, tmp_path, parallel.World())
    def linear(prefix, *names):
        return [f"{prefix}{n}.{end}" for n in names for end in ("weight", "bias")]
    keys = linear("", "x_embedder", "context_embedder", "norm_out.linear", "proj_out")
    for part in ("timestep_embedder", "guidance_embedder", "text_embedder"):
        keys += linear(f"time_text_embed.{part}.", "linear_1", "linear_2")
    for i in range(2):
        block = f"transformer_blocks.{i}."
        keys += linear(block, "norm1.linear", "norm1_context.linear",
                       "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
                       "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
                       "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
        keys += [f"{block}attn.{n}.weight" for n in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    for i in range(4):
        block = f"single_transformer_blocks.{i}."
        keys += linear(block, "norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v")
        keys += [f"{block}attn.{n}.weight" for n in ("norm_q", "norm_k")]
    assert sorted(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) == sorted(keys)


def test_a_transformer_in_several_files_loads_too(tmp_path, miniature):
    miniature.transformer.save_pretrained(tmp_path, max_shard_size="3MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = flow.load(Model("miniature"), tmp_path).transformer
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), miniature.transformer.parameters(),
                                              strict=True))


def test_a_size_that_does_not_divide_is_one_line(tmp_path):
    printed = call(tmp_path / "printed", *SMALL, "--global-batch", 1, "--replicas", 3, "--out", tmp_path / "x",
                   ranks=2, status=2)
    ours = [line for line in printed.splitlines() if line.startswith("train.py:")]
    assert ours == ["train.py: --replicas 3: does not divide the 2 processes"]
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_slurm_script_stops_before_the_limit_and_is_requeued(tmp_path):
    """With stand-ins for srun and scontrol: SIGTERM saves a checkpoint and requeues; the next start ends the run."""
    tools = tmp_path / "bin"
    tools.mkdir()
    python = Path(sys.executable).parent
    for name, text in (("srun", 'while [[ "$1" == -* ]]; do shift; done; exec "$@"'),
                       ("scontrol", f'[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/said')):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "2"}
    path = f"{tools}:{python}:{os.environ['PATH']}"
    quiet = {"env": os.environ | slurm | {"PATH": path, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL,
             "stderr": subprocess.DEVNULL}
    out = tmp_path / "run"
    flags = ("--model miniature --steps 6 --global-batch 2 --rollout-steps 1 --eval-steps 1 --watch 2 --watch-every 6 "
             "--save-every 1 --eval 0")
    command = ["bash", "docs/slurm.sh", *flags.split(), "--out", str(out)]
    with subprocess.Popen(command, **quiet) as first:
        deadline = time.monotonic() + 300
        while not (out / "log.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        first.terminate()
        first.wait(120)
    assert (tmp_path / "said").read_text() == "requeue 7\n"
    assert list((out / "checkpoints").iterdir()) and not (out / "summary.json").exists()
    subprocess.run(command, check=True, timeout=300, **quiet)
    assert json.loads((out / "summary.json").read_text())["steps"] == 6
    assert (tmp_path / "said").read_text() == "requeue 7\n"
