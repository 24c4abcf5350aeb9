"""Time every op that has two versions: Numba against the NumPy reference, and convolution against PyTorch if it is installed.

    python examples/bench_ops.py --json ops.json

One process, the versions in turn, float32; prints the median time of each and the median of the ratios of the turns. Machines
are noisy: read the ratios. PyTorch (pip install torch) runs conv2d in NCHW with autograd for both gradients.
"""
import argparse
import json
import time

import tinydet  # noqa: F401                                        # before numpy: sets how BLAS threads wait
import numpy as np

from tinydet import files, use
from tinydet.ops import batch_norm, box_voting, conv, lrn, max_pool, merge, nms, offset_pool, soft_nms

LAYERS = ((16, 128, 128, 3, 16, 4, 2, 1), (16, 64, 64, 16, 32, 3, 1, 1), (16, 32, 32, 64, 64, 3, 1, 1), (16, 16, 16, 64, 128, 4, 1, 0))


def both(forward, backward, x):
    """A function that runs forward on x, and backward on what came out."""
    def run():
        y, cache = forward(x)[:2]
        backward(y, cache)
    return run


def torch_conv(x, w, stride, pad):
    try:
        import torch
    except ImportError:
        return None
    tx = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    tw = torch.from_numpy(w.transpose(3, 2, 0, 1).copy()).requires_grad_()
    tb = torch.zeros(w.shape[3], requires_grad=True)

    def run():
        y = torch.nn.functional.conv2d(tx, tw, tb, stride, pad)
        torch.autograd.grad(y, (tx, tw, tb), y.detach())
    return run


def cases():
    """Name, the op as a function for the backend in use, PyTorch's version or None."""
    rng = np.random.default_rng(0)
    for N, H, W, Cin, Cout, k, stride, pad in LAYERS:
        x, w = (rng.standard_normal(s).astype(np.float32) for s in ((N, H, W, Cin), (k, k, Cin, Cout)))
        b = np.zeros(Cout, np.float32)
        yield (f"conv {k}x{k}/{stride} {N}x{H}x{W}x{Cin} -> {Cout}",
               both(lambda x, w=w, b=b, s=stride, p=pad: conv.forward(x, w, b, s, p), conv.backward, x), torch_conv(x, w, stride, pad))
    x = rng.standard_normal((16, 64, 64, 32)).astype(np.float32)
    one, zero = np.ones(32, np.float32), np.zeros(32, np.float32)
    yield "max_pool 2 16x64x64x32", both(lambda x: max_pool.forward(x, 2), max_pool.backward, x), None
    yield "max_pool 3/2, padded 16x64x64x32", both(lambda x: max_pool.forward(x, 3, 2, 1), max_pool.backward, x), None
    yield "offset_pool 2 16x64x64x32", both(lambda x: offset_pool.forward(x, 2), offset_pool.backward, x), None
    yield "batch_norm 16x64x64x32", both(lambda x: batch_norm.forward(x, one, zero), batch_norm.backward, x), None
    maps = rng.standard_normal((8, 27, 27, 96)).astype(np.float32)
    yield "lrn 8x27x27x96", both(lrn.forward, lrn.backward, maps), None
    corner, side = rng.uniform(0, 400, (2000, 2)), rng.uniform(30, 60, (2000, 2))
    boxes, scores, groups = np.concatenate([corner, corner + side], 1), rng.random(2000), rng.integers(0, 80, 2000)
    kept = nms.nms(boxes, scores, 0.3)
    yield "nms 2000 boxes", lambda: nms.nms(boxes, scores, 0.5), None
    yield "nms 2000 boxes, 80 groups", lambda: nms.nms(boxes, scores, 0.5, groups=groups), None
    yield "soft_nms 2000 boxes", lambda: soft_nms.soft_nms(boxes, scores), None
    yield f"box_voting {len(kept)} of 2000 boxes", lambda: box_voting.box_voting(boxes[kept], boxes, scores), None
    yield "merge 150 boxes", lambda: merge.merge(boxes[:150], scores[:150]), None


def timed(run):
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def main(args):
    rows = []
    for name, run, peer in cases():
        versions = {"numpy": ("numpy", run), "numba": ("numba", run), **({"torch": ("numba", peer)} if peer else {})}
        times = {k: [] for k in versions}
        for turn in range(args.turns + 1):                          # the first turn compiles and does not count
            for k, (backend, version) in versions.items():
                with use(backend):
                    times[k].append(timed(version))
        times = {k: np.array(t[1:]) for k, t in times.items()}
        row = {"op": name, **{f"{k} ms": float(np.median(t)) for k, t in times.items()},
               **{f"numba/{k}": float(np.median(times["numba"] / times[k])) for k in times if k != "numba"}}
        rows.append(row)
        print(f"{name:36}" + "".join(f"  {k} {v:.2f}" for k, v in row.items() if k != "op"), flush=True)
    if args.json:
        files.write(args.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    main(parser.parse_args())
