"""Runs scripts of the project with the stub preloaded: `python run.py REPORT LINE ...`, each LINE a script and its
flags. REPORT becomes {LINE: {"said": None or what went wrong, "update": the `COUNTS` of the last update, "graphs",
"breaks": what torch.compile has made, and where it had to stop; "cpu": seconds of the processor}}."""

import ctypes
import importlib
import json
import shlex
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from build import COUNTS
from torch._dynamo.utils import counters as compiled


def counts():
    """What the stub has counted so far: {name: number}."""
    return dict(zip(COUNTS, (ctypes.c_longlong * len(COUNTS)).in_dll(ctypes.CDLL(None), "stub_counts"), strict=True))


def since(before):
    """What the stub has counted since `before`; of memory that is pinned, what is there now."""
    now = counts()
    return {name: now[name] - (0 if name.startswith("pinned") else before[name]) for name in COUNTS}


# --------------------------------------------------------------------- operators whose host code wants the real cuDNN
def same(*tensors):
    """Raise TypeError unless all tensors have one dtype and one device, as cuDNN demands."""
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) > 1:
        raise TypeError(f"cuDNN takes one dtype and one device, and got {kinds}")


def convolution(x, weight, padding, stride, dilation, *others):
    """The output of a convolution, without values."""
    same(x, weight)
    sides = zip(x.shape[2:], weight.shape[2:], padding, stride, dilation, strict=True)
    size = [(side + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for side, kernel, pad, step, gap in sides]
    out = x.new_empty([len(x), len(weight), *size])
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        out = out.contiguous(memory_format=torch.channels_last)
    return out


def convolution_backward(gradient, x, weight, bias, *others):
    """The gradients of a convolution that are asked for, without values."""
    same(gradient, x, weight)
    wanted = others[-1]
    return (torch.empty_like(x) if wanted[0] else None, torch.empty_like(weight) if wanted[1] else None,
            gradient.new_empty(bias) if wanted[2] else None)


def attention(query, key, value, *others, scale=None):
    """The outputs of cuDNN's attention, without values: it is chosen on cards from Hopper on."""
    same(query, key, value)
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"cuDNN's attention got {query.dtype}")
    batch, heads, tokens, _ = query.shape
    out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    none = query.new_empty(0, dtype=torch.int32)
    seed = query.new_empty((), dtype=torch.int64)
    log_sum = query.new_empty(batch, heads, tokens, 1, dtype=torch.float32)
    return out, log_sum, none, none, tokens, key.shape[2], seed, seed, none


def attention_backward(gradient, query, key, value, *others, scale=None):
    """The gradients of cuDNN's attention, without values."""
    same(gradient, query, key, value)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def stand_in():
    """Put them in place of torch's. Returns what must be kept as long as they are to stay."""
    library = torch.library.Library("aten", "IMPL")
    for name, function in (("cudnn_convolution", convolution), ("convolution_backward", convolution_backward),
                           ("_scaled_dot_product_cudnn_attention", attention),
                           ("_scaled_dot_product_cudnn_attention_backward", attention_backward)):
        library.impl(name, function, "CUDA")
    return library


# ------------------------------------------------------------------------------------------------------------- cases
def run(line):
    """One line, to its end: {"said", "update"}."""
    script, *argv = shlex.split(line)
    train = importlib.import_module("train")
    told = {"said": None, "update": None}
    torch.compiler.reset()  # what a line before has compiled
    compiled.clear()
    began = time.process_time()
    real = train.update

    def update(*arguments, **options):
        before = counts()
        found = real(*arguments, **options)
        told["update"] = since(before)
        return found

    train.update = update
    importlib.import_module("prepare").must_tell_apart = lambda *arguments: None  # without values all texts are alike
    sys.argv = [script, *argv]
    try:
        importlib.import_module(script.removesuffix(".py")).main()
    except (Exception, SystemExit) as error:
        if not isinstance(error, SystemExit) or error.code:
            traceback.print_exc()
            told["said"] = f"{type(error).__name__}: {error}"
    train.update = real
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return told | {"graphs": compiled["stats"]["unique_graphs"], "breaks": sum(compiled["graph_break"].values()),
                   "cpu": time.process_time() - began}


def main():
    report, *lines = sys.argv[1:]
    warnings.filterwarnings("ignore", message="Warning only once for all operators")
    kept = stand_in()
    found = {line: run(line) for line in lines}
    Path(report).write_text(json.dumps(found | {"wrong_device": counts()["wrong_device"]}))
    del kept


if __name__ == "__main__":
    main()
