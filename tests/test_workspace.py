import threading

import numpy as np
import pytest

from tinydet import workspace


def test_lends_aligned_arrays_that_do_not_overlap_and_lends_them_again():
    with workspace.borrow(np.float32, 5, 0, 17) as first:
        assert [(a.shape, a.dtype) for a in first] == [((5,), np.float32), ((0,), np.float32), ((17,), np.float32)]
        assert all(a.ctypes.data % workspace.ALIGN == 0 for a in first)
        first[0][:], first[2][:] = 1, 2
        assert (first[0] == 1).all()
        with workspace.borrow(np.float64, 3) as (inner,):
            inner[:] = 9
        assert (first[0] == 1).all() and (first[2] == 2).all()
    with workspace.borrow(np.float32, 5) as (again,):
        assert np.shares_memory(again, first[0])


def test_keeps_no_more_than_its_limit(monkeypatch):
    monkeypatch.setattr(workspace, "KEEP", 1 << 16)
    monkeypatch.setattr(workspace, "_local", threading.local())
    with workspace.borrow(np.uint8, 1 << 17) as (large,):
        large[:] = 1
    assert len(getattr(workspace._local, "memory", ())) == 0
    with workspace.borrow(np.uint8, 100), workspace.borrow(np.uint8, 1 << 15) as (second,):      # on top of a lent arena that is full
        second[:] = 1
    assert len(workspace._local.memory) <= 1 << 16


def test_an_error_gives_the_memory_back():
    with pytest.raises(KeyError), workspace.borrow(np.uint8, 10):
        raise KeyError
    with workspace.borrow(np.uint8, 10) as (a,), workspace.borrow(np.uint8, 10) as (b,):
        assert not np.shares_memory(a, b)


def test_every_thread_has_its_own():
    seen = []

    def work():
        with workspace.borrow(np.uint8, 10) as (a,):
            seen.append(a)
            barrier.wait()

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not np.shares_memory(*seen)
