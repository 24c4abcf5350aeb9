"""Time the CUDA kernels beside PyTorch (cuDNN, torchvision) and beside what the GPU can do at most; check every result first.

    python examples/bench_gpu.py --json gpu.json                    # needs a GPU and CuPy; PyTorch and torchvision where installed
    python examples/bench_gpu.py --only conv nms --quick            # some groups, fewer turns
    python examples/bench_gpu.py --dry-run                          # no GPU: every job at small size on the emulated kernels

Each job's result on the inputs that are timed is first compared with float64: that of the CPU, for convolutions that of unrolling and matrix
products (cuBLAS; on the CPU in a dry run); a wrong one is named and not timed. Decisions (pools, NMS, sort) must be equal to the bit. Times are
medians over --turns calls between CUDA events, after a warm-up, going round --sets sets of fresh random inputs (together larger than the
GPU's cache where memory is the limit). Printed: milliseconds, ratio to each peer in the same run (smaller is better: ours / theirs), and
the share of the limit: of the rate of a float32 matrix product of 8192 (conv) or of a device copy (all else), both measured first.
"torch" is cuDNN with fp32_precision "ieee", as our kernels compute; "torch tf32" rounds inputs to 10 bits. Layout: channels last for both.
Results are written after every job, so a run that is stopped keeps what it has. A dry run measures nothing of a GPU, and says so.
"""
import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable

import tinydet                                                      # before numpy: sets how BLAS threads wait
import numpy as np
import timing

from tinydet import files, optim, to_numpy
from tinydet.layers import Layer
from tinydet.ops import batch_norm, conv, focal_loss, lrn, max_pool, nms, offset_pool, scan, softmax_loss, sort

VGG = [("conv3_2", 56, 256, 256), ("conv4_1", 28, 256, 512), ("conv4_2", 28, 512, 512), ("conv5_1", 14, 512, 512)]


@dataclasses.dataclass
class Job:
    """One thing to time. make(rng, scale) gives its inputs, NumPy arrays; scale 1 is full size, below 1 for dry runs."""

    group: str
    name: str
    make: Callable
    prepare: Callable                   # of the inputs, on the backend: what to time, which returns an array, or a tuple of arrays and numbers
    peers: dict = dataclasses.field(default_factory=dict)      # name: function of (torch, inputs as torch tensors), giving a callable
    work: Callable | None = None        # of the inputs: ("flop", n) or ("byte", n) that cannot be avoided
    tolerance: float = 1e-5             # on ||got - expected|| / ||expected||
    exact: bool = False                 # indices and decisions: the bits of the CPU in float32


def simply(f):
    """prepare() of a job that has nothing to prepare."""
    return lambda *inputs: lambda: f(*inputs)


def floats(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def some(full, scale):
    """A size, scaled down, at least 1."""
    return max(1, round(full * scale))


# Convolution

def conv_inputs(side, Cin, Cout, k, N=32, stride=1, pad=1):
    def make(rng, scale):
        n, ci = N if scale == 1 else some(N, scale / 4), Cin if Cin < 16 else 4 * some(Cin // 4, scale)      # fours: the same kernels
        h, co = max(k + stride, some(side, scale ** 0.5)), 4 * some(Cout // 4, scale)
        x, w, b = floats(rng, n, h, h, ci), floats(rng, k, k, ci, co) / np.float32(k * ci ** 0.5), floats(rng, co)
        y = conv.output_size(x, w, stride, (pad,) * 4, 1)
        return x, w, b, floats(rng, n, *y, co)
    return make


def conv_jobs():
    layers = [(f"{name} {Cin}->{Cout} {side}x{side} batch 32", side, Cin, Cout, 3, 32, 1, 1) for name, side, Cin, Cout in VGG]
    layers += [("conv1_1 3->64 224x224 batch 32", 224, 3, 64, 3, 32, 1, 1), ("11x11/4 3->96 224x224 batch 32", 224, 3, 96, 11, 32, 4, 0),
               ("3x3/2 256->256 56x56 batch 32", 56, 256, 256, 3, 32, 2, 1), ("1x1 512->512 28x28 batch 32", 28, 512, 512, 1, 32, 1, 0),
               ("conv4_2 512->512 28x28 batch 1", 28, 512, 512, 3, 1, 1, 1)]
    for name, side, Cin, Cout, k, N, stride, pad in layers:
        def forward(x, w, b, dy, options=(stride, pad)):
            return lambda: conv.forward(x, w, b, *options)[0]

        def unrolled(x, w, b, dy, options=(stride, pad)):
            def run():
                with conv.unrolled():
                    return conv.forward(x, w, b, *options)[0]
            return run

        def dx(x, w, b, dy, options=(stride, pad)):
            cache = conv.forward(x, w, b, *options)[1]
            return lambda: conv.backward(dy, cache, need_dw=False)[0]

        def dw(x, w, b, dy, options=(stride, pad)):
            cache = conv.forward(x, w, b, *options)[1]
            return lambda: conv.backward(dy, cache, need_dx=False)[1]

        def flop(x, w, b, dy):
            return "flop", 2 * dy.size * w[..., 0].size
        make = conv_inputs(side, Cin, Cout, k, N, stride, pad)
        for what, prepare, peer in (("forward", forward, torch_conv), ("forward, im2col + cuBLAS", unrolled, torch_conv), ("dx", dx, torch_conv_dx),
                                    ("dw", dw, torch_conv_dw)):
            peers = {mode: (lambda torch, a, peer=peer, mode=mode, s=stride, p=pad: peer(torch, mode, s, p, *a)) for mode in ("torch", "torch tf32")}
            yield Job("conv", f"{name} {what}", make, prepare, peers, flop)


def precision(torch, mode):
    kind = "tf32" if mode == "torch tf32" else "ieee"
    torch.backends.cudnn.benchmark = True
    if hasattr(torch.backends.cudnn, "conv") and hasattr(torch.backends.cudnn.conv, "fp32_precision"):
        torch.backends.cudnn.conv.fp32_precision = kind
    else:
        torch.backends.cudnn.allow_tf32 = kind == "tf32"


def torch_layout(torch, x, w):
    """x as an (N, C, H, W) view, which is channels_last, and w as (Cout, Cin, kh, kw) in that layout too."""
    return x.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)


def torch_conv(torch, mode, stride, pad, x, w, b, dy):
    precision(torch, mode)
    x, w = torch_layout(torch, x, w)
    return lambda: torch.nn.functional.conv2d(x, w, b, stride, pad)


def torch_conv_dx(torch, mode, stride, pad, x, w, b, dy):
    precision(torch, mode)
    (x, w), dy = torch_layout(torch, x, w), dy.permute(0, 3, 1, 2)
    return lambda: torch.ops.aten.convolution_backward(
        dy, x, w, [len(b)], [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1, [True, False, False])


def torch_conv_dw(torch, mode, stride, pad, x, w, b, dy):
    precision(torch, mode)
    (x, w), dy = torch_layout(torch, x, w), dy.permute(0, 3, 1, 2)
    return lambda: torch.ops.aten.convolution_backward(
        dy, x, w, [len(b)], [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1, [False, True, True])


# Pooling and norms: bound by memory

def map_job(group, name, shape, prepare, peers, passes, exact=False):
    """A job on one map (N, H, W, C); passes: how often the map must be read or written, as a number of floats for each of its own."""
    def make(rng, scale):
        N, H, W, C = shape
        return (floats(rng, some(N, scale), some(H, scale ** 0.5) + 6, some(W, scale ** 0.5) + 6, some(C, scale ** 0.5)) if scale < 1
                else floats(rng, *shape),)
    return Job(group, name, make, prepare, peers, lambda x: ("byte", passes * 4 * x.size), exact=exact)


def memory_jobs():
    def pooled(size, stride):
        return {"torch": lambda torch, a: lambda: torch.nn.functional.max_pool2d(a[0].permute(0, 3, 1, 2), size, stride, return_indices=True)}

    for shape in ((1, 24, 34, 1024), (16, 112, 112, 256)):
        told = "x".join(map(str, shape))
        for size in (2, 3):
            yield map_job("pool", f"offset_pool {size}x{size} {told}", shape, simply(lambda x, s=size: offset_pool.forward(x, s)[0]), pooled(size, 1), 2.25,
                          exact=True)

            def both(x, s=size):
                y, cache = offset_pool.forward(x, s)
                return offset_pool.backward(y, cache)
            yield map_job("pool", f"offset_pool {size}x{size} {told}, forward and backward", shape, simply(both), {}, 4.5)
    yield map_job("pool", "max_pool 3x3/2 32x112x112x64", (32, 112, 112, 64), simply(lambda x: max_pool.forward(x, 3, 2)[0]), pooled(3, 2), 1.31, exact=True)

    shape = (32, 56, 56, 256)

    def norm(x):
        gamma, beta = x[0, 0, 0] + 1, x[0, 0, 1]                        # any numbers, one a channel
        return lambda: batch_norm.forward(x, gamma, beta)[0]

    def norm_both(x):
        gamma, beta, dy = x[0, 0, 0] + 1, x[0, 0, 1], x * x
        return lambda: batch_norm.backward(dy, batch_norm.forward(x, gamma, beta)[1])[0]

    def torch_norm(torch, a):
        x, gamma, beta = a[0].permute(0, 3, 1, 2), a[0][0, 0, 0] + 1, a[0][0, 0, 1]
        return lambda: torch.nn.functional.batch_norm(x, None, None, gamma, beta, True)
    yield map_job("norm", "batch_norm, training, 32x56x56x256", shape, norm, {"torch": torch_norm}, 3)
    yield map_job("norm", "batch_norm, training, forward and backward", shape, norm_both, {}, 8)
    yield map_job("norm", "lrn 5 channels, 32x56x56x256", shape, simply(lambda x: lrn.forward(x)[0]),
                  {"torch": lambda torch, a: lambda: torch.nn.functional.local_response_norm(a[0].permute(0, 3, 1, 2), 5)}, 3)


# Boxes, sorting, losses, the optimiser

def boxes(rng, n):
    corner, side = rng.random((n, 2), np.float32) * 1000, rng.random((n, 2), np.float32) * 100 + 10
    return np.concatenate([corner, corner + side], 1), rng.random(n, np.float32)


def other_jobs():
    def torchvision_nms(torch, a):
        import torchvision
        return lambda: torchvision.ops.nms(a[0], a[1], 0.5)
    for n in (1000, 6000, 20000):
        yield Job("nms", f"nms of {n} boxes, IoU 0.5", lambda rng, scale, n=n: boxes(rng, some(n, scale)), simply(lambda b, s: nms.nms(b, s, 0.5)),
                  {"torchvision": torchvision_nms}, exact=True)
    for n in (10_000, 1_000_000):
        yield Job("sort", f"argsort of {n} floats", lambda rng, scale, n=n: (floats(rng, some(n, scale)),), simply(sort.argsort),
                  {"torch": lambda torch, a: lambda: torch.argsort(a[0], stable=True), "cupy": lambda torch, a: _cupy_argsort(a[0])},
                  lambda x: ("byte", 80 * x.size), exact=True)
        yield Job("sort", f"inclusive scan of {n} floats", lambda rng, scale, n=n: (floats(rng, some(n, scale)),), simply(scan.inclusive),
                  {"torch": lambda torch, a: lambda: torch.cumsum(a[0], 0)}, lambda x: ("byte", 8 * x.size), 1e-4)

    def scores(K):
        return lambda rng, scale: (floats(rng, some(100_000, scale), K), rng.integers(0, K, some(100_000, scale)))
    yield Job("loss", "softmax_loss, 100,000 rows of 21", scores(21), simply(softmax_loss.loss),
              {"torch": _torch_softmax}, lambda x, labels: ("byte", 8 * x.size))
    yield Job("loss", "focal_loss, 100,000 rows of 80", lambda rng, scale: (floats(rng, some(100_000, scale), 80),
                                                                      (rng.random((some(100_000, scale), 80)) < 0.01).astype(np.int64)),
              simply(focal_loss.loss), {}, lambda x, labels: ("byte", 16 * x.size))

    def step(w, g):
        net = Layer(w=w)
        net.grads["w"][...] = g
        optimizer = optim.SGD(net, 0.9, 1e-4)
        return lambda: (optimizer.step(0.01), w)[1]

    def torch_step(torch, a):
        w = a[0].clone().requires_grad_()
        w.grad = a[1].clone()
        optimizer = torch.optim.SGD([w], 0.01, 0.9, weight_decay=1e-4, fused=True)
        optimizer.step()
        return optimizer.step
    yield Job("sgd", "SGD with momentum, 50 M parameters", lambda rng, scale: (floats(rng, some(50_000, scale), 1000), floats(rng, some(50_000, scale), 1000)),
              step, {"torch": torch_step}, lambda w, g: ("byte", 24 * w.size))


def _cupy_argsort(x):
    import cupy
    x = cupy.from_dlpack(x)
    return lambda: cupy.argsort(x)


def _torch_softmax(torch, a):
    x = a[0].clone().requires_grad_()

    def run():
        x.grad = None
        torch.nn.functional.cross_entropy(x, a[1]).backward()
    return run


def jobs():
    return [*conv_jobs(), *memory_jobs(), *other_jobs()]


# Checking and timing

def check(job, inputs, put, dry):
    """Compare the result on these inputs with float64 (or, if exact, the CPU's bits): relative error. Raises AssertionError."""
    got = job.prepare(*(put(a.copy()) for a in inputs))()
    wide = inputs if job.exact else [a.astype(np.float64) if a.dtype == np.float32 else a for a in inputs]
    if job.group == "conv" and not dry:
        with conv.unrolled():                                           # too much for the CPU
            expected = job.prepare(*map(put, wide))()
    else:
        with tinydet.use("numpy" if dry else "numba"):
            expected = job.prepare(*wide)()
    worst = 0.0
    pair = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for a, b in pair:
        a, b = (np.asarray(to_numpy(v), np.float64) for v in (a, b))
        if a.shape != b.shape or not np.isfinite(a).all():
            raise AssertionError(f"got shape {a.shape} for {b.shape}, or numbers that are not finite")
        worst = max(worst, float(np.linalg.norm(a - b) / max(1e-30, np.linalg.norm(b))))
    if not worst <= (0 if job.exact else job.tolerance):
        raise AssertionError(f"relative error {worst:.2g} must be at most {0 if job.exact else job.tolerance:g}")
    return worst


class Gpu:
    """Times callables with CUDA events."""

    def __init__(self):
        import cupy
        self.cupy = cupy
        p = cupy.cuda.runtime.getDeviceProperties(0)
        self.name = p["name"].decode()
        x, y = (cupy.random.standard_normal((8192, 8192), np.float32) for _ in "ab")
        self.limits = {"flop": 2 * 8192 ** 3 / self.time([lambda: x @ y], 20)[0], "byte": 8 * x.size / self.time([lambda: cupy.copyto(x, y)], 20)[0]}

    def time(self, runs, turns):
        """Median seconds of a call, and the quartiles, going round the callables."""
        for run in runs[:3] * 2:
            run()
        times, (start, stop) = [], (self.cupy.cuda.Event(), self.cupy.cuda.Event())
        for turn in range(turns):
            start.record()
            runs[turn % len(runs)]()
            stop.record()
            stop.synchronize()
            times.append(self.cupy.cuda.get_elapsed_time(start, stop) / 1000)
        return float(np.median(times)), float(np.quantile(times, 0.25)), float(np.quantile(times, 0.75))


class Dry:
    """Stands for the GPU: the wall clock of the emulation, which says nothing about a GPU."""

    name, limits = "no GPU: the kernels emulated on the CPU, at small size", {}

    def time(self, runs, turns):
        start = time.perf_counter()
        runs[0]()
        return (time.perf_counter() - start,) * 3


def measure(job, gpu, put, args, torch):
    """One row: error of the check, seconds, ratios to the peers, share of the limit."""
    scale = 0.02 if args.dry_run else 1.0
    rng = np.random.default_rng(args.seed)
    first = job.make(rng, scale)
    row = {"group": job.group, "name": job.name, "error": check(job, first, put, args.dry_run)}
    room = sum(a.nbytes for a in first)
    count = 1 if args.dry_run else max(1, min(args.sets, (1 << 33) // max(1, room)))
    sets = [tuple(map(put, inputs)) for inputs in [first, *(job.make(rng, scale) for _ in range(count - 1))]]
    ours = gpu.time([job.prepare(*s) for s in sets], args.turns)
    row |= {"ms": 1000 * ours[0], "quartiles_ms": [1000 * q for q in ours[1:]], "peers": {}}
    if job.work is not None and gpu.limits:
        kind, amount = job.work(*first)
        row["rate"] = f"{amount / ours[0] / 1e12:.3g} T{kind}/s"
        row["share"] = amount / ours[0] / gpu.limits[kind]
    for name, peer in job.peers.items() if torch else ():
        try:
            theirs = [peer(torch, [torch.from_dlpack(a) for a in s]) for s in sets]
            row["peers"][name] = {"ms": 1000 * (t := gpu.time(theirs, args.turns)[0]), "ratio": ours[0] / t}
        except (ImportError, RuntimeError, TypeError, ValueError) as problem:
            row["peers"][name] = {"failed": f"{type(problem).__name__}: {problem}"[:200]}
    return row


def told(row):
    peers = ", ".join(f"{name} {p['ratio']:.2f}" if "ratio" in p else f"{name} failed" for name, p in row.get("peers", {}).items())
    share = f"{row['share']:5.0%}" if "share" in row else ""
    if "failed" in row:
        return f"{row['group']:6} {row['name']:58} WRONG: {row['failed']}"
    return f"{row['group']:6} {row['name']:58} {row['ms']:10.4f} ms  {row.get('rate', ''):>15} {share}  {peers}"


def main(args):
    backend = "emulated" if args.dry_run else "cuda"
    with tinydet.use(backend) as put:
        torch = None
        if not args.dry_run:
            try:
                import torch
            except ImportError:
                print("PyTorch is not installed: no ratios")
        gpu = Dry() if args.dry_run else Gpu()
        report = {"device": gpu.name, "date": time.strftime("%Y-%m-%d"), "dry_run": args.dry_run, "tinydet": tinydet.__version__,
                  "torch": torch.__version__ if torch else None, "turns": args.turns, "seed": args.seed,
                  "limits": {k: f"{v / 1e12:.3g} T{k}/s" for k, v in gpu.limits.items()}, "rows": []}
        print(f"{gpu.name}; limits {report['limits'] or 'unknown'}; PyTorch {report['torch']}", flush=True)
        for job in jobs():
            if args.only and job.group not in args.only:
                continue
            try:
                row = measure(job, gpu, put, args, torch)
            except Exception as problem:                            # one wrong kernel must not hide the others
                row = {"group": job.group, "name": job.name, "failed": f"{type(problem).__name__}: {problem}"[:300]}
            report["rows"].append(row)
            print(told(row), flush=True)
            if args.json:
                files.write(args.json, json.dumps(report, indent=1) + "\n")
    wrong = sum("failed" in row for row in report["rows"])
    print(f"{len(report['rows'])} jobs, {wrong or 'none'} wrong" + "; a dry run: these times say nothing about a GPU" * args.dry_run)
    return 1 if wrong else 0


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--only", nargs="+", choices=sorted({job.group for job in jobs()}), help="groups (default: all)")
    a("--turns", type=int, default=50, help="timed calls of each (%(default)s)")
    a("--sets", type=int, default=4, help="sets of inputs to go round (%(default)s)")
    a("--quick", action="store_true", help="10 turns")
    a("--seed", type=int, default=0, help="of the inputs (%(default)s)")
    a("--dry-run", action="store_true", help="prove the program on the emulated kernels, without a GPU")
    a("--json", metavar="FILE", help="write the figures here, after every job")
    args = parser.parse_args(argv)
    args.turns = 10 if args.quick else args.turns
    if args.turns < 1 or args.sets < 1:
        parser.error(f"--turns and --sets must be at least 1, got {args.turns}, {args.sets}")
    timing.check_json(parser, args.json)
    return args


if __name__ == "__main__":
    try:
        raise SystemExit(main(arguments()))
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")
