"""Shared by all tests: the Hypothesis profile, the backends, and inputs that stay off the kinks."""
import contextlib
import ctypes
import json
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import tinydet  # noqa: F401  first: it sets how waiting threads behave, which numpy and numba read once

import numba
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from tinydet import backend, workspace

if os.environ.get("TINYDET_FAKE_GPU") == "1":       # pytest -m gpu runs without one, on the stand-in of fake_cupy.py
    import fake_cupy
    stand_in = fake_cupy.installed()                # kept, or it would end at once
    stand_in.__enter__()

BACKENDS = [pytest.param(name, marks=[pytest.mark.gpu] * (name == "cuda") + [pytest.mark.skipif(lacks is not None, reason=str(lacks))])
            for name in backend.BACKENDS for lacks in [backend.missing(name)]]      # every name that tinydet.use takes
RUNNING = tuple(name for name in backend.available() if name != "cuda")            # what runs here without a GPU

settings.register_profile("tinydet", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("tinydet")

numba.set_num_threads(1)                # on inputs this small a second thread only waits, for 10 ms a call on a busy machine


# Tests that launch every kernel, without drawn examples: what AddressSanitizer, ThreadSanitizer and, on a GPU, compute-sanitizer look at
KERNELS = {"test_every_op": "may_run_twice", "test_conv": "ragged", "test_conv_im2col": "", "test_max_pool": "border|places|far|order", "test_offset_pool": "border|places|rows",
           "test_batch_norm": "border|block|257", "test_lrn": "border|block|257|halo|wide", "test_global_max_pool": "border|block|257", "test_sort": "257|65|order",
           "test_scan": "257|2049", "test_nms": "limit|last_bit|words|order", "test_softmax_loss": "border|block|257", "test_logistic_loss": "border|block|257",
           "test_focal_loss": "border|block|257", "test_box_loss": "border|block|257", "test_optim": "257|border", "test_roi_pool": "many_regions|far_outside|empty",
           "test_ap_loss": "borders.*(257|1025)|more_positives", "test_map_loss": "fixtures_A|fixture_M|empty"}


# Under -n 2 each worker begins with one half of the tests. Numba compiles most in those of the first group: they come first, and the second
# half begins with those of the other group, which compile next to nothing, so that the two do not compile the same loops at the same time
COMPILE = ("test_fast_rcnn_map", "test_every_op", "test_examples", "test_bench_map_loss", "test_overfeat_detect", "test_fast_rcnn", "test_retinanet",
           "test_transfer", "test_end_to_end_map", "test_overfeat_localize_program", "test_overfeat_classify", "test_layers", "test_composition")
COMPILE_NOTHING = ("test_device", "test_readers", "test_coco", "test_data", "test_damaged_files", "test_emulate", "test_nvrtc", "test_claims", "test_sort",
                   "test_scan", "test_files", "test_safetensors", "test_evaluate", "test_evaluate_coco", "test_evaluate_files", "test_draw", "test_packaging",
                   "test_mutation", "test_loader", "test_timing", "test_gpu_check", "test_bench_gpu", "test_checkpoints", "test_report", "test_summary")


def pytest_collection_modifyitems(items):
    groups = {True: [], False: [], None: []}
    for item in items:
        groups[True if item.path.stem in COMPILE else False if item.path.stem in COMPILE_NOTHING else None].append(item)
    rest = max(0, len(items) // 2 - len(groups[True]))
    items[:] = groups[True] + groups[None][:rest] + groups[False] + groups[None][rest:]
    for item in items:
        pattern = KERNELS.get(item.path.stem)
        if pattern is not None and re.search(pattern, item.name) and re.search(r"emulated|cuda", item.name):
            item.add_marker(pytest.mark.kernels)


@pytest.fixture
def all_threads():
    """Run the Numba loops on every core, in tests that could see a race."""
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    yield
    numba.set_num_threads(1)


@pytest.fixture
def probes(monkeypatch):
    """probes(program): its processes that timing.probe_of starts say, without running, that the n-th took 10 n MB; returns the list of their arguments."""
    def answered(program, step=10.0):
        asked = []

        def child(command, **options):
            asked.append(json.loads(command[-1]))
            assert command[1:-1] == [str(program), "--probe"] and options["text"] and options["capture_output"]
            return SimpleNamespace(returncode=0, stdout=f"a line before\n{json.dumps({'traced': step * len(asked), 'resident': step / 2})}\n")
        monkeypatch.setattr(subprocess, "run", child)
        return asked
    return answered


def real(name):
    """The folder of a data set below the one that TINYDET_DATA names. Skips the test where there is none."""
    folder = Path(os.environ.get("TINYDET_DATA", "")) / name
    if not os.environ.get("TINYDET_DATA") or not folder.is_dir():
        pytest.skip(f"TINYDET_DATA names no folder with {name}")
    return folder


def arrays_in(path):
    """The arrays of a file of weights, or a checkpoint, by name."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def same_bits(a, b, texts):
    """Assert that two run folders hold the same texts, weights and checkpoint, bit for bit."""
    for name in texts:
        assert (a / name).read_text() == (b / name).read_text(), name
    for file in ("weights.npz", "checkpoint.npz"):
        first, second = arrays_in(a / file), arrays_in(b / file)
        assert first.keys() == second.keys()
        for name in first:
            assert_array_equal(first[name], second[name], strict=True, err_msg=f"{file} {name}")


@pytest.fixture(params=["end", "begin"])
def guarded(request, monkeypatch):
    """Every scratch array is filled with NaN and ends (or begins) at a page that kills the process if it is touched.

    Returns a function that copies an array to such a place.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux's mmap and mprotect")
    libc, page, lent = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes, libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], [ctypes.c_void_p, ctypes.c_size_t]

    def lend(size, dtype):
        room = size * np.dtype(dtype).itemsize
        pages = -(-room // page) + 2
        start = libc.mmap(None, pages * page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        lent.append((start, pages * page))
        for border in (start, start + (pages - 1) * page):
            assert libc.mprotect(border, page, 0) == 0
        at = start + (pages - 1) * page - room if request.param == "end" else start + page
        array = np.frombuffer((ctypes.c_char * room).from_address(at), dtype) if room else np.empty(0, dtype)
        array[:] = np.nan
        return array

    @contextlib.contextmanager
    def borrow(dtype, *sizes):
        yield [lend(size, dtype) for size in sizes]

    def put(a):
        copy = lend(a.size, a.dtype).reshape(a.shape)
        copy[...] = a
        return copy

    monkeypatch.setattr(workspace, "borrow", borrow)
    yield put
    for start, room in lent:
        libc.munmap(start, room)


seeds = st.integers(0, 2**32 - 1)


def distinct(shape, seed):
    """Values at least 0.25 apart and at least 0.125 from 0, of both signs, in random order: no kink within a small step."""
    size = int(np.prod(shape))
    return (np.random.default_rng(seed).permutation(size).reshape(shape) - size // 2 + 0.5) / 4


@st.composite
def distinct_NHWC(draw, min_side=1, max_side=5, max_N=2, max_C=2):
    """distinct() as (N, H, W, C), H and W drawn apart."""
    side = st.integers(min_side, max_side)
    return distinct((draw(st.integers(1, max_N)), draw(side), draw(side), draw(st.integers(1, max_C))), draw(seeds))


@st.composite
def random_boxes(draw, max_R=12, extent=12):
    """(R, 4) float64 boxes on a half-pixel grid, so that touching, equal, nested and empty ones occur."""
    R, rng = draw(st.integers(0, max_R)), np.random.default_rng(draw(seeds))
    corner = rng.integers(-extent, extent, (R, 2))
    return np.concatenate([corner, corner + rng.integers(0, extent, (R, 2))], 1) / 2


@pytest.fixture(autouse=True)
def gpu_errors_show_where_they_happen(request):
    """A GPU reports an error at some later call: wait for it at the end of each test that used it."""
    yield
    if request.node.get_closest_marker("gpu") and backend.missing("cuda") is None:
        import cupy
        cupy.cuda.runtime.deviceSynchronize()


if os.environ.get("TINYDET_GPU_POOL") == "0" and backend.missing("cuda") is None:     # compute-sanitizer must see each array's end
    import cupy
    cupy.cuda.set_allocator(None)
