"""What the benchmarks share: turns and their ratios, memory of a call in a process of its own, and what a reader must know of the machine."""
import json
import os
import platform
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import tinydet                                                      # before numpy: sets how BLAS threads wait
import numba
import numpy as np

from tinydet import files, use
from tinydet.backend import array_module

SHORT = 0.05                                                        # s


def measure(sides, turns, wait=lambda: None):
    """Seconds of every turn, by side: a dict of functions. wait: until all that was launched is done.

    The first turn, which compiles, does not count; the sides take turns in going first. A side that takes less than SHORT runs once
    untimed before each turn, as in a training loop: its threads have slept meanwhile, and on a virtual machine waking them can take
    longer than the work.
    """
    times, order = {side: [] for side in sides}, list(sides)
    for turn in range(turns + 1):
        first = turn % len(order)
        for side in order[first:] + order[:first]:
            if times[side] and times[side][-1] < SHORT:
                sides[side]()
            wait()
            start = time.perf_counter()
            sides[side]()
            wait()
            times[side].append(time.perf_counter() - start)
    return {side: t[1:] for side, t in times.items()}


def told(times, pairs):
    """Medians, their ratios, and the quartiles of the turns' ratios. times: {side: seconds of every turn}; pairs: of sides."""
    median = {k: float(np.median(t)) for k, t in times.items()}
    return {"seconds": median, "ratio": {f"{a} / {b}": median[a] / median[b] for a, b in pairs},
            "quartiles": {f"{a} / {b}": np.quantile(np.divide(times[a], times[b]), (0.25, 0.75)).tolist() for a, b in pairs}}


def peak():
    """Most memory this process has held since forget_peak, MB. Not ru_maxrss on Linux: that starts with what the parent held."""
    try:
        return next(int(s.split()[1]) for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def forget_peak():
    """What was needed before may be more than what is measured: count from what is held now, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def memory(run, x):
    """MB that run() takes, its result included: {"traced", "resident"}; {"pool"} if x is an array on a GPU.

    traced: what NumPy and Python asked for at most; resident: by how much the process grew.
    """
    if array_module(x) is not np:
        pool = array_module(x).get_default_memory_pool()
        pool.free_all_blocks()
        before, kept = pool.used_bytes(), run()
        return {"pool": (pool.total_bytes() - before) / 2**20}
    forget_peak()
    tracemalloc.start()
    before, kept = peak(), run()                                    # kept: the result is there until memory was read
    after, traced = peak(), tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return {"traced": traced / 2**20, "resident": after - before}


def fresh(program, words):
    """The JSON value on the last line that a program prints, in a process of its own. Raises ValueError with its error if it fails."""
    command = [sys.executable, str(program), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise ValueError(last.removeprefix("error: ") if last.startswith("error: ") else f"{' '.join(command)} must end well, got: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def arguments_told(args):
    """The arguments, as settings of a result."""
    return {k: v for k, v in vars(args).items() if k not in ("json", "probe")}


def probe_of(program, form, args):
    """What the program, called with these arguments as --probe, prints of one form, in a process of its own."""
    return fresh(program, ["--probe", json.dumps({**vars(args), "form": form})])


def settings(variables=("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")):
    """What a reader of the figures must know of machine and libraries."""
    return {"cores": os.cpu_count(), "numba threads": numba.get_num_threads(), "environment": {k: os.environ.get(k) for k in variables},
            "versions": {"python": platform.python_version(), "tinydet": tinydet.__version__, "numpy": np.__version__, "numba": numba.__version__}}


def finish(args, result):
    """Say whether the figures may be quoted, and write them to --json. Returns the result."""
    if args.turns < 20:
        print("fewer than 20 turns: not for quoting")
    if args.json:
        files.write(args.json, json.dumps(result, indent=1) + "\n")
    return result


def start(main, probe, args):
    """Run main(args, put), or print what probe(form, args, put) measures if this is a process of probe_of. args.threads, if there, are Numba's threads."""
    args = SimpleNamespace(**json.loads(args.probe)) if args.probe else args
    if hasattr(args, "threads"):
        numba.set_num_threads(min(args.threads, numba.config.NUMBA_NUM_THREADS))
    try:
        with use(args.backend) as put:
            if hasattr(args, "form"):
                print(json.dumps(probe(args.form, args, put)))
            else:
                main(args, put)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def check_json(parser, path):
    """Refuse a file whose folder does not exist, or that is a folder, before anything is measured."""
    if path and not Path(path).absolute().parent.is_dir():
        parser.error(f"the folder of --json {path} must exist")
    if path and Path(path).is_dir():
        parser.error(f"--json {path} must be a file, got a folder")
