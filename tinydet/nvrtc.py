"""Compiles every CUDA kernel with NVRTC, without a GPU or a driver, and says what each needs of one.

    pip install nvidia-cuda-nvrtc-cu12          # or nvidia-cuda-nvrtc, of CUDA 13; the test extra has the first
    python -m tinydet.nvrtc                     # a table: registers, spilled bytes, shared memory of every kernel, variant and GPU generation

tests/test_nvrtc.py holds the kernels to budgets.
"""
import argparse
import ctypes
import functools
import re
import sys
from pathlib import Path

from tinydet import cuda

ARCHS = ("sm_75", "sm_80", "sm_90")
OPTIONS = ("--std=c++17", "-ftz=true", "-default-device", "--ptxas-options=-v")     # as CuPy compiles, and a report


def missing():
    """A sentence saying what is missing to compile kernels, or None."""
    return None if _path() else "NVRTC is not installed (pip install nvidia-cuda-nvrtc-cu12)"


@functools.cache
def _path():
    """The NVRTC library that pip installed, the newest."""
    found = [p for folder in sys.path for p in Path(folder or ".").glob("nvidia/*/lib/libnvrtc.so.*") if "builtins" not in p.name]
    return max(found, default=None)


@functools.cache
def _library():
    if lacks := missing():
        raise RuntimeError(f"nvrtc: {lacks}")
    library = ctypes.CDLL(str(_path()))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def version():
    """(major, minor) of NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _call(function, *args):
    if code := getattr(_library(), function)(*args):
        raise RuntimeError(f"nvrtc: {function} failed: {_library().nvrtcGetErrorString(code).decode()}")


def compile(file, macros, arch, text=None):
    """Compile kernels/<file> with a set of macros for one GPU generation. Returns (ok, log), log: what compiler and assembler say."""
    text = cuda.source(file) if text is None else text
    whole = cuda.source("prelude.h") + f'#line 1 "{file}"\n' + text
    options = [o.encode() for o in (f"--gpu-architecture={arch}", *OPTIONS, *cuda.options(text, macros.items()))]
    program = ctypes.c_void_p()
    _call("nvrtcCreateProgram", ctypes.byref(program), whole.encode(), file.encode(), 0, None, None)
    try:
        failed = _library().nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        size = ctypes.c_size_t()
        _call("nvrtcGetProgramLogSize", program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        _call("nvrtcGetProgramLog", program, log)
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))
    return not failed, log.value.decode()


def resources(log):
    """{kernel: (registers a thread, spilled bytes, bytes of static shared memory)} from the log of a compilation."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found[part.split("'")[0]] = (int(re.search(r"Used (\d+) registers", part)[1]), int(spills[1]) + int(spills[2]),
                                     int(shared[1]) if shared else 0)
    return found


def complaints(log):
    """The lines of a log that are warnings or errors."""
    return [line for line in log.splitlines() if re.search(r"\b(warning|error)\b", line)]


def main(argv=()):
    """Print the table, return the exit status: 1 if a compilation fails or warns. Raises RuntimeError where NVRTC is not installed."""
    argparse.ArgumentParser(prog="python -m tinydet.nvrtc", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    wrong, line = 0, "{:<18} {:<28} {:<34} {:<6} {:>9} {:>7} {:>7}"
    print(line.format("file", "kernel", "variant", "for", "registers", "spilled", "shared"))
    for file in cuda.files():
        for macros in cuda.variants(cuda.source(file)):
            for arch in ARCHS:
                ok, log = compile(file, macros, arch)
                for kernel, needs in resources(log).items():
                    print(line.format(file, kernel, ", ".join(f"{k}={v}" for k, v in macros.items()), arch, *needs))
                if not ok or complaints(log):
                    wrong += 1
                    print(log)
    print(f"NVRTC {'.'.join(map(str, version()))}: {wrong or 'no'} warnings or errors")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except RuntimeError as error:
        sys.exit(f"error: {error}")
