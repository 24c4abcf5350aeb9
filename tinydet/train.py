"""The training loop, and the run folder that survives being killed: settings, metrics log, checkpoint."""
import functools
import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numba.core import event

from tinydet import loader
from tinydet.backend import array_module, to_numpy
from tinydet.files import read_arrays, read_json, write, write_arrays
from tinydet.layers import load


def progress(items, **options):
    """A tqdm progress bar over items (time left on standard error). Raises ImportError saying what to install."""
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("train.progress: the progress bar needs tqdm: pip install 'tinydet[examples]'") from None
    announce_compilation()
    return tqdm(items, dynamic_ncols=True, **options)


class _Announcement(event.Listener):
    said = False

    def on_start(self, event):
        if not self.said:
            print("compiling loops for this CPU: up to a minute, in the first run only (Numba keeps them on disk)", file=sys.stderr, flush=True)
        self.said = True

    def on_end(self, event):
        pass


@functools.cache
def announce_compilation():
    """From now on say on standard error, once, that Numba compiles, when it first does: the program would look hung. progress does it."""
    event.register("numba:compile", _Announcement())


def fit(run, net, optimizer, schedule, steps, step, every=100, prepare=None, workers=1):
    """Train: call step(i) for i = the run's last checkpoint .. steps - 1, each time update, log, and every so often checkpoint.

    With prepare it calls step(i, prepare(i)), and `workers` background threads make the next ones meanwhile (loader.prefetch:
    the number of workers changes no bit; 0 makes each when its turn comes).
    step runs forward, loss and backward, which leaves gradients in the net, and returns a dict of numbers with "loss" first. On a GPU
    this is where each step waits for it, and all that it copies: those numbers, and the optimiser's word that all was finite.
    All that it draws at random must come from i (np.random.default_rng([seed, i])): then a run that was killed and resumed
    passes through the same states, bit for bit on the same machine with the same number of threads.
    schedule(i): learning rate of step i. Every `every` steps, and at the end, the run keeps a checkpoint.
    run.seconds is then how long this took, without what ran in run.aside and without what was done before a resumption.
    Raises FloatingPointError if the loss or the net is not finite; the last checkpoint stays.
    """
    first, start, before = run.restore(net, optimizer), time.perf_counter(), run.apart
    bar = progress(range(first, steps), initial=first, total=steps, desc=f"train {run.folder.name}", unit="step")
    prepared = loader.prefetch(lambda i: (prepare(i),) if prepare else (), first, steps, workers if prepare else 0)
    with run.open_log(first) as log, prepared:
        for i in bar:
            values = numbers(step(i, *next(prepared)))
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(f"train.fit: the loss must be finite, got {values['loss']} at step {i}: lower the learning rate")
            optimizer.step(schedule(i))
            optimizer.check()
            print(json.dumps({"step": i + 1, "lr": schedule(i), **values}), file=log, flush=True)
            bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
            if (i + 1) % every == 0 or i + 1 == steps:
                if wrong := [name for name, a in net.arrays().items() if not np.isfinite(to_numpy(a)).all()]:
                    raise FloatingPointError(f"train.fit: the net must stay finite, got NaN or infinity in {wrong[0]} at step {i}: "
                                             "lower the learning rate")
                os.fsync(log.fileno())                              # the log is never behind the checkpoint
                run.checkpoint(i + 1, net, optimizer)
    run.seconds = time.perf_counter() - start - (run.apart - before)


def numbers(values):
    """A dict of numbers as Python numbers. Those that lie on a GPU, as arrays without axes, are copied together, once."""
    device = {name: v for name, v in values.items() if array_module(v) is not np}
    if device:
        xp = array_module(next(iter(device.values())))
        values = {**values, **dict(zip(device, to_numpy(xp.stack(list(device.values()))).tolist()))}
    return values


class Run:
    """A folder that holds one training run: config.json, metrics.jsonl, checkpoint.npz, and what the program adds.

    config: the settings, JSON values. A new run needs a folder without a config.json; resume=True continues the one there,
    and its settings must be the same. Raises FileExistsError, FileNotFoundError or ValueError saying which.
    seconds: of training, known after fit; apart: of what ran in aside().
    """

    seconds, apart = None, 0.0

    def __init__(self, folder, config, resume=False):
        self.folder = Path(folder)
        path = self.folder / "config.json"
        config = json.loads(json.dumps(config))
        if resume:
            if not path.is_file():
                raise FileNotFoundError(f"train.Run: there is no run to resume in {self.folder}")
            before = read_json(path)
            if not isinstance(before, dict):
                raise ValueError(f"train.Run: {path} must hold the settings of a run, got {before!r}")
            if changed := sorted(k for k in {*before, *config} if before.get(k) != config.get(k)):
                told = "; ".join(f"{k} was {before.get(k)!r}, is {config.get(k)!r}" for k in changed)
                raise ValueError(f"train.Run: a resumed run must keep its settings ({path}), got: {told}")
        else:
            if path.exists():
                raise FileExistsError(f"train.Run: {self.folder} holds a run already; resume it, or choose another name")
            self.folder.mkdir(parents=True, exist_ok=True)
            write(path, json.dumps(config, indent=1) + "\n")

    def aside(self, f):
        """f, whose time is not that of training: a decorator for what measures and draws while a net trains."""
        @functools.wraps(f)
        def timed(*args, **options):
            start = time.perf_counter()
            try:
                return f(*args, **options)
            finally:
                self.apart += time.perf_counter() - start
        return timed

    def open_log(self, steps):
        """The metrics log, open for appending after its first `steps` records: what came after the checkpoint is done again.

        Raises ValueError naming file and line if those records are not whole.
        """
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(errors="replace").splitlines()[:steps] if path.exists() else []
        for i in range(steps):
            try:
                found = json.loads(lines[i])["step"]
            except (ValueError, IndexError, KeyError, TypeError):
                found = "none"
            if found != i + 1:
                raise ValueError(f"train.Run: line {i + 1} of {path} must be the record of step {i + 1}, got that of {found}: "
                                 "the log does not fit the checkpoint")
        write(path, "".join(line + "\n" for line in lines))
        return path.open("a")

    def metrics(self):
        """The records of the metrics log, one dict a step."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def checkpoint(self, steps, net, optimizer):
        """Keep all that training needs to go on: the net's arrays, the optimiser's, the number of steps done."""
        arrays = {**{f"net/{k}": v for k, v in net.arrays().items()}, **{f"optimizer/{k}": v for k, v in optimizer.state.items()}}
        arrays = {k: to_numpy(v) for k, v in arrays.items()}
        write_arrays(self.folder / "checkpoint.npz", arrays, {"steps": steps, "optimizer": optimizer.kind})

    def restore(self, net, optimizer):
        """Load the checkpoint, if there is one, into net and optimizer. Returns the number of steps done.

        Raises ValueError naming the file and all that does not fit; net and optimizer stay as they were then.
        """
        path = self.folder / "checkpoint.npz"
        if not path.exists():
            return 0
        arrays, meta = read_arrays(path)
        steps = meta.get("steps") if isinstance(meta, dict) else None
        if type(steps) is not int or steps < 0:
            raise ValueError(f"train.Run: {path} must say how many steps were done, an integer >= 0, got {str(meta)[:80]}")
        if meta.get("optimizer") != optimizer.kind:
            raise ValueError(f"train.Run: {path} must hold the state of {optimizer.kind}, got that of {meta.get('optimizer')}")
        if foreign := [k for k in arrays if not k.startswith(("net/", "optimizer/"))]:
            raise ValueError(f"train.Run: {path} must hold arrays of net/ and optimizer/ only, got {foreign[0]}")
        both = SimpleNamespace(arrays=lambda: {**net.arrays(), **{f"optimizer/{k}": v for k, v in optimizer.state.items()}})
        load(both, {k.removeprefix("net/"): v for k, v in arrays.items()}, str(path))      # both or, if anything differs, neither
        return steps
