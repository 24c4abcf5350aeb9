import _thread
import dataclasses
import gc
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from PIL import Image

from tinydet import augment, images, loader, scenes
from tinydet.loader import Loader, prefetch
from tinydet.models import overfeat, overfeat_detect

ROOT = Path(__file__).resolve().parent.parent


def background():
    return [t for t in threading.enumerate() if t.name.startswith("tinydet-prefetch")]


def ended(seconds=10):
    """Whether all background threads end: at once where something waited for them, soon after garbage collection."""
    end = time.monotonic() + seconds
    while background() and time.monotonic() < end:
        time.sleep(0.005)
    return not background()


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert ended() and set(threading.enumerate()) <= before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def examples(folder):
    """Twelve scenes whose images lie in files."""
    found = []
    for e in scenes.scenes(12, 3):
        Image.fromarray(e.source).save(folder / f"{e.name}.png")
        found.append(dataclasses.replace(e, source=folder / f"{e.name}.png"))
    return found


def equal(a, b):
    """Whether nested lists and tuples of arrays and values are the same, bit for bit."""
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


# prefetch

@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("first, last, ahead", [(0, 9, None), (3, 9, 1), (0, 1, 7), (5, 5, 2), (6, 5, None), (0, 12, 20)])
def test_prefetch_gives_every_step_in_order(workers, first, last, ahead):
    def make(i):
        time.sleep(0.001 * (i * 7 % 3))                             # some later ones are ready first
        return i * i

    assert list(prefetch(make, first, last, workers, ahead)) == [i * i for i in range(first, last)]
    assert not background()


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_without_end(workers):
    with prefetch(str, first=4, workers=workers) as steps:
        assert [next(steps) for _ in range(50)] == [str(i) for i in range(4, 54)]
    with pytest.raises(StopIteration):
        next(steps)


def test_workers_work_side_by_side():
    both = threading.Barrier(3)
    with prefetch(lambda i: both.wait(timeout=20) if i < 3 else i, 0, 6, workers=3) as steps:
        assert sorted(next(steps) for _ in range(3)) == [0, 1, 2]


def test_without_workers_all_happens_in_the_calling_thread():
    made = []
    steps = prefetch(lambda i: made.append((i, threading.current_thread())), 0, 3)
    assert made == []
    next(steps)
    assert made == [(0, threading.current_thread())]


@pytest.mark.parametrize("workers, ahead, most", [(1, None, 2), (2, None, 4), (3, 1, 1), (2, 5, 5)])
def test_no_more_than_ahead_are_made(workers, ahead, most):
    made = []
    with prefetch(made.append, 0, 30, workers, ahead) as steps:
        for taken in range(1, 10):
            next(steps)
            time.sleep(0.01)
            assert len(made) <= taken + most
        end = time.monotonic() + 10
        while len(made) < taken + most and time.monotonic() < end:
            time.sleep(0.005)
        assert len(made) == taken + most                            # and they are made without being asked for


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_exception_comes_at_its_step(workers):
    def make(i):
        if i >= 4:
            raise KeyError(i)                                       # also in the steps behind it, which are being made
        return i

    steps = prefetch(make, 0, 20, workers)
    assert [next(steps) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="4"):
        next(steps)
    assert not background()
    assert list(steps) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_end_when_the_caller_stops(workers):
    with prefetch(str, 0, 99, workers) as steps:
        next(steps)
    assert not background()
    steps = prefetch(str, 0, 99, workers)
    next(steps)
    steps.close()
    assert not background()
    steps.close()
    assert list(steps) == []
    for i, _ in enumerate(prefetch(str, 0, 99, workers)):           # nobody holds it after the loop
        if i == 3:
            break
    gc.collect()
    assert ended()
    with pytest.raises(ZeroDivisionError):
        with prefetch(str, 0, 99, workers) as steps:
            1 / 0
    assert not background()
    steps = prefetch(str, 0, 99, workers)                           # never used
    del steps
    assert ended()
    cycle = [prefetch(str, 0, 99, workers)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert ended()
    steps = prefetch(str, 0, 3, workers)
    assert [next(steps) for _ in range(3)] == ["0", "1", "2"] and not background()         # with the last result, not one later


@pytest.mark.parametrize("how", ["close", "forget"])
def test_closing_waits_for_what_is_being_made_and_drops_what_waits(how):
    started, go, made = threading.Event(), threading.Event(), []

    def make(i):
        started.set()
        go.wait(20)
        made.append(i)

    steps = prefetch(make, 0, 99, workers=1, ahead=10)
    started.wait(20)
    threading.Timer(0.1, go.set).start()
    if how == "close":
        steps.close()
        assert made == [0] and not background()
    del steps                                                       # garbage collection does not wait
    assert ended() and made == [0]


def test_keyboard_interrupt_while_waiting():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell starts what runs in the background with Ctrl-C ignored
    waiting, seen = threading.Event(), []

    def make(i):
        if i == 2:
            waiting.wait(20)
            time.sleep(0.1)
            _thread.interrupt_main()
            time.sleep(0.3)
        return i

    steps = prefetch(make, 0, 50, workers=2)
    try:
        with pytest.raises(KeyboardInterrupt):
            for i in steps:
                seen.append(i)
                if i == 1:
                    waiting.set()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [0, 1] and not background() and list(steps) == []


PROGRAM = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from tinydet.loader import prefetch
steps = prefetch(lambda i: time.sleep(0.01), 0, None, {workers})
for i, _ in enumerate(steps):
    if i == 5:
        print("ready", flush=True)
        {then}
"""


@pytest.mark.parametrize("then, code", [("break", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1), ("pass", -signal.SIGINT)])
def test_a_program_ends_with_its_iterator_open(then, code):
    program = subprocess.Popen([sys.executable, "-c", PROGRAM.format(workers=3, then=then)], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert program.stdout.readline() == "ready\n"
    if then == "pass":
        program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == code
    last = errors.strip().splitlines()[-1:]
    assert last == {"1 / 0": ["ZeroDivisionError: division by zero"], "pass": ["KeyboardInterrupt"]}.get(then, [])


def test_several_iterators():
    a, b, c = prefetch(str, 0, 6, 2), prefetch(lambda i: -i, 3, 9, 1), prefetch(str, 5, 11, 0)
    assert list(zip(a, b, c)) == [(str(i), -3 - i, str(5 + i)) for i in range(6)]


def test_a_fork_is_told(monkeypatch):
    with prefetch(str, 0, 9, workers=1) as steps, prefetch(str, 0, 9) as plain:
        process = steps._process
        monkeypatch.setattr(loader.os, "getpid", lambda: -1)
        with pytest.raises(RuntimeError, match=rf"^loader.prefetch: an iterator must stay in .* made it \({process}\), got -1$"):
            next(steps)
        assert next(plain) == "0"
        monkeypatch.undo()
        assert next(steps) == "0"
        monkeypatch.setattr(loader.os, "getpid", lambda: -1)
        steps.close()                                               # in the fork: the parent's threads are not touched
        assert background()
        monkeypatch.undo()


def test_prefetch_errors():
    for name, value, error, text in (("first", -1, ValueError, "at least 0, got -1"), ("last", 1.5, TypeError, "an integer, got 1.5"),
                                     ("workers", -2, ValueError, "at least 0, got -2"), ("ahead", 0, ValueError, "at least 1, got 0")):
        with pytest.raises(error, match=f"^loader.prefetch: {name} must be {text}$"):
            prefetch(str, **{name: value})


# Loader

def drawn(example, rng):
    """A sample that shows what it was made from: name, mean of the image, two draws."""
    return example.name, float(example.image().mean()), rng.random(2)


@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 99))
def test_every_example_once_an_epoch(count, batch, seed):
    plan = Loader(range(count), batch, None, seed)
    steps = 3 * count                                               # 3 * batch whole epochs
    row = np.concatenate([plan.indices(i) for i in range(steps)])
    assert all(len(plan.indices(i)) == batch for i in range(3))
    for epoch in row.reshape(3 * batch, count):
        assert_array_equal(np.sort(epoch), np.arange(count))
    assert_array_equal(row[:count], np.random.default_rng([seed, 0, 0, 1]).permutation(count))


def test_epochs_and_seeds_shuffle_differently():
    orders = [tuple(Loader(range(30), 30, None, seed).indices(step)) for seed in range(4) for step in range(4)]
    assert len(set(orders)) == 16 and tuple(range(30)) not in orders
    first = Counter(int(Loader(range(5), 1, None, seed).indices(0)[0]) for seed in range(500))
    assert min(first.values()) > 64 and len(first) == 5             # 100 expected, sigma 9


def chain(example, rng):
    return augment.ssd(example.image(), *example.usable(), rng, 24, 128)


@pytest.mark.parametrize("workers, ahead", [(1, None), (2, None), (3, None), (3, 1), (2, 9)])
def test_the_same_batches_for_any_number_of_workers(examples, workers, ahead):
    plain = Loader(examples, 5, chain, seed=7)
    wanted = [plain.make(i) for i in range(6)]
    assert equal(wanted, list(Loader(examples, 5, chain, 7, workers, ahead).steps(0, 6)))
    assert equal(wanted, list(plain.steps(0, 6)))
    with iter(Loader(examples, 5, chain, 7, workers, ahead)) as batches:
        assert equal(wanted, [next(batches) for _ in range(6)])


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_the_same_batches_after_a_resume_at_any_step(examples, workers):
    plan = Loader(examples, 5, drawn, seed=1, workers=workers)
    wanted = list(plan.steps(0, 6))
    for first in range(7):
        assert equal(wanted[first:], list(plan.steps(first, 6)))


def test_a_sample_draws_from_its_seed_step_and_position(examples):
    batch = Loader(examples, 3, drawn, seed=4).make(2)
    for position, (index, sample) in enumerate(zip(Loader(examples, 3, drawn, seed=4).indices(2), batch)):
        assert equal(sample, drawn(examples[index], np.random.default_rng([4, 2, position, 2])))
    plan = [Loader(examples, 6, drawn, seed).make(step) for seed in range(5) for step in range(5)]
    values = {sample[2].tobytes() for b in plan for sample in b}
    values |= {np.random.default_rng([seed, step]).random(2).tobytes() for seed in range(5) for step in range(5)}
    values |= {np.random.default_rng([seed, epoch, 0, 1]).random(2).tobytes() for seed in range(5) for epoch in range(5)}
    assert len(values) == 5 * 5 * (6 + 2)                           # no two streams are one


def test_collate_makes_the_batch_in_the_background(examples):
    def collate(samples):
        return np.stack([s[0] for s in samples]), threading.current_thread().name

    images, thread = next(Loader(examples, 4, chain, workers=1, collate=collate).steps(0, 1))
    assert images.shape == (4, 24, 24, 3) and thread.startswith("tinydet-prefetch")
    assert_array_equal(images, np.stack([s[0] for s in Loader(examples, 4, chain).make(0)]))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_failing_example_is_named_at_its_step(examples, folder, workers):
    def prepare(example, rng):
        if example.name == "wrong":
            raise wrong
        return example.name

    wrong = IndexError("off by one")
    plan = Loader([dataclasses.replace(examples[0], name="wrong"), *examples[1:]], 4, prepare, 0, workers)
    step = next(i for i in range(3) if 0 in plan.indices(i))
    for wrong, kind in ((IndexError("off by one"), RuntimeError), (ValueError("no"), ValueError), (OSError(5, "disk"), ValueError)):
        batches = plan.steps()
        for _ in range(step):
            next(batches)
        with pytest.raises(kind) as caught:
            next(batches)
        assert str(caught.value) == (f"loader.Loader: example wrong of step {step} must be readable and prepared, got "
                                     f"{type(wrong).__name__}: {wrong}")
        assert caught.value.__cause__ is wrong
        assert list(batches) == [] and not background()
    lost = dataclasses.replace(examples[0], name="lost", source=folder / "lost.png")
    with pytest.raises(ValueError, match=r"^loader.Loader: example lost of step 0 must .*FileNotFoundError: .* there is no file"):
        next(Loader([lost], 1, lambda example, rng: example.image(), workers=workers).steps())


def test_images_are_read_by_many_threads_with_a_small_cache(examples, monkeypatch):
    wanted = [Loader(examples, 6, drawn, 2).make(i) for i in range(30)]
    monkeypatch.setattr(images, "CACHE_BYTES", 200_000)             # two or three images
    monkeypatch.setattr(images, "cached", cache := images.Cache())
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        assert equal(wanted, list(Loader(examples, 6, drawn, 2, workers=4).steps(0, 30)))
    finally:
        sys.setswitchinterval(before)
    assert cache.size == sum(image.nbytes for image in cache.values()) <= 200_000


def test_examples_may_be_anything():
    upper = Loader("abcd", 2, lambda letter, rng: letter.upper(), workers=2)
    assert list(upper.steps(0, 2)) == list(Loader("ABCD", 2, lambda letter, rng: letter).steps(0, 2))


def test_overfeat_keeps_its_contract_with_prefetch():
    """Step i of examples/overfeat.py draws all from default_rng([seed, i]), and goes on drawing from it in the net."""
    examples = scenes.scenes(5, 0)
    spec = overfeat.Spec(scenes.CLASSES, "small", k=3, pool=2, scales=(1.0, 0.5))

    def make(i):
        rng = np.random.default_rng([3, i])
        batch = rng.choice(len(examples), 2, replace=False)
        return [overfeat_detect.training_view(spec, examples[j], rng, 3 * spec.layers.window) for j in batch], rng

    with prefetch(make, 2, 7, workers=2) as steps:
        for i, (views, rng) in enumerate(steps, 2):
            wanted, there = make(i)
            assert equal(views, wanted) and rng.random() == there.random()
    assert i == 6


def test_loader_errors():
    for arguments, error, text in (((range(3), 0, str), ValueError, "batch must be at least 1, got 0"),
                                   ((range(3), 2.0, str), TypeError, r"batch must be an integer, got 2\.0"),
                                   ((range(3), 1, str, -1), ValueError, "seed must be at least 0, got -1"),
                                   ((range(3), 1, str, 0, -1), ValueError, "workers must be at least 0, got -1"),
                                   ((range(3), 1, str, 0, 1, 0), ValueError, "ahead must be at least 1, got 0"),
                                   (([], 1, str), ValueError, "examples must hold at least one, got none")):
        with pytest.raises(error, match=f"^loader.Loader: {text}$"):
            Loader(*arguments)
