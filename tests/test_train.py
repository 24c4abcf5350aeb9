import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tinydet import train, use
from tinydet.layers import BatchNorm, Conv2D, Dropout, ReLU, Sequential
from tinydet.optim import SGD, AdaGrad, cosine_schedule
from tinydet.files import read_arrays, write, write_arrays
from tinydet.train import Run, fit


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


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
    with pytest.raises(ValueError, match=r"^files\.read_json: .*config\.json must be JSON"):
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


# What training takes

def test_seconds_leave_out_what_runs_aside(tmp_path, monkeypatch):
    """What is raised there has taken its time, too; what ran aside before or after is another matter."""
    clock = [100.0]
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    net, optimizer, schedule, step = parts(6)
    run = Run(tmp_path, {})
    assert run.seconds is None and run.apart == 0

    @run.aside
    def measure(i, fails=False):
        """It measures."""
        clock[0] += 1000
        if fails:
            raise KeyError(i)
        return i, fails

    def timed(i):
        clock[0] += 1.5
        if i in (0, 3):
            assert measure(i) == (i, False)
        if i == 4:
            with pytest.raises(KeyError):
                measure(i, fails=True)
        return step(i)
    assert measure.__name__ == "measure" and measure.__doc__ == "It measures." and measure(7) == (7, False)
    with use("numpy"):
        fit(run, net, optimizer, schedule, 6, timed)
    assert run.seconds == 9 and run.apart == 4000
    measure(8)
    assert run.seconds == 9 and run.apart == 5000
    other = Run(tmp_path, {}, resume=True)
    with use("numpy"):
        fit(other, net, optimizer, schedule, 8, timed)
    assert other.seconds == 3 and other.apart == 0                      # of the two steps that were left


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
    assert read_arrays(tmp_path / "checkpoint.npz")[1] == {"steps": 5, "optimizer": "SGD plain"}
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
    assert read_arrays(tmp_path / "checkpoint.npz")[1] == {"steps": 5, "optimizer": "SGD plain"}
    assert_same(train_in(tmp_path, resume=True), uninterrupted)


@pytest.mark.parametrize("other", [lambda net: SGD(net, form="caffe"), AdaGrad])
def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path, other):
    """The state has the same names and shapes, and another meaning."""
    run, (net, optimizer, _, _) = Run(tmp_path, {}), parts(12)
    run.checkpoint(3, net, optimizer)
    with pytest.raises(ValueError, match=r"^train\.Run: .*checkpoint\.npz must hold the state of (SGD caffe|AdaGrad), got that of SGD plain"):
        run.restore(net, other(net))


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


@pytest.mark.parametrize("damage", ["lost", "torn", "binary", "gap"])
def test_a_log_that_does_not_fit_the_checkpoint_is_refused(tmp_path, damage):
    train_in(tmp_path)
    log = tmp_path / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    if damage == "lost":
        log.unlink()
    else:
        lines[3:5] = {"torn": [lines[3][:9] + b"\n", lines[4]], "binary": [b"\xff\xfe\n", lines[4]], "gap": [lines[4]]}[damage]
        log.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=rf"^train\.Run: line {1 if damage == 'lost' else 4} of .*metrics\.jsonl must be the record of step"):
        train_in(tmp_path, resume=True)


def test_a_net_that_is_not_finite_is_neither_kept_nor_loaded(tmp_path):
    train_in(tmp_path)
    arrays, meta = read_arrays(tmp_path / "checkpoint.npz")
    name = next(k for k in arrays if k.startswith("net/"))
    arrays[name].flat[0] = np.nan
    write_arrays(tmp_path / "checkpoint.npz", arrays, meta)
    with pytest.raises(ValueError, match=r"^layers\.load: .*checkpoint\.npz: .* must be finite"):
        train_in(tmp_path, resume=True)


def test_a_run_whose_net_overflows_keeps_its_last_checkpoint(tmp_path):
    layer = ReLU()
    layer.state = {"w": np.ones(2)}
    optimizer = SGD(layer)

    def step(i):
        layer.state["w"][0] = np.inf if i == 3 else i
        return {"loss": 1.0}
    with pytest.raises(FloatingPointError, match=r"^train\.fit: the net must stay finite, got NaN or infinity in w at step 3"):
        fit(Run(tmp_path, {}), layer, optimizer, lambda i: 0.1, 6, step, every=2)
    arrays, meta = read_arrays(tmp_path / "checkpoint.npz")
    assert meta == {"steps": 2, "optimizer": "SGD plain"} and arrays["net/w"][0] == 1


def test_the_first_compilation_is_announced_once():
    program = """if True:
        from numba import njit
        from tinydet import train
        train.announce_compilation()
        list(train.progress(range(2), disable=True))                # asks for it too
        print(njit(lambda x: x + 1)(1), njit(lambda x: x + 2)(1))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.stdout == "2 3\n" and done.stderr.count("compiling loops for this CPU") == 1 and done.stderr.count("\n") == 1
