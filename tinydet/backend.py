"""Which version of an op runs, and on which arrays: the only file that knows."""
import contextlib
import sys

import numpy as np

BACKENDS = ("numpy", "numba")       # the CUDA and the emulated backend come with the kernels (see README, papers table)
_current = "numba"


def use(name):
    """Context manager: run the ops inside on backend `name`, "numpy" (the reference) or "numba" (the fast CPU path).

    Yields `put`, which moves an array to the backend: `with use("numpy") as put: y, cache = relu.forward(put(x))`.
    Blocks may be nested; the earlier backend returns when a block ends. Outside any block "numba" runs.
    Raises ValueError for an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend.use: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    return _use(name)


@contextlib.contextmanager
def _use(name):
    global _current
    before, _current = _current, name
    try:
        yield np.asarray
    finally:
        _current = before


def pick(x, numpy, numba=None, cuda=None):
    """Return the version of an op that must run on x: `cuda` for a CuPy array, else the one `use` chose.

    numba may be None where array code is already the fast form: then `numpy` runs on both CPU backends.
    Raises TypeError for a CuPy array where the op has no CUDA version.
    """
    if array_module(x) is not np:
        if cuda is None:
            raise TypeError(f"{numpy.__module__}: this op has no CUDA version yet, got a {type(x).__name__} on the GPU")
        return cuda
    return numba if _current == "numba" and numba is not None else numpy


def array_module(x):
    """Return the module whose array x is: cupy for a CuPy array (CuPy is never imported here), numpy for all else."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(x, cupy.ndarray) else np


def to_numpy(x):
    """Return x as a NumPy array, copied from the GPU if it lies there."""
    return x.get() if array_module(x) is not np else np.asarray(x)
