"""Compiles stub.c for the torch that is installed: two libraries to preload, in a folder of their own."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

# The names of stub_counts in stub.c, in its order. up: from host to device; blocking: from or to pageable memory, so
# that the process waits for it. within: from the card to itself, as it is.
COUNTS = ("launches", "products", "up", "up_bytes", "up_blocking", "up_blocking_bytes", "down", "down_bytes",
          "down_blocking", "down_blocking_bytes", "within_bytes", "stream_syncs", "device_syncs", "event_syncs",
          "collectives", "wrong_device", "pinned", "pinned_peak")

HERE = Path(__file__).resolve().parent
WANTING = ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so", "libtorch_cpu.so", "libtorch_nvshmem.so")
KINDS = ("cuda", "__cuda", "cublas", "cudnn", "cusparse", "cufft", "nccl")
# torch compares the versions of cuDNN that it was built with and that is there. So these stay cuDNN's own.
REAL = {"cudnnGetVersion", "cudnnGetErrorString", "cudnnGetLastErrorString", "cudnnGetCudartVersion",
        "cudnnGetProperty"}
# Of the driver, what Triton links to beside what torch does.
TRITON = {"cuInit", "cuCtxSetLimit", "cuOccupancyMaxActiveClusters", "cuTensorMapEncodeIm2col"}

# The runtime's headers include one that comes with the compiler nvcc alone: words that a C compiler does not know.
WORDS = ("__host__", "__device__", "__device_builtin__", "__device_builtin_texture_type__", "__cudart_builtin__",
         "__builtin_align__(n)", "__align__(n)", "__location__(a)", "CUDARTAPI", "CUDARTAPI_CDECL", "__forceinline__")


def libraries():
    """The folder of torch's libraries."""
    return Path(importlib.util.find_spec("torch").origin).parent / "lib"


def headers():
    """The folder of the CUDA runtime's headers, beside torch; None if it is not there."""
    found = (libraries().parent.parent / "nvidia").glob("*/include/cuda_runtime_api.h")
    return next((header.parent for header in found), None)


def missing():
    """Why the stub cannot be compiled here, in one line; None if it can."""
    for tool in ("cc", "nm"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if not (libraries() / "libtorch_cuda.so").exists():
        return "torch is not a CUDA build"
    if headers() is None:
        return "the CUDA runtime's headers are not beside torch (pip install torch brings them on Linux)"
    return None


def symbols(*arguments):
    """The names that nm prints with these arguments."""
    told = subprocess.run(["nm", *arguments], capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in told.splitlines() if line.strip() and not line.endswith(":")}


def compiled(folder):
    """Compile into a folder. Returns the environment in which Python has the stub: LD_PRELOAD and Triton's path."""
    include = folder / "crt"
    include.mkdir(parents=True, exist_ok=True)
    (include / "host_defines.h").write_text("".join(f"#define {word}\n" for word in WORDS))
    own = folder / "stub.o"
    compiler = ["cc", "-w", "-fPIC", "-O1"]
    subprocess.run([*compiler, "-c", f"-I{folder}", f"-I{headers()}", HERE / "stub.c", "-o", own], check=True)
    have = symbols("--defined-only", "-g", own)
    wanted = symbols("-D", "--undefined-only", *(libraries() / name for name in WANTING))
    others = {name for name in wanted if name.startswith(KINDS)} - have - REAL
    linked = symbols("-D", "--undefined-only", libraries() / "libcaffe2_nvrtc.so") | TRITON
    others |= {name for name in linked if re.match("cu[A-Z]", name)} - have
    rest = folder / "rest.c"
    rest.write_text("".join(f"int {name}() {{return 0;}}\n" for name in sorted(others)))
    stub = folder / "libstub.so"
    subprocess.run([*compiler, "-shared", own, rest, "-o", stub, "-lpthread", "-ldl"], check=True)
    # The driver is looked for by the name of its library, which leads to the same functions.
    driver = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-o", driver, "-Wl,-soname,libcuda.so.1", "-Wl,--no-as-needed", stub,
                    f"-Wl,-rpath,{folder}"], check=True)
    return {"LD_PRELOAD": f"{stub}:{driver}", "TRITON_LIBCUDA_PATH": str(folder)}
