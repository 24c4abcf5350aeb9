"""Executes the text of a CUDA kernel on NumPy arrays, without a GPU and without CUDA: g++ compiles it behind kernels/cuda_on_cpu.h.

    text = '''extern "C" __global__ void twice(const real* x, real* y, int n)
    {
        int t = blockIdx.x * blockDim.x + threadIdx.x;
        if (t < n) y[t] = 2 * x[t];
    }'''
    kernels = emulate.module("twice.cu", text, {"real": "float"})
    kernels.launch("twice", grid=(2, 1, 1), block=(256, 1, 1), values=[x, y, np.int32(300)])

tinydet.use("emulated") does this for every kernel of tinydet. What CUDA would not define ends the launch with a KernelError that names
thread and line: a barrier that a thread misses, an index outside an array, a misaligned float4, a write outside an argument. To debug:

- `printf` in a kernel prints; `assert` raises. Arrays keep their old content after an error.
- `with emulate.options("random", seed=1):` starts threads and blocks in another order. A result that depends on it misses a barrier.
- TINYDET_EMULATED_MODE=debug compiles for a debugger; all runs in one thread of the operating system:
  `gdb -ex "set breakpoint pending on" -ex "break twice.cu:4 if threadIdx.x == 5" -ex run --args python script.py`
- modes "address" (every access outside an array, with its line), "thread" (races inside a block) and "thread blocks" (races between blocks)
  need a process that begins with g++'s sanitizer: `sanitizer_command` says how to start it. Their reports are KernelErrors too.
"""
import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tinydet.cuda import KERNELS

HEADER = KERNELS / "cuda_on_cpu.h"

FLAGS = ("-std=c++17 -shared -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -ffp-contract=off -fno-strict-aliasing -w -Wl,--as-needed "
         "-fsanitize=bounds,alignment,null,shift-exponent,integer-divide-by-zero").split()
MODES = {"plain": ["-O1", "-g1"], "debug": ["-O0", "-g"],
         "address": ["-O1", "-g", "-DEMULATE_ADDRESS", "-fsanitize=address", "-fsanitize-recover=address", "-fno-omit-frame-pointer"],
         "thread": ["-O1", "-g", "-DEMULATE_THREAD", "-fsanitize=thread"],
         "thread blocks": ["-O1", "-g", "-DEMULATE_THREAD", "-DEMULATE_BLOCKS", "-fsanitize=thread"]}
SANITIZERS = {"address": "asan", "thread": "tsan", "thread blocks": "tsan"}
ORDERS = ("forward", "reverse", "random")
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\s*\([^()]*\)\s*)?(\w+)\s*\(([^)]*)\)")

_order = (0, 0)                                 # number of the order, seed
_process = (ctypes.c_size_t * 6)()              # struct Process of the header: stacks and memory that all libraries share


class KernelError(RuntimeError):
    """A kernel that does not compile, or a launch that CUDA would refuse or leave undefined."""


def missing():
    """None where kernels can be emulated, else a sentence that says what is missing."""
    if not sys.platform.startswith("linux"):
        return "the emulator of CUDA kernels needs Linux"
    return None if shutil.which("g++") else "the emulator of CUDA kernels needs g++ on the PATH"


@contextlib.contextmanager
def options(order="forward", seed=0):
    """Within the block threads, releases from barriers and blocks go in this order: "forward", "reverse" or "random" (by seed)."""
    global _order
    if order not in ORDERS:
        raise ValueError(f"emulate.options: order must be one of {', '.join(ORDERS)}, got {order!r}")
    before, _order = _order, (ORDERS.index(order), int(seed) % 2**32)
    try:
        yield
    finally:
        _order = before


# Compiling

def module(name, text, macros={}, mode=None, prelude=""):
    """The kernels in `text`, which the file `name` holds, as a Module, compiled once for each set of macros ({"real": "float", "BM": 64}).

    mode: one of MODES; without it the environment variable TINYDET_EMULATED_MODE, else "plain". prelude: text before the file's own.
    Libraries are kept in $TINYDET_CACHE, $XDG_CACHE_HOME/tinydet or ~/.cache/tinydet (can be deleted any time).
    Raises KernelError with g++'s message, RuntimeError where g++ or the mode's sanitizer is missing, ValueError for another mode.
    """
    return _module(name, text, tuple(macros.items()), mode or os.environ.get("TINYDET_EMULATED_MODE") or "plain", prelude, HEADER)


@functools.lru_cache(maxsize=None)
def _module(name, text, macros, mode, prelude, header):
    if lacks := missing():
        raise RuntimeError(f"emulate.module: {lacks}")
    if mode not in MODES:
        raise ValueError(f"emulate.module: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode in SANITIZERS and not hasattr(ctypes.CDLL(None), f"__{SANITIZERS[mode]}_init"):
        raise RuntimeError(f"emulate.module: mode {mode!r} needs Python started as emulate.sanitizer_command({mode!r}) says")
    found = KERNEL.findall(re.sub(r"//[^\n]*|/\*[\s\S]*?\*/", "", text))
    kernels = {kernel: [re.findall(r"\w+", each)[-1] for each in parameters.split(",") if each.strip()] for kernel, parameters in found}
    source = [f'#define KERNEL_FILE "{name}"\n#line 1 "cuda_on_cpu.h"\n', header.read_text(encoding="utf-8"),
              *(f"\n#define {key} {value}" for key, value in macros), '\n#line 1 "prelude.h"\n', prelude,
              f'\nnamespace {{\n#line 1 "{name}"\n', text, '\n}\n#line 1 "exports"\n', *(f"EXPORT({kernel})\n" for kernel in kernels)]
    return Module(name, kernels, _library(name, "".join(source), [*FLAGS, *MODES[mode]]), mode)


def _library(name, source, flags):
    digest = hashlib.sha256("\0".join([source, *flags, _compiler()]).encode()).hexdigest()
    library = _folder() / f"{Path(name).stem}-{digest[:32]}.so"
    if not library.exists():
        handle, part = tempfile.mkstemp(".part", library.name, library.parent)      # its own: another process may be at it too
        os.close(handle)
        try:
            words = ["g++", *flags, "-x", "c++", "-", "-lm", "-o", part]
            done = subprocess.run(words, input=source, capture_output=True, text=True, env=_plain())
            if done.returncode:
                raise KernelError(f"emulate.module: {name} must compile, g++ says:\n{done.stderr}")
            os.replace(part, library)
        finally:
            Path(part).unlink(missing_ok=True)
    return library


def _plain():
    return {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}       # for g++ itself


@functools.lru_cache(maxsize=None)
def _compiler():
    return subprocess.run(["g++", "-dumpfullversion", "-dumpmachine"], capture_output=True, text=True, env=_plain()).stdout


@functools.lru_cache(maxsize=None)
def _folder():
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("TINYDET_CACHE") or Path(base) / "tinydet")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:                                                                 # a home that cannot be written to
        _folder.kept = tempfile.TemporaryDirectory(prefix="tinydet-")               # until Python ends
        folder = Path(_folder.kept.name)
    return folder


# Launching

class Module:
    """The compiled kernels of a file. `kernels`: by name, the parameters (name, whether a pointer, whether const, NumPy dtype)."""

    def __init__(self, name, kernels, library, mode):
        self.name, self.library, self.kernels, self._run, self._wrong = name, library, {}, {}, {}
        code = ctypes.PyDLL(str(library))                               # PyDLL: one launch at a time, as the library has one state
        self._report = code.report
        self._report.restype = ctypes.c_char_p
        self._log = mode in SANITIZERS and os.environ.get("TINYDET_SANITIZER_LOG")
        for kernel, names in kernels.items():
            launch, signature = code["launch_" + kernel], code["signature_" + kernel]
            launch.argtypes, launch.restype, signature.restype = [ctypes.c_char_p], ctypes.c_bool, ctypes.c_char_p
            words = [words.split() for words in signature().decode().split(",")[:-1]]
            self.kernels[kernel] = [(n, "pointer" in w, "const" in w, np.dtype(w[-1])) for n, w in zip(names, words)]
            layout = "".join("QQ" if pointer else f"{dtype.char}{16 - dtype.itemsize}x" for _, pointer, _, dtype in self.kernels[kernel])
            self._run[kernel] = launch, struct.Struct("=9qQ" + layout).pack

    def launch(self, kernel, grid, block, values, shared=0):
        """Run a kernel and wait for it. grid, block: three integers each; shared: bytes of dynamic shared memory.

        values: for each parameter in order an array (C-contiguous; None is a null pointer) or a NumPy scalar of just its type. Arrays are
        changed in place, when all went well. Raises KernelError, and TypeError or ValueError for values that do not fit.
        """
        if kernel not in self.kernels:
            raise ValueError(f"emulate.launch: kernel must be one of {', '.join(self.kernels)} in {self.name}, got {kernel!r}")
        parameters, (run, pack) = self.kernels[kernel], self._run[kernel]
        if len(values) != len(parameters):
            told = ", ".join(p[0] for p in parameters)
            raise TypeError(f"emulate.launch: {self.name}: {kernel} takes {len(parameters)} values ({told}), got {len(values)}")
        flat = [*grid, *block, shared, *_order, ctypes.addressof(_process)]
        for value, (name, pointer, const, dtype) in zip(values, parameters):
            if pointer and value is None:
                flat += 0, 0
            elif not isinstance(value, np.ndarray if pointer else np.generic) or value.dtype != dtype:
                wanted = f"{'an array' if pointer else 'a number'} of {dtype}"
                raise TypeError(f"emulate.launch: {self.name}: {kernel}: {name} must be {wanted}, "
                                f"got {type(value).__name__} {getattr(value, 'dtype', '')}")
            elif not pointer:
                flat.append(value)
            else:
                flags = value.flags
                if not flags.c_contiguous or not (const or flags.writeable):
                    wanted = "C-contiguous" if const else "C-contiguous and writable"
                    raise ValueError(f"emulate.launch: {self.name}: {kernel}: {name} must be {wanted}")
                flat += value.ctypes.data, value.nbytes
        try:
            packed = pack(*flat)
        except struct.error:
            raise TypeError(f"emulate.launch: grid and block must be three integers, shared one, got {grid}, {block}, {shared}") from None
        report = None if run(packed) else self._report().decode()
        if self._log:
            report = self._read_log(kernel) or report
        if report:
            report = re.sub(r"argument (\d+)", lambda found: parameters[int(found[1])][0], report)
            report = re.sub(r" at code (\w+)", lambda found: self._line(found[1]), report)
            raise KernelError(f"emulate.launch: {self.name}: {kernel}: {report}")

    def _line(self, code):
        try:
            told = subprocess.run(["addr2line", "-e", self.library, code], capture_output=True, text=True, env=_plain()).stdout
        except OSError:
            return ""
        return f", in {Path(told.split()[0]).name}" if self.name in told else ""

    def _read_log(self, kernel):
        """What the sanitizer wrote about this file, or None. It tells each fault once, so a kernel once found wrong stays wrong."""
        log = Path(f"{self._log}.{os.getpid()}")
        told = log.read_text(errors="replace") if log.exists() else ""
        if told:
            log.write_text("")
        if self.name in told:
            told = re.sub(r"\n *#\d+ .*(cuda_on_cpu\.h|libffi|\[stack\]).*", "", told)           # calls outside the kernel
            first = next(report for report in re.split("={10,}\n", told) if self.name in report)
            kept = [part for part in first.split("\n\n") if not re.search("created by|Shadow byte|^SUMMARY", part)]
            self._wrong[kernel] = "\n".join(kept)
        return self._wrong.get(kernel)


def sanitizer_command(mode):
    """How to start Python so that kernels run in a sanitizer's mode: (environment to add, words before the command), or a sentence that
    says why they cannot.

        environment, prefix = emulate.sanitizer_command("thread")
        subprocess.run([*prefix, sys.executable, "-m", "pytest", ...], env={**os.environ, **environment})
    """
    if lacks := missing():
        return lacks
    name = SANITIZERS[mode]
    library = subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        return f"mode {mode!r} needs lib{name}, which this g++ lacks"
    folder = tempfile.mkdtemp(prefix="tinydet-")
    atexit.register(shutil.rmtree, folder, True)
    log = os.path.join(folder, "sanitizer")
    environment = {"LD_PRELOAD": library, "TINYDET_EMULATED_MODE": mode, "TINYDET_SANITIZER_LOG": log,
                   "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1",           # their threads would look like races
                   f"{name.upper()}_OPTIONS": f"log_path={log}:halt_on_error=0" + ":detect_leaks=0" * (name == "asan")}
    for prefix in ["setarch", "-R"], []:                                            # ThreadSanitizer does not bear random addresses
        with contextlib.suppress(OSError):
            started = subprocess.run([*prefix, sys.executable, "-c", ""], env={**os.environ, **environment}, capture_output=True)
            if started.returncode == 0:
                return environment, prefix
    return f"mode {mode!r} does not run on this machine: Python does not start with lib{name}"
