"""Which version of an op runs, and on which arrays: the only file that knows."""
import contextlib
import functools
import sys

import numpy as np

BACKENDS = ("numpy", "numba", "emulated", "cuda")
_current = "numba"


def use(name):
    """Context manager: run the ops inside on backend `name`.

        numpy       the reference
        numba       the fast CPU path, which runs outside any block, too
        emulated    the CUDA kernels, compiled for the CPU and executed on NumPy arrays (emulate.py; needs g++)
        cuda        the CUDA kernels on a GPU, on CuPy arrays. NumPy arrays, such as annotations, go the way of numba

    Yields `put`, which moves an array to the backend: `with use("numpy") as put: y, cache = relu.forward(put(x))`.
    Blocks may be nested; the earlier backend returns when a block ends.
    Raises ValueError for an unknown name, RuntimeError saying what is missing for one that this machine cannot run.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend.use: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    if lacks := missing(name):
        raise RuntimeError(f"backend.use: {name} cannot run here: {lacks}")
    return _use(name)


@contextlib.contextmanager
def _use(name):
    global _current
    before, _current = _current, name
    try:
        yield put
    finally:
        _current = before


@functools.cache
def missing(name):
    """What this machine lacks to run backend `name`, a sentence; None if it can."""
    if name == "emulated":
        from tinydet import emulate
        return emulate.missing()
    if name == "cuda":
        try:
            import cupy
        except ImportError:
            return "CuPy is not installed (pip install 'tinydet[gpu]', or 'tinydet[gpu-cuda13]' for CUDA 13)"
        return None if cupy.cuda.is_available() else "CuPy finds no GPU that it can use"
    return None


def available():
    """The backends that this machine can run."""
    return tuple(name for name in BACKENDS if missing(name) is None)


def put(x):
    """x as an array of the backend in use: on the GPU with "cuda", else a NumPy array (x itself if it is one)."""
    if _current == "cuda":
        import cupy
        return cupy.asarray(x)
    return np.asarray(x)


def pick(x, numpy, numba=None, cuda=None):
    """Return the version of an op that must run on x: `cuda` for a CuPy array, else the one that `use` chose.

    numba may be None where array code is already the fast form: then `numpy` runs on both CPU backends. cuda may be array code,
    too, or None for an op of the host alone, which reads annotations or detections.
    Raises TypeError for a CuPy array where the op has no CUDA version.
    """
    if array_module(x) is not np:
        if cuda is None:
            raise TypeError(f"{numpy.__module__}: this op works on the host, got a {type(x).__name__} on the GPU: copy it with to_numpy")
        return cuda
    if _current == "emulated" and cuda is not None:
        return cuda
    return numpy if _current == "numpy" or numba is None else numba


def array_module(x):
    """Return the module whose array x is: cupy for a CuPy array (CuPy is never imported here), numpy for all else."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(x, cupy.ndarray) else np


def to_numpy(x):
    """Return x as a NumPy array, copied from the GPU if it lies there."""
    return x.get() if array_module(x) is not np else np.asarray(x)


def scalar(x):
    """A result without axes as a Python float. One on the GPU stays there: to read it would wait for all that was launched before."""
    return x if array_module(x) is not np else float(x)
