"""Finds, compiles and launches the CUDA kernels of kernels/*.cu: on CuPy arrays with a GPU, on NumPy arrays with emulate.py."""
import functools
import math
import re
from pathlib import Path

import numpy as np

from tinydet.backend import array_module

_here = Path(__file__).resolve().parent
KERNELS = _here / "kernels" if (_here / "kernels").is_dir() else _here.parent / "kernels"       # installed, else in the repository

DTYPES = {"float": np.float32, "double": np.float64, "int": np.int32, "unsigned": np.uint32, "long long": np.int64,
          "unsigned long long": np.uint64, "bool": np.bool_, "u8": np.uint8, "u16": np.uint16, "size_t": np.uint64}
CTYPES = {np.dtype(v): k for k, v in reversed(DTYPES.items())}         # where a macro is a type
LIMITS = {t: (int(np.iinfo(t).min), int(np.iinfo(t).max)) for t in DTYPES.values() if np.dtype(t).kind in "iu"}
VECTORS = {"float4": ("float", 4), "float2": ("float", 2), "double2": ("double", 2), "int4": ("int", 4), "uint4": ("unsigned", 4)}
PLENTY = 48 << 10       # bytes of dynamic shared memory that a kernel has without asking


def source(name):
    """Text of the kernel file `name`, such as "max_pool.cu". Raises ValueError naming those that exist."""
    return _source(KERNELS, name)


@functools.lru_cache(maxsize=None)
def _source(folder, name):
    there = sorted(p.name for p in folder.glob("*") if p.suffix in (".cu", ".h"))
    if name not in there:
        raise ValueError(f"cuda.source: name must be one of {', '.join(there) or 'no file at all'} in {folder}, got {name!r}")
    return (folder / name).read_text(encoding="utf-8")


def files():
    """Names of all kernel files."""
    return sorted(p.name for p in KERNELS.glob("*.cu"))


# What a kernel file says of itself

@functools.lru_cache(maxsize=None)
def signatures(text):
    """The kernels in the text of a file: {name: ((type, is a pointer, is const, parameter), ...)}."""
    found = {}
    for name, parameters in re.findall(r'extern "C" __global__\s+void\s+(?:__launch_bounds__\([^()]*\)\s+)?(\w+)\(([^)]*)\)', text):
        found[name] = tuple(_parameter(p) for p in parameters.split(","))
    return found


def _parameter(text):
    words = text.replace("__restrict__", " ").replace("*", " * ").split()
    ctype = " ".join(w for w in words[:-1] if w not in ("const", "*"))
    return ctype, "*" in words, "const" in words, words[-1]


@functools.lru_cache(maxsize=None)
def variants(text):
    """The sets of macros that a file is compiled with, from its line "// variants: real=float; real=double", as dicts of text."""
    line = re.search(r"^// variants: (.*)$", text, re.M)
    return [dict(pair.split("=") for pair in part.split(", ")) for part in line[1].split("; ")] if line else [{}]


@functools.lru_cache(maxsize=None)
def flags(text):
    """Compiler options that a file asks for, from its line "// flags: --fmad=false"."""
    line = re.search(r"^// flags: (.*)$", text, re.M)
    return tuple(line[1].split()) if line else ()


# Arrays and launches

def empty(like, shape, dtype=None):
    """An array for a kernel to fill, of like's kind and (without dtype) dtype. On the CPU it holds NaN or -1: what stays unwritten shows."""
    a = array_module(like).empty(shape, like.dtype if dtype is None else dtype)
    if isinstance(a, np.ndarray):
        a.reshape(-1).view(np.uint8)[...] = 0xFF
    return a


def launch(file, kernel, args, *, threads=None, grid=None, block=256, shared=0, **macros):
    """Run `kernel` of kernels/<file> on `args`, one for each of its parameters, in order.

    Geometry: threads=n for ceil(n / block) blocks, or grid=, a number or up to three; block likewise; shared: bytes of dynamic shared memory.
    Nothing runs where one of them is 0. Where the arrays lie says what runs: CuPy on their GPU (asynchronously), or emulate.py.
    A parameter type that is a macro of the file, such as real, takes the dtype of its array; other macros (BM=64) are given by name. The
    whole set must be one of the file's "// variants", which the compile checks and the tests go through.
    Arrays are checked before the launch: kind, exact dtype, C order, device, fewer than 2^31 elements, writable unless const, alignment
    for float4; a number is converted to the parameter's type and must fit it.
    Raises TypeError or ValueError naming file, kernel and parameter; emulate.KernelError for what the emulator sees while it runs.
    """
    text = source(file)
    op = f"cuda.launch: {file}: {kernel}"
    signature = signatures(text).get(kernel)
    if signature is None:
        raise ValueError(f"cuda.launch: kernel must be one of {', '.join(signatures(text))} in {file}, got {kernel!r}")
    if len(args) != len(signature):
        raise TypeError(f"{op} takes {len(signature)} arguments ({', '.join(p[3] for p in signature)}), got {len(args)}")
    macros = {name: str(value) for name, value in macros.items()}
    _infer(op, text, signature, args, macros)
    arrays = [a for a, p in zip(args, signature) if p[1]]
    if not arrays:
        raise TypeError(f"{op} must have an array among its parameters, which says where it runs")
    xp = array_module(arrays[0])
    values = [_pointer(op, xp, macros, p, a) if p[1] else _number(op, macros, p, a) for p, a in zip(signature, args)]
    block, grid = _three(block), _three(grid if threads is None else -(-threads // math.prod(_three(block))))
    if 0 in grid + block:
        return
    if xp is np:
        from tinydet import emulate
        emulate.module(file, text, macros, prelude=source("prelude.h")).launch(kernel, grid, block, values, shared)
    else:
        run = _compiled(file, text, tuple(sorted(macros.items())), kernel)
        if shared > PLENTY:
            run.max_dynamic_shared_size_bytes = shared
        run(grid, block, tuple(values), shared_mem=shared)


def options(text, macros):
    """Compiler options for a file's text and a set of macros."""
    return *(f"-D{name}={value}" for name, value in macros), *flags(text)


@functools.lru_cache(maxsize=None)
def _compiled(file, text, macros, kernel):
    import cupy
    return cupy.RawModule(code=source("prelude.h") + f'#line 1 "{file}"\n' + text, options=options(text, macros)).get_function(kernel)


def _infer(op, text, signature, args, macros):
    """Add the macros that are types, from the arrays' dtypes, and check that the file names the set."""
    named = {name for v in variants(text) for name in v}
    for (ctype, pointer, _, name), a in zip(signature, args):
        if pointer and ctype in named:
            found = CTYPES.get(getattr(a, "dtype", None))
            if macros.setdefault(ctype, found) != found:
                raise TypeError(f"{op}: {name} must be {DTYPES[macros[ctype]].__name__}, as {ctype} is elsewhere, got "
                                f"{getattr(a, 'dtype', type(a).__name__)}")
    if macros not in variants(text):
        told = "; ".join(", ".join(f"{k}={v}" for k, v in each.items()) for each in variants(text))
        raise TypeError(f"{op}: dtypes and macros must be one of the file's variants ({told}), got {macros}")


def _pointer(op, xp, macros, parameter, a):
    ctype, _, const, name = parameter
    ctype, group = VECTORS.get(ctype, (macros.get(ctype, ctype), 1))
    if not isinstance(a, xp.ndarray):
        raise TypeError(f"{op}: {name} must be a {xp.__name__} array, as the first array is, got {type(a).__name__}")
    if a.dtype != DTYPES[ctype]:
        raise TypeError(f"{op}: {name} must be {np.dtype(DTYPES[ctype])}, got {a.dtype}")
    if not a.flags.c_contiguous:
        raise ValueError(f"{op}: {name} must be C-contiguous, got strides {a.strides} for shape {a.shape}")
    if a.size >= 2**31:
        raise ValueError(f"{op}: {name} must have fewer than 2^31 elements, got {a.size}")
    if group > 1 and (a.size % group or (a.ctypes.data if xp is np else a.data.ptr) % (group * a.itemsize)):
        raise ValueError(f"{op}: {name} must hold whole {parameter[0]} at an aligned address, got {a.size} elements of {a.dtype}")
    if xp is np and not const and not a.flags.writeable:
        raise ValueError(f"{op}: {name} is written and must be writable, got a read-only array")
    if xp is not np and a.device.id != xp.cuda.runtime.getDevice():
        raise ValueError(f"{op}: {name} must lie on the current device {xp.cuda.runtime.getDevice()}, got device {a.device.id}")
    return a


def _number(op, macros, parameter, value):
    ctype, _, _, name = parameter
    dtype = DTYPES[macros.get(ctype, ctype)]
    if not isinstance(value, (int, float, np.number, np.bool_)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    low, high = LIMITS.get(dtype, (value, value))
    if dtype in LIMITS and not (low <= value <= high and int(value) == value):
        raise ValueError(f"{op}: {name} must be an integer that {dtype.__name__} holds, got {value}")
    return dtype(value)


def _three(n):
    n = tuple(int(k) for k in n) if isinstance(n, (tuple, list)) else (int(n),)
    return n + (1,) * (3 - len(n))
