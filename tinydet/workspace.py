"""Scratch memory that ops share: one arena for each Python thread, kept between calls so that no op pays for fresh pages."""
import contextlib
import itertools
import threading

import numpy as np

KEEP = 256 << 20            # bytes that stay between calls; what a call needs beyond that is given back when it ends
ALIGN = 64                  # bytes: a cache line, and the widest vector
_local = threading.local()


@contextlib.contextmanager
def borrow(dtype, *sizes):
    """Lend one array (size,) of dtype for each size, uninitialised, until the block ends; blocks may be nested.

    Whoever borrows must not return or cache the arrays: the next op writes over them.
    """
    dtype = np.dtype(dtype)
    room = [-(-size * dtype.itemsize // ALIGN) * ALIGN for size in sizes]
    used = getattr(_local, "used", 0)
    if used + sum(room) > len(getattr(_local, "memory", ())):
        memory = np.empty(sum(room) + ALIGN, np.uint8)
        start = -memory.ctypes.data % ALIGN
        if used == 0 and sum(room) <= KEEP:
            _local.memory = memory[start:]              # nobody holds the old one: the larger one takes its place
        else:
            memory, used = memory[start:], None         # on top of a lent arena, or too large to keep
    memory = _local.memory if used is not None else memory
    if used is not None:
        _local.used = used + sum(room)
    try:
        starts = itertools.accumulate(room, initial=used or 0)
        yield [memory[start:start + size * dtype.itemsize].view(dtype) for start, size in zip(starts, sizes)]
    finally:
        if used is not None:
            _local.used = used
