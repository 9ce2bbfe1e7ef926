"""Claims about engine/memory/plan.py: the real FLUX.1-dev config, with no GPU and no weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import command
import flow
import prepare
import train
from engine.errors import UserError
from engine.memory import adamw, cards, counts, gpus, layouts, parallel, plan, shown, whole_run, work
from engine.model import lora
from engine.model.folder import Model

GIB, TERA = 2**30, 1e12


def job(*argv):
    """What train.py plans with these flags."""
    return prepare.job(*command.read(["--memory", "masters", "--global-batch", "1", *argv]))


def miniature_job(*argv):
    return job("--model", "miniature", "--reward", "miniature/reward", "--size", "64", *argv)


@pytest.fixture(scope="module")
def counted():
    """FLUX.1-dev's job and counts."""
    its_job = job()
    return its_job, counts.count(its_job, torch.bfloat16)


@pytest.fixture(scope="module")
def predicted(counted):
    """{processes: the prediction for FLUX.1-dev in bf16}."""
    its_job, counts = counted
    return {n: plan.divide(its_job, counts, n, torch.bfloat16) for n in (1, 8, 32)}


def test_the_counts_of_flux_1_dev(predicted):
    """11.90 B parameters; 25 rollout steps of 37.28 TFLOP; two calls of four times that; decode and ViT-H."""
    one = predicted[8]
    assert one.all_parameters / 1e9 == pytest.approx(11.901, abs=1e-3)
    assert one.rollout / TERA == pytest.approx(25 * 37.28, rel=1e-3)
    assert one.update / TERA == pytest.approx(2 * 4 * 37.28, rel=1e-3)
    assert one.decode / TERA == pytest.approx(20.2, rel=0.02)
    assert work.update_flop(job()) == one.rollout + one.update


@pytest.mark.parametrize("n, transformer", [(1, 180.6), (8, 26.6), (32, 10.3)])
def test_the_transformers_peak_agrees_with_a_memory_tracker(counted, n, transformer):
    """Another prediction, torch's FSDPMemTracker under fake tensors, within 5 %; of calls one after the other."""
    its_job, counts = counted
    p = plan.divide(replace(its_job, together=1), counts, n, torch.bfloat16)
    ours = p.parameters + p.gradients + p.optimizer + p.activations + p.gathered
    assert ours / GIB == pytest.approx(transformer, rel=0.05)


@pytest.mark.slow
def test_recomputing_activations_saves_what_it_says(counted, predicted):
    """And costs the forward of every call again."""
    its_job, _ = counted
    kept = plan.predict(replace(its_job, checkpointing=False), 8, torch.bfloat16)
    assert 15 < (kept.activations - predicted[8].activations) / GIB < 25
    assert kept.update / TERA == pytest.approx(2 * 3 * 37.28, rel=1e-3)


def test_the_whole_run_has_looks_an_evaluation_and_files(counted):
    """12 bytes a number in a checkpoint, 8 with --memory split; 2 in each file of the weights."""
    its_job, counts = counted
    a, model = command.read([])
    a.eval = 16
    lines = whole_run.told(its_job, a, model, counts, torch.bfloat16).splitlines()
    assert [line.strip().split("  ")[0] for line in lines[2:]] == [
        "19 updates", "4 pictures watched, 5 times", "16 pictures evaluated, twice", "disk", "3 checkpoints",
        "weights, weights_best",
        "downloads, unless they are here: 33.6 GB of black-forest-labs/FLUX.1-dev, and the rewards and prompts"]
    assert "428 GB" in lines[6] and "47.6 GB" in lines[7]
    assert whole_run.disk(replace(its_job, memory="split"), 10, 2, True) == {"3 checkpoints": 240,
                                                                         "weights, weights_best": 60}


def test_state_is_16_bytes_a_parameter_over_the_shards(counted, predicted):
    for n, p in predicted.items():
        assert p.parameters + p.gradients + p.optimizer == pytest.approx(16 * p.all_parameters / n)
    its_job, counts = counted
    replicated = plan.divide(replace(its_job, replicas=4), counts, 32, torch.bfloat16)
    assert replicated.parameters == pytest.approx(predicted[8].parameters)


def test_groups_of_processes_average_their_gradients():
    """HSDP: beside what a group's processes gather and average among themselves, twice 3/4 of a shard's
    float32 gradient a call of both branches, between four groups."""
    one = miniature_job()
    alone = plan.predict(one, 8, torch.bfloat16)
    grouped = plan.predict(replace(one, replicas=4), 32, torch.bfloat16)
    between = one.calls / one.together * 2 * 3 / 4 * grouped.gradients
    assert grouped.received == pytest.approx(alone.received + between)
    with pytest.raises(UserError, match="--replicas 4: does not divide the 6 processes"):
        plan.predict(replace(one, replicas=4), 6, torch.bfloat16)


def test_accumulated_batches_take_time_and_no_more_activations():
    """All work and communication four times, in the same memory: the allocator keeps that of gradients anyway."""
    one = miniature_job("--global-batch", "8", "--batch", "1")
    four = miniature_job("--global-batch", "32", "--batch", "1")
    once, times = plan.predict(one, 8, torch.bfloat16), plan.predict(four, 8, torch.bfloat16)
    assert (times.flop, times.received) == (4 * once.flop, 4 * once.received)
    assert work.update_flop(four) == 4 * work.update_flop(one)
    assert times.peak_in_update == once.peak_in_update
    assert times.peak_in_rollout == once.peak_in_rollout


def test_a_size_that_the_model_cannot_have():
    with pytest.raises(UserError, match="--size 100.*must be multiples of 16 pixels"):
        job("--size", "100")


def test_no_number_of_gpus_is_advised_that_would_not_do():
    """Without recomputed activations the first advice is to recompute them; and a batch that fits no card is
    to be smaller."""
    huge = replace(miniature_job("--no-checkpointing"), images=10**9, batch=10**6, memory="auto")
    with pytest.raises(UserError, match="what helps: --checkpointing, or a smaller --batch$"):
        cards.choose(huge, counts.count(huge, torch.bfloat16), 1, cards.Machine(80 * GIB))


# ----------------------------------------------------------------------------------- every --memory, one card
def on_one_card(counted, rank=None):
    """{--memory: its prediction} for one process."""
    its_job, counts = counted
    return cards.predictions(replace(its_job, lora=rank), counts, 1)


def test_what_a_card_holds_of_flux_1_dev(counted):
    """GiB of weights, gradients and optimizer; of everything; and on the host. 11.9 B parameters at 16 bytes
    as masters, 10 split; adapters of rank 32 beside 418 layers are 131 M at 16 bytes, on a base of 2 or about
    1 byte. On the host torch rounds what a GPU copies up to a power of two: 227 GiB instead of 177."""
    found = on_one_card(counted) | on_one_card(counted, 32)
    state = {}
    for name, p in found.items():
        held = (p.parameters + p.gradients + p.optimizer) / GIB
        state[name] = (round(held, 1), round(p.peak / GIB, 1), round(p.host / GIB))
    assert state == {"masters": (177.3, 204.6, 0), "split": (110.8, 121.6, 0), "offload": (0, 27.5, 227),
                     "stream": (0, 9.1, 227), "bf16": (24.1, 34.8, 0), "fp8": (13.1, 18.9, 0),
                     "fp8-offload": (0, 9.1, 20)}


def test_text_encoders_are_part_of_the_peak(counted):
    """T5 XXL and CLIP in bf16, 9.1 GiB, are more than an update with --memory fp8-offload takes."""
    found = on_one_card(counted, 32)["fp8-offload"]
    assert found.peak == found.peak_in_texts == 2 * 4_885_000_000 > found.peak_in_update


def test_eight_cards_of_48_gb_do_not_hold_masters(counted):
    """In the rehearsal the allocator ran out at 43, 45 and 46 GiB."""
    its_job, counts = counted
    assert not cards.Machine(44.4 * GIB).has_room(plan.divide(its_job, counts, 8, torch.bfloat16))


def test_the_gradients_of_every_backward_come_to_the_host(counted):
    """47.6 GB once a batch, of both branches together, beside the parameters' copies; the seconds are the sum of
    computing and copying."""
    once = on_one_card(counted)["offload"]
    its_job, counts = counted
    twice = cards.predictions(replace(its_job, images=2, batch=1), counts, 1)["offload"]
    assert twice.bus == 2 * once.bus and twice.host - once.host == 2 * GIB
    assert (once.bus / 1e9) == pytest.approx(4 * 47.6, abs=0.1)  # rollout, forward, backward, gradients
    alone = once.flop / TERA / 400
    assert work.seconds(once, 1000, 0.4) == pytest.approx(alone + once.bus / 1e9 / work.BUS)


def test_what_a_rollout_in_float8_saves(counted):
    """Half the time of the rollout's products but attention's, 4.5 of 37.3 TFLOP a call. It takes 8.4 GiB more, unless
    the weights are in float8 or are copied for every call."""
    its_job, counts = counted
    predicted = plan.divide(its_job, counts, 8, torch.bfloat16)
    shape = (1, 24, 2025 + 512, 128)
    attention = 57 * sdpa_flop_count(shape, shape, shape)
    assert (round(attention / TERA, 1), round(counts.forward / TERA, 1)) == (4.5, 37.3)
    in_float8 = on_one_card((replace(its_job, rollout_dtype="fp8"), counts)) | on_one_card(
        (replace(its_job, rollout_dtype="fp8"), counts), 32)
    plain = on_one_card(counted) | on_one_card(counted, 32)
    more = {name: round((p.peak_in_rollout - plain[name].peak_in_rollout) / GIB, 1) for name, p in in_float8.items()}
    assert more == {"masters": 8.4, "split": 8.4, "offload": 8.4, "stream": 0, "bf16": 8.4, "fp8": 0, "fp8-offload": 0}
    images = predicted.rollout / its_job.rollout_steps / counts.forward
    others = its_job.rollout_steps * images * (counts.forward - attention)
    assert work.saved_by_float8(its_job, predicted, 8, 989, 0.4) == pytest.approx(others / 2 / TERA / 989 / 0.4)


def test_the_preferred_memory_is_the_fastest_that_fits(counted):
    """In the order of preference every one takes less of the card than the one before, and no less time."""
    for rank in (None, 32):
        found = list(on_one_card(counted, rank).values())
        peaks = [p.peak for p in found]
        assert peaks == sorted(peaks, reverse=True)
        times = [work.seconds(p, gpus.PEAK["H200"], 0.4) for p in found]
        assert times == sorted(times)


@pytest.mark.parametrize("rank, gib, name", [
    (None, 139.8, "split"), (None, 79.1, "offload"), (None, 44.4, "offload"), (None, 23.6, "stream"),
    (None, 11.6, "stream"), (32, 79.1, "bf16"), (32, 44.4, "bf16"), (32, 23.6, "fp8"),
    (32, 15.7, "fp8-offload"), (32, 11.6, "fp8-offload")])
def test_auto_takes_what_fits_the_card(counted, rank, gib, name):
    its_job, counts = counted
    machine = cards.Machine(gib * GIB, 256 * GIB)
    chosen, why = cards.choose(replace(its_job, lora=rank, memory="auto"), counts, 1, machine)
    assert chosen == name and why.startswith(f"--memory {name}: predicted ") and "\n" not in why
    several, _ = cards.choose(replace(its_job, lora=None, memory="auto"), counts, 8, cards.Machine(79.1 * GIB))
    assert several == "masters"


@pytest.mark.parametrize("rank, name, gib, host, words", [
    (None, "auto", 8, 256, "a full fine-tune: predicted peak 10 GiB a GPU, this one has 8; what helps: a smaller"),
    (None, "auto", 23.6, 128, "a full fine-tune: predicted 227 GiB of the host's memory a process, 128 are "
                              "free; what helps: --lora 32 --memory fp8, or "),
    (None, "masters", 139.8, 256, "--memory masters: predicted peak 206 GiB a GPU, this one has 140; what "
                                  "helps: --memory split, or 2 GPUs"),
    (None, "offload", 44.4, 64, "--memory offload: predicted 227 GiB of the host's memory a process, 64 are "
                                "free; what helps: --lora 32 --memory bf16"),
    (32, "bf16", 23.6, 64, "--lora 32 --memory bf16: predicted peak 36 GiB a GPU, this one has 24; what "
                           "helps: --lora 32 --memory fp8, or "),
    (32, "fp8-offload", 4, 64, "predicted peak 10 GiB a GPU, this one has 4; what helps: a smaller --size$")])
def test_what_does_not_fit_is_refused_with_what_does(counted, monkeypatch, rank, name, gib, host, words):
    """Before anything is loaded, a GPU that is too small, and a host that is."""
    its_job, counts = counted
    monkeypatch.setattr(cards, "count", lambda *_: counts)
    monkeypatch.setattr(cards, "this_machine", lambda _: cards.Machine(gib * GIB, host * GIB))

    class World:
        device = torch.device("cuda")
        size = 1

    with pytest.raises(UserError, match=words) as error:
        cards.settle(replace(its_job, lora=rank, memory=name), World())
    assert "\n" not in str(error.value)


def test_on_a_cpu_auto_is_the_plain_path_and_the_host_is_checked_all_the_same(monkeypatch):
    world = parallel.World()
    for rank, name in ((None, "masters"), (8, "bf16")):
        assert cards.settle(replace(miniature_job(), lora=rank, memory="auto"), world) == (name, None)
    offload = replace(miniature_job(), memory="offload")
    assert cards.settle(offload, world) == ("offload", None)
    monkeypatch.setattr(cards, "host_bytes", lambda: 2**20)
    with pytest.raises(UserError, match="of the host's memory a process, 0 are free"):
        cards.settle(offload, world)


def test_the_hosts_free_memory_is_read(tmp_path):
    """Of the machine and of the container, the smaller; files that are kept in memory count as free."""
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    where = (tmp_path / "meminfo", tmp_path)
    assert cards.host_bytes(*where) == 50 * 1024
    (tmp_path / "memory.max").write_text("40000\n")
    (tmp_path / "memory.current").write_text("30000\n")
    (tmp_path / "memory.stat").write_text("anon 20000\nfile 7000\nfile_mapped 3\n")
    assert cards.host_bytes(*where) == 17000
    assert cards.host_bytes(tmp_path / "none", tmp_path) is None


def test_the_table_has_a_line_for_every_card(capsys, counted):
    its_job, counts = counted
    cards.show_cards(replace(its_job, replicas=4), counts, 0.4)  # a plan for 32 GPUs shows single cards too
    lines = capsys.readouterr().out.splitlines()[-12:]
    assert [line.split(",")[0].strip() for line in lines[::2]] == [c.name.split(",")[0] for c in gpus.CARDS]
    assert "--memory stream" in lines[0] and "--lora 32 --memory fp8-offload" in lines[1]
    assert "--memory split" in lines[10]


def test_the_miniatures_plan_is_what_a_run_holds():
    """Bytes of weights and optimizer of two paths, predicted from the config, against the tensors of a run
    after an update; and the parameters that are trained."""
    world = parallel.World()
    for rank, name in ((None, "masters"), (4, "bf16")):
        net = flow.load(Model("miniature"))
        if rank:
            lora.add_adapters(net.transformer, rank)
        trained = layouts.trainable(net.transformer)
        optimizer = adamw.optimizer_of(trained, 1e-4, 0, name, world.device)
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        its_job = replace(miniature_job(), lora=rank, memory=name)
        predicted = plan.predict(its_job, 1, torch.float32)
        frozen = [p for p in net.transformer.parameters() if not p.requires_grad]
        assert predicted.gradients == sum(p.grad.nbytes for p in trained)
        assert predicted.optimizer == sum(value.nbytes for value in moments)
        # On a CPU the frozen base is float32; the plan is for a GPU, where it is bf16.
        base = sum(p.nbytes for p in frozen) / 2
        assert predicted.parameters == sum(p.nbytes for p in trained) + base


def test_a_lean_reward_path_saves_what_it_says(counted):
    """The VAE recomputed, ViT-H's image side alone and in bf16: 3.6 GiB instead of 6.0, and 1.3 of frozen
    networks instead of 3.8; one more decoder call."""
    full, lean = on_one_card(counted, 32)["bf16"], on_one_card(counted, 32)["fp8"]
    assert (full.reward_path / GIB, full.frozen / GIB) == pytest.approx((6.01, 3.83), abs=0.01)
    assert (lean.reward_path / GIB, lean.frozen / GIB) == pytest.approx((3.58, 1.33), abs=0.01)
    assert lean.decode == 1.5 * full.decode


CARD_ROWS = [line for line in Path("README.md").read_text(encoding="utf-8").splitlines()
             if line.startswith(("| 1 of", "| the same", "| 8 (H200)", "| 32 (H200)"))]


def test_the_readmes_cards_are_what_the_plan_says(counted):
    """GiB, minutes of an update and of all, of every row; those of one card with CUDA's own memory."""
    its_job, counts = counted
    its_job = replace(its_job, images=32, batch=1)
    assert len(CARD_ROWS) == 8
    for row in CARD_ROWS:
        where, flags, gib, update, run = (cell.strip() for cell in row.strip("|").split("|"))
        words = flags.strip("`").split()
        rank = int(words[words.index("--lora") + 1]) if "--lora" in words else None
        name = words[words.index("--memory") + 1] if "--memory" in words else "masters"
        job = replace(its_job, lora=rank, memory=name)
        if "fast" in words:
            job = replace(job, rollout_steps=4, calls=1, together=1)
        processes = {"1": 1, "t": 1, "8": 8, "3": 32}[where[0]]
        if processes == 32:
            job = replace(job, replicas=4)
        predicted = plan.divide(job, counts, processes, torch.bfloat16)
        context = cards.CONTEXT if processes == 1 else 0
        assert gib == f"{(predicted.peak + context) / GIB:.1f}", row
        names = [card for card in gpus.CARDS if f"({card.name.split(',')[0]})" in where]
        peak = names[0].peak if names else gpus.PEAK["RTX 4090"]
        seconds = work.seconds(predicted, peak, 0.4)
        assert (update, run) == (shown.in_time(seconds), shown.in_time(19 * seconds)), row


@pytest.mark.parametrize("flags, words", [
    ("--card RTX_4090 --lora 32", "--memory fp8: predicted"),
    ("--card RTX_4090 --lora 32 --memory bf16", "--lora 32 --memory bf16 does not fit RTX 4090: predicted 36.")])
def test_auto_is_chosen_for_the_card_that_is_named(capsys, flags, words):
    train.main(["--plan", "--world-size", "1", *(flag.replace("_", " ") for flag in flags.split())])
    assert words in capsys.readouterr().out


def test_the_default_dtype_stays_as_it_was():
    work.forward_flop(miniature_job())
    assert torch.get_default_dtype() == torch.float32


def call_of(miniature):
    """The miniature's velocity and what it is called with for one image: 16 image tokens, 16 of text."""
    config = miniature.transformer.config
    c = flow.Condition(torch.zeros(1, 16, config.joint_attention_dim),
                       torch.zeros(1, config.pooled_projection_dim), (4, 4))
    return miniature.velocity, torch.zeros(1, 16, config.in_channels), 0.5, c, 3.5


def test_the_miniatures_plan_is_what_a_run_computes(miniature):
    """FLOP of one forward, predicted from the config, against a call counted while it really runs, to the
    last. torch's own counter leaves out the attention of a CPU: blocks x (two products of 2) x 32 x 32 tokens
    x heads x width."""
    velocity, *arguments = call_of(miniature)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        velocity(*arguments)
    attention = 6 * 4 * 32 * 32 * 4 * 32
    predicted = work.forward_flop(miniature_job())
    assert predicted == counts.flop_of(velocity, *arguments) == counter.get_total_flops() + attention


def test_the_miniatures_activations_are_what_a_run_saves(miniature):
    """Bytes saved for the backward, predicted on fake tensors, against a call on real ones: within 1 %."""
    measured = counts.saved_by(miniature.transformer.parameters(), *call_of(miniature))
    one = counts.count(miniature_job("--no-checkpointing"), torch.float32)
    assert one.saved == pytest.approx(measured, rel=0.01)


def test_calls_of_the_transformer_are_counted(monkeypatch, tmp_path):
    """Per update: the rollout's steps, and one a branch and injection; nothing twice. (Samples are counted
    apart.)"""
    calls = []
    velocity = flow.Flow.velocity

    def counted(*arguments):
        calls.append("trained" if torch.is_grad_enabled() else "sampled")
        return velocity(*arguments)

    monkeypatch.setattr(flow.Flow, "velocity", counted)
    argv = ["--model", "miniature", "--global-batch", "2", "--rollout-steps", "5", "--eval-steps", "3",
            "--watch", "1", "--watch-every", "1", "--eval", "0", "--steps", "2",
            "--injections", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["train.py", *argv])
    train.main()
    assert job(*argv).calls == 2 * 2
    assert calls.count("trained") == 2 * (2 * 2)
    assert calls.count("sampled") == 2 * 5 + 3 * 3
