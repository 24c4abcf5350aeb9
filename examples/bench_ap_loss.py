"""Speed and memory of AP-loss (tinydet/ops/ap_loss.py; 1904.06373) beside the paper's loop over the positives, and beside a sort.

    python examples/bench_ap_loss.py --json ap_loss.json
    python examples/bench_ap_loss.py --only loop --dtype float64 --turns 20
    python examples/bench_ap_loss.py --positives 20 40 --negatives 1000 --large 50 20000 --turns 2         # a smoke test

Positives are N(1, 1.5), negatives N(-4, 1.5), the two in random order; labels int8; delta 1, interpolated precision; loss and update.
    loop        ours beside the loop of the ap-loss notes, sec. 3, O(P (P + N)), at each of --positives: in NumPy and, where it is
                installed, in PyTorch, on the same scores (--dtype; the official code: float32, which ours turns into float64 inside).
                Twice each: as the notes have it, and "in place", with one array for each positive in place of five
    large       ours once on all of --large, float32, beside one np.sort of the same scores; memory of either
    growth      ours alone, while P doubles with N as it is, and while N doubles with P as it is
Before any timing all forms must agree, in both dtypes: to 1e-12 in float64 and 5e-6 in float32, the loss and, over its largest
value, g. In the large case, where the loop would take minutes, g must add up to -loss over the positives and +loss over the negatives.
In every turn the forms run one after the other, each first equally often. The first turn, which compiles, does not count; a form that
takes less than 50 ms runs once untimed before each turn, since its threads have slept. A ratio is that of the medians, in brackets the
quartiles of the turns' ratios. --threads serve ours and PyTorch; NumPy's loop and sort have one.
Memory is that of one call in a fresh process, result included, without scores and labels, which were there before: traced, what NumPy
and Python asked for at most, and resident, by how much the process grew (VmHWM; off Linux ru_maxrss). Ratios are of the scores' bytes;
labels are a quarter as much again. With --backend cuda loop, sort and memory are CuPy's and its pool's (unverified: not yet run on a GPU).
5 turns, as the loop is slow: figures worth quoting need 20, an idle machine and two threads. tinydet sets OMP_WAIT_POLICY=PASSIVE, which
PyTorch's threads follow; set it to ACTIVE for PyTorch's own.
"""
import argparse
import os
import time
from functools import partial

import tinydet                                                      # before numpy: sets how BLAS threads wait
import numpy as np
import timing

from tinydet import to_numpy
from tinydet.backend import array_module
from tinydet.ops.ap_loss import ap_loss

OP = "bench_ap_loss"
PARTS = ("loop", "large", "growth")
LIMITS = {"float32": 5e-6, "float64": 1e-12}


# The forms

def loop(xp, scores, labels, delta=1.0, in_place=False):
    """Loss and update with interpolated precision, a positive at a time from the lowest score up (ap-loss notes, sec. 3).

    xp: numpy, cupy or torch, whose arrays scores and labels (N,) are; all is done in the dtype of scores. At least one positive.
    """
    def step(x):
        if not in_place:
            return xp.clip(x / (2 * delta) + 0.5, 0, 1)
        x *= 0.5 / delta
        x += 0.5
        return xp.clip(x, 0, 1, out=x)

    positive = labels == 1
    f = scores[positive]
    near = (labels == 0) & (scores >= f.min() - delta)              # the others enter no rank
    n = scores[near]
    best, precision, acc = 0.0, xp.zeros_like(f), xp.zeros_like(n)
    for i in xp.argsort(f):
        q = step(n - f[i])
        a, b = float(step(f - f[i]).sum()) + 0.5, float(q.sum())    # its own step is the other half
        now = a / (a + b)
        share = 1 / (a + b) if best <= now else (1 - best) / (1 - now) / (a + b)
        best = precision[i] = max(best, now)
        if in_place:
            q *= share
            acc += q
        else:
            acc = acc + q * share
    g = xp.zeros_like(scores)
    g[near], g[positive] = acc / len(f), (precision - 1) / len(f)
    return 1 - float(precision.mean()), g


def pytorch(threads):
    """The module torch; None, which is told, where it is not installed."""
    try:
        import torch                                                # after tinydet, as in a program that uses both
    except ImportError:
        print("PyTorch is not installed (pip install torch): its loop is left out")
        return None
    torch.set_num_threads(threads)
    return torch


def forms(scores, labels, put, torch):
    """{name: function without arguments that returns loss and g}."""
    x, y = put(scores), put(labels)
    xp = array_module(x)
    libraries = {xp.__name__: (xp, x, y)}
    if torch:
        libraries["torch"] = (torch, *(torch.from_numpy(a).to("cpu" if xp is np else "cuda") for a in (scores, labels)))
    return {"ours": partial(ap_loss, x, y), **{f"{name} loop{' in place' * in_place}": partial(loop, *of, in_place=in_place)
                                               for name, of in libraries.items() for in_place in (False, True)}}


def sample(P, N, seed, dtype="float32"):
    """Scores (P + N,) and their labels, int8, in random order, as NumPy arrays."""
    rng = np.random.default_rng([seed, P, N])
    labels = np.zeros(P + N, np.int8)
    labels[rng.choice(P + N, P, replace=False)] = 1
    scores = rng.standard_normal(P + N, np.float32).astype(dtype, copy=False)      # of either dtype the same values but for rounding
    scores *= 1.5
    scores += np.where(labels == 1, scores.dtype.type(1), scores.dtype.type(-4))
    return scores, labels


# Checks before any timing

def host(a):
    return a.cpu().numpy() if hasattr(a, "cpu") else to_numpy(a)


def agree(scores, labels, put, torch):
    """How far each loop is from ours, loss or g over its largest |g|: {form: float}. Raises ValueError if one is too far."""
    sides, limit = forms(scores, labels, put, torch), LIMITS[scores.dtype.name]
    loss, g = (host(a) for a in sides.pop("ours")())
    apart = {}
    for name, run in sides.items():
        value, update = run()
        apart[name] = float(max(abs(value - loss), np.abs(host(update) - g).max() / (np.abs(g).max() or 1)))
        if not apart[name] <= limit:
            raise ValueError(f"{OP}: all forms must agree to {limit:g} in {scores.dtype}, got {apart[name]:.2g} for the {name}")
    return apart


def balanced(x, y):
    """By how much g misses -loss over the positives and +loss over the negatives. Raises ValueError if that is too much."""
    loss, g = (host(a) for a in ap_loss(x, y))
    labels, g = host(y), g.astype(np.float64)
    off = max(abs(g[labels == 1].sum() + loss), abs(g[labels == 0].sum() - loss)).item()
    if not off <= LIMITS["float32"]:
        raise ValueError(f"{OP}: g must add up to -loss and +loss, got a loss of {loss} and sums that are off by {off:.2g}")
    return off


# Measuring

def measure(sides, turns, x):
    """Seconds of every turn, by form. x: any array of the backend."""
    return timing.measure(sides, turns, array_module(x).cuda.runtime.deviceSynchronize if array_module(x) is not np else lambda: None)


def large_sides(x, y):
    return {"ours": partial(ap_loss, x, y), "sort": partial(array_module(x).sort, x)}


def probe(form, args, put):
    """MB of one call of this form, as timing.memory tells it. A small call compiles before."""
    large_sides(*map(put, sample(5, 100, args.seed)))[form]()
    x, y = map(put, sample(*args.large, args.seed))
    return timing.memory(large_sides(x, y)[form], x)


# The parts: each returns what it adds to the result, {"turns": {row: {form: seconds}}, "time": {row: ...}, ...}

def loop_part(args, put):
    torch, found = pytorch(args.threads), {"turns": {}, "time": {}, "agreement": {}}
    for P in args.positives:
        row, given = f"P={P}", {dtype: sample(P, args.negatives, args.seed, dtype) for dtype in LIMITS}
        found["agreement"][row] = {dtype: agree(*each, put, torch) for dtype, each in given.items()}
        print(f"{row}, N={args.negatives}: all forms agree, to "
              + " and ".join(f"{max(apart.values()):.0e} in {dtype}" for dtype, apart in found["agreement"][row].items()), flush=True)
        sides = forms(*given[args.dtype], put, torch)
        times = measure(sides, args.turns, put(given[args.dtype][0]))
        found["turns"][row], found["time"][row] = times, timing.told(times, [(name, "ours") for name in sides if name != "ours"])
        tell(row, found["time"][row])
    return {**found, "torch": torch and {"version": torch.__version__, "threads": torch.get_num_threads()}}


def large_part(args, put):
    scores, labels = sample(*args.large, args.seed)
    MB = {"scores": scores.nbytes / 2**20, "labels": labels.nbytes / 2**20}
    x, y = put(scores), put(labels)
    off = balanced(x, y)
    times = measure(large_sides(x, y), args.turns, x)
    told = timing.told(times, [("ours", "sort")])
    tell("large: P={}, N={}".format(*args.large), told)
    del scores, labels, x, y                                        # the children need the room
    used = {form: timing.probe_of(__file__, form, args) for form in times}
    ratio = {form: {kind: v / MB["scores"] for kind, v in found.items()} for form, found in used.items()}
    for form, found in ratio.items():
        print(f"    {form:24}memory " + ", ".join(f"{kind} {used[form][kind]:.1f} MB, {v:.2f} of the scores' {MB['scores']:.1f} MB"
                                                  for kind, v in found.items()))
    return {"turns": {"large": times}, "time": {"large": told}, "sums off": off, "memory": {"MB": used, "input MB": MB, "ratio": ratio}}


def growth_part(args, put):
    P, N = args.positives[0], args.negatives
    sizes = {f"P={k * P}": (k * P, N) for k in (1, 2, 4, 8)} | {f"N={k * N}": (P, k * N) for k in (2, 4, 8)}
    given = {row: tuple(map(put, sample(*size, args.seed, args.dtype))) for row, size in sizes.items()}
    times = measure({row: partial(ap_loss, *each) for row, each in given.items()}, args.turns, given[f"P={P}"][0])
    told = timing.told(times, [(row, f"P={P}") for row in sizes if row != f"P={P}"])
    tell(f"growth: ours from P={P}, N={N}", told)
    return {"turns": {"growth": times}, "time": {"growth": told}}


def tell(title, told):
    print(title)
    for form, seconds in told["seconds"].items():
        ratio = next((k for k in told["ratio"] if k.startswith(f"{form} / ")), None)
        spread = "{:.3g} [{:.3g}, {:.3g}]".format(told["ratio"][ratio], *told["quartiles"][ratio]) if ratio else ""
        print(f"    {form:24}{seconds * 1e3:12.2f} ms  " + (f"{spread} of {ratio.partition(' / ')[2]}" if ratio else ""), flush=True)


def main(args, put):
    result = {"settings": {**timing.arguments_told(args), **timing.settings()}, "date": time.strftime("%Y-%m-%d %H:%M"), "turns": {}, "time": {}}
    for part in args.only:
        for key, value in {"loop": loop_part, "large": large_part, "growth": growth_part}[part](args, put).items():
            result[key] = result[key] | value if key in ("turns", "time") else value
    return timing.finish(args, result)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    a("--positives", type=int, nargs="+", default=[500, 2000], metavar="P", help="of loop; the first of growth, too (500 2000)")
    a("--negatives", type=int, default=200000, metavar="N", help="of loop and growth (%(default)s)")
    a("--large", type=int, nargs=2, default=[5000, 20000000], metavar=("P", "N"), help="(5000 20000000)")
    a("--dtype", choices=LIMITS, default="float32", help="of the scores in loop and growth (%(default)s)")
    a("--turns", type=int, default=5, help="timed turns (%(default)s; figures that are quoted need 20)")
    a("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of Numba, at most NUMBA_NUM_THREADS, and PyTorch (%(default)s)")
    a("--seed", type=int, default=0, help="of the scores (%(default)s)")
    a("--backend", choices=tinydet.backend.BACKENDS, default="numba", help="(%(default)s)")
    a("--json", metavar="FILE", help="write all to it")
    a("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, least in (("positives", 1), ("negatives", 1), ("large", 1), ("turns", 1), ("threads", 1), ("seed", 0)):
        if np.min(getattr(args, name)) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    timing.check_json(parser, args.json)
    return args


if __name__ == "__main__":
    timing.start(main, probe, arguments())
