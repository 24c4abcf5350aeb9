import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tinydet import train, use
from tinydet.layers import BatchNorm, Conv2D, Dropout, ReLU, Sequential
from tinydet.optim import SGD, cosine_schedule
from tinydet.train import Run, fit, read_arrays, read_json, write, write_arrays


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


# Files

@pytest.mark.parametrize("content, expected", [("text ü\n", "text ü\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")])
def test_write(tmp_path, content, expected):
    for _ in range(2):                                              # a new file, and over an old one
        write(tmp_path / "a.json", content)
        assert files(tmp_path) == {"a.json": expected}


def test_write_arrays_and_read_arrays(tmp_path):
    arrays = {"net/0.w": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 4)), "scalar": np.array(7),
              "flag": np.ones(2, bool)}
    meta = {"steps": 3, "name": "ü", "list": [1.5, None]}
    write_arrays(tmp_path / "a.npz", arrays, meta)
    found, told = read_arrays(tmp_path / "a.npz")
    assert told == meta and list(found) == list(arrays)
    for name, a in arrays.items():
        assert_array_equal(found[name], a, strict=True)
    assert list(files(tmp_path)) == ["a.npz"]


@pytest.mark.parametrize("what", ["os.replace", "os.fsync", "numpy.savez"])
@pytest.mark.parametrize("old", [True, False])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, what, old):
    if old:
        write(tmp_path / "a.txt", "old")
        write_arrays(tmp_path / "a.npz", {"w": np.ones(3)}, 1)
    before = files(tmp_path)

    def fail(f=None, *args, **options):
        if hasattr(f, "write"):
            f.write(b"half of it")
        raise OSError("no space left on device")
    monkeypatch.setattr(what, fail)
    with pytest.raises(OSError, match="no space left"):
        write_arrays(tmp_path / "a.npz", {"w": np.zeros(3)}, 2)
    if what != "numpy.savez":
        with pytest.raises(OSError, match="no space left"):
            write(tmp_path / "a.txt", "new")
    assert {k: v for k, v in files(tmp_path).items() if not k.startswith(".")} == before
    monkeypatch.undo()
    write_arrays(tmp_path / "a.npz", {"w": np.zeros(3)}, 2)         # what the failure left behind is in nobody's way
    assert read_arrays(tmp_path / "a.npz")[1] == 2


@pytest.mark.parametrize("flush", [write, write_arrays])
def test_what_is_moved_into_place_was_forced_to_disk(tmp_path, monkeypatch, flush):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    flush(tmp_path / "a", *(["text"] if flush is write else [{"w": np.ones(3)}, 1]))
    assert calls == ["fsync", "replace"]


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_read_arrays_errors_name_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npz"

    def refused(content, told=""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^train\.read_arrays: .*a\.npz must be a weights or checkpoint file .*, got: " + told):
            read_arrays(path)

    def saved(save, *args, **options):
        save(f := io.BytesIO(), *args, **options)
        return f.getvalue()
    with pytest.raises(FileNotFoundError, match=r"^train\.read_arrays: there is no file .*a\.npz$"):
        read_arrays(path)
    refused(b"")
    refused(b"no archive at all")
    refused(saved(np.save, np.ones(3)))                             # .npy
    refused(saved(np.savez, w=np.ones(3)), "'meta")                 # an archive of somebody else
    refused(saved(np.savez, w=np.ones(3), meta=np.array("{")))
    refused(saved(np.savez, w=np.ones(3), meta=np.ones(2)))
    objects = np.array([Harmful()], object)
    refused(saved(np.savez, w=objects, meta=np.array("1")), "Object arrays cannot be loaded when allow_pickle=False")
    refused(saved(np.savez, w=np.ones(1), meta=objects), "Object arrays cannot be loaded when allow_pickle=False")
    refused(objects.dumps())
    assert not Path("unpickled").exists()
    with zipfile.ZipFile(path, "w") as archive:                     # members that are no arrays
        archive.writestr("meta.npy", b"junk")
    refused(path.read_bytes())
    with pytest.raises(ValueError, match=r"^train\.read_arrays: "):
        read_arrays(tmp_path)


def test_a_damaged_checkpoint_is_refused_or_whole(tmp_path):
    """Cut anywhere: refused. One byte changed anywhere: refused, or read as it was (some bytes of an archive mean nothing)."""
    path, arrays = tmp_path / "a.npz", {"w": np.arange(6.0).reshape(2, 3)}
    write_arrays(path, arrays, {"steps": 3})
    whole, refused = path.read_bytes(), 0
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"^train\.read_arrays: "):
            read_arrays(path)
    for n, flip in zip(range(len(whole)), np.tile([1, 8, 12, 14, 32, 255], len(whole))):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ flip]) + whole[n + 1:])
        try:
            found, meta = read_arrays(path)
        except ValueError as error:
            assert str(error).startswith("train.read_arrays: ")
            refused += 1
        else:
            assert meta == {"steps": 3} and list(found) == ["w"]
            assert_array_equal(found["w"], arrays["w"], strict=True)
    assert refused > len(whole) / 2


def test_read_json(tmp_path):
    path = tmp_path / "a.json"
    write(path, '{"a": [1, null]}')
    assert read_json(path) == {"a": [1, None]}
    for content in ("", "{", b"\xff\xfe"):
        write(path, content)
        with pytest.raises(ValueError, match=r"^train\.read_json: .*a\.json must be JSON, got: "):
            read_json(path)


# The run folder

def test_a_run_is_new_or_resumed_with_the_same_settings(tmp_path):
    folder, config = tmp_path / "runs" / "a", {"lr": 0.1, "sides": (1, 2), "data": None}
    with pytest.raises(FileNotFoundError, match=r"^train\.Run: there is no run to resume in .*a$"):
        Run(folder, config, resume=True)
    assert not folder.exists()
    Run(folder, config)
    assert json.loads((folder / "config.json").read_text()) == {"lr": 0.1, "sides": [1, 2], "data": None}
    before = files(folder)
    with pytest.raises(FileExistsError, match=r"^train\.Run: .*a holds a run already; resume it, or choose another name"):
        Run(folder, {"lr": 0.2})
    Run(folder, config, resume=True)                                # the tuple is JSON's list
    with pytest.raises(ValueError, match=r"^train\.Run: a resumed run must keep its settings \(.*config\.json\), got: "
                                         r"lr was 0\.1, is 0\.2; new was None, is 'x'; sides was \[1, 2\], is None$"):
        Run(folder, {"lr": 0.2, "new": "x", "data": None}, resume=True)
    assert files(folder) == before
    write(folder / "config.json", '{"lr": ')
    with pytest.raises(ValueError, match=r"^train\.read_json: .*config\.json must be JSON"):
        Run(folder, config, resume=True)


def test_the_log_is_cut_at_the_checkpoint(tmp_path):
    run = Run(tmp_path, {})
    with run.open_log(0) as log:
        for step in (1, 2, 3, 4):
            print(json.dumps({"step": step}), file=log)
        print('{"step": 5, "lo', end="", file=log)                  # killed here
    for steps in (4, 2):
        with run.open_log(steps) as log:
            assert [r["step"] for r in run.metrics()] == list(range(1, steps + 1))
            print(json.dumps({"step": "next"}), file=log, flush=True)
        assert [r["step"] for r in run.metrics()] == [*range(1, steps + 1), "next"]
    run.open_log(0).close()
    assert run.metrics() == []


# Training that is interrupted

SETTINGS = {"seed": 0, "steps": 12}


def parts(steps, dtype=np.float32):
    """Net, optimiser, schedule and the step function of a small training run: all that is random comes from the step."""
    rng = np.random.default_rng(0)
    net = Sequential(Conv2D(3, 4, 3, pad=1, rng=rng, dtype=dtype), BatchNorm(4, dtype=dtype), ReLU(), Dropout(0.3),
                     Conv2D(4, 2, 3, rng=rng, dtype=dtype))

    def step(i):
        rng = np.random.default_rng([0, i])
        x = rng.standard_normal((4, 8, 8, 3)).astype(dtype)
        y, cache = net.forward(x, train=True, rng=rng)
        difference = y - x[:, 1:-1, 1:-1, :2]
        net.backward(2 * difference / difference.size, cache)
        return {"loss": float((difference**2).mean()), "largest": float(abs(y).max())}
    return net, SGD(net, 0.9, 1e-3), cosine_schedule(0.1, steps, 2), step


def train_in(folder, steps=12, every=5, resume=False, stop=None, how="before"):
    """Train. In step `stop` raise, "before" anything is done or "after" the backward pass, or "hang". Returns net, optimiser, log."""
    with use("numpy"):
        net, optimizer, schedule, step = parts(steps)

        def interrupted(i):
            if i == stop and how == "before":
                raise KeyboardInterrupt
            values = step(i)
            if i == stop and how == "after":
                raise KeyboardInterrupt
            while i == stop:
                time.sleep(1)
            return values
        run = Run(folder, SETTINGS, resume)
        fit(run, net, optimizer, schedule, steps, interrupted, every)
        return net, optimizer, (Path(folder) / "metrics.jsonl").read_bytes()


def assert_same(a, b):
    """Bit for bit: weights, running averages, momentum, log."""
    for x, y in ((a[0].arrays(), b[0].arrays()), (a[1].state, b[1].state)):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].tobytes() == y[name].tobytes(), name
    assert a[2] == b[2]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train_in(tmp_path_factory.mktemp("whole"))


def test_fit_trains_logs_and_keeps_checkpoints(uninterrupted, tmp_path, monkeypatch):
    net, optimizer, log = uninterrupted
    records = [json.loads(line) for line in log.splitlines()]
    assert [r["step"] for r in records] == list(range(1, 13))
    assert [r["lr"] for r in records] == [cosine_schedule(0.1, 12, 2)(i) for i in range(12)]
    assert all(set(r) == {"step", "lr", "loss", "largest"} for r in records)
    with use("numpy"):                                              # the same by hand
        by_hand, sgd, schedule, step = parts(12)
        for i in range(12):
            assert step(i)["loss"] == records[i]["loss"]
            sgd.step(schedule(i))
    assert_same(uninterrupted, (by_hand, sgd, log))
    kept = []
    monkeypatch.setattr(Run, "checkpoint", lambda self, steps, net, optimizer: kept.append(steps))
    for steps, every in ((12, 5), (10, 5), (3, 100)):
        train_in(tmp_path / f"{steps}", steps, every)
    assert kept == [5, 10, 12, 5, 10, 3]


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("stop", range(12))
def test_an_interrupted_run_resumes_bit_for_bit(uninterrupted, tmp_path, stop, how):
    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path, stop=stop, how=how)
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == stop
    assert (tmp_path / "checkpoint.npz").exists() == (stop >= 5)
    assert_same(train_in(tmp_path, resume=True), uninterrupted)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.npz"}


def test_a_run_interrupted_at_every_step_resumes_bit_for_bit(uninterrupted, tmp_path):
    for stop in range(12):
        with pytest.raises(KeyboardInterrupt):
            train_in(tmp_path, every=1, resume=stop > 0, stop=stop)
    assert_same(train_in(tmp_path, resume=True), uninterrupted)
    assert_same(train_in(tmp_path, resume=True), uninterrupted)     # of a finished run nothing is done again


@pytest.mark.parametrize("what", ["os.replace", "numpy.savez"])
def test_a_run_interrupted_while_it_writes_its_checkpoint(uninterrupted, tmp_path, monkeypatch, what):
    real, count = {"os.replace": os.replace, "numpy.savez": np.savez}[what], []

    def fail(first, *args, **options):
        if hasattr(first, "write") or str(args[0]).endswith("checkpoint.npz"):
            count.append(1)
            if len(count) == 2:                                     # the one of step 10
                raise KeyboardInterrupt
        return real(first, *args, **options)
    monkeypatch.setattr(what, fail)
    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path)
    monkeypatch.undo()
    assert read_arrays(tmp_path / "checkpoint.npz")[1] == {"steps": 5}
    assert_same(train_in(tmp_path, resume=True), uninterrupted)


def test_a_torn_log_line_is_done_again(uninterrupted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path, stop=8)
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 9, "lr"')
    assert_same(train_in(tmp_path, resume=True), uninterrupted)


def test_a_killed_process_resumes_bit_for_bit(tmp_path):
    """SIGKILL at a random moment, twice. The process hangs in step 150, so that it cannot get away."""
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_train; "
            "test_train.train_in(sys.argv[1], 200, 7, sys.argv[2] == 'resume', 150, 'hang')")
    folder, rng = tmp_path / "killed", np.random.default_rng()

    def done():
        return len((folder / "metrics.jsonl").read_bytes().splitlines()) if (folder / "metrics.jsonl").exists() else 0
    for how in ("new", "resume"):
        reach, deadline = done() + int(rng.integers(1, 60)), time.monotonic() + 60
        process = subprocess.Popen([sys.executable, "-c", code, str(folder), how], cwd=Path(train.__file__).parents[1],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            while done() < reach and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.004))
        finally:
            process.kill()
            told = process.communicate()[1].decode()
        assert process.returncode == -signal.SIGKILL, told
    assert 0 < done() < 200
    assert_same(train_in(folder, 200, 7, resume=True), train_in(tmp_path / "whole", 200, 100))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(uninterrupted, tmp_path, bad):
    with use("numpy"):
        net, optimizer, schedule, step = parts(12)
        with pytest.raises(FloatingPointError, match=rf"^train\.fit: the loss must be finite, got {bad} at step 7: lower the"):
            fit(Run(tmp_path, SETTINGS), net, optimizer, schedule, 12, lambda i: step(i) | ({"loss": bad} if i == 7 else {}), 5)
    assert read_arrays(tmp_path / "checkpoint.npz")[1] == {"steps": 5}
    assert_same(train_in(tmp_path, resume=True), uninterrupted)


def test_a_checkpoint_of_another_net_is_refused(tmp_path):
    run, (net, optimizer, _, _) = Run(tmp_path, {}), parts(12)
    assert run.restore(net, optimizer) == 0
    run.checkpoint(3, net, optimizer)
    assert run.restore(net, optimizer) == 3
    other = Sequential(Conv2D(3, 5, 3, rng=np.random.default_rng(0)))
    with pytest.raises(ValueError, match=r"^layers\.load: .*checkpoint\.npz: 0\.w must have shape \(3, 3, 3, 5\), got \(3, 3, 3, 4\)"):
        run.restore(other, SGD(other))


def test_progress(monkeypatch, capsys):
    assert list(train.progress(range(3), desc="counting")) == [0, 1, 2]
    assert "counting: 100%" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"^train\.progress: the progress bar needs tqdm: pip install 'tinydet\[examples\]'"):
        train.progress(range(3))
