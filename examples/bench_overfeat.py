"""What sliding the whole net saves (OverFeat, 1312.6229, sec. 3.3): six scales at fine stride, beside each window cut out alone.

    python examples/bench_overfeat.py --json overfeat.json
    python examples/bench_overfeat.py --table fast --sample 8 --turns 5
    python examples/bench_overfeat.py --backend cuda --image photograph.jpg
    python examples/bench_overfeat.py --quick --turns 1             # a smoke test: 1/32 of the channels, two scales

One photograph (smooth noise, or --image) at the six scales of the paper's Table 5 (of the other nets: their counterparts), not mirrored;
the net at full width, float32, with random weights; the classifier alone. The accurate net sees 1575 windows.

    offsets     net.dense: the trunk once a scale, its last pooling at every offset, the classifier on the map of each offset
    dilated     the same maps from one run of the classifier a scale, its first kernel dilated (notes, 3.4)
    crops       each window cut out and sent through the net, --batch at once

crops is EXTRAPOLATED: timed are --sample windows, drawn from all of them by --seed, cutting included, and the seconds multiplied by all
windows / sample. Every window costs the same. Resizing and normalising come before, for all forms. In every turn the forms run one after
the other, each first equally often; the first turn compiles and does not count. A ratio is that of the medians, in brackets the
quartiles of the turns' ratios. Multiply-adds are counted from the table, by the formula of the convolution (Winograd's way makes fewer).
Before any timing the maps are compared with the sampled windows taken alone, over the largest value of the maps; float64 at 1/32 of the
channels (small: 1/4) must agree to 1e-10, float32 to 1e-4:
    crops       the net on the window's pixels. Must agree where the net pads nothing (all pads set to 0; the window is then all that an
                output sees, 317 pixels for the accurate net), and cannot where it pads: a crop sees zeros where the slid net sees the
                pixels around the window. How far apart the padded nets are is told, not judged
    blocks      pooling and classifier on the window's block of the trunk's own map. Must agree with padding, too
Memory is that of one call in a fresh process for each form, on top of the weights: traced, what NumPy and Python asked for at most, and
resident, by how much the process grew (VmHWM; off Linux ru_maxrss). Of crops it is that of the sample, and hardly more for all windows.
Ratios of memory count the weights, too. With --backend cuda it is the memory of CuPy's pool (unverified: not yet run on a GPU).
Figures worth quoting need 20 turns, an idle machine, and both threads.
The first command ends its checks with (seconds and memory follow)

    net           dtype    width  window     crops    blocks    fine maps less 16 windows alone, over the largest value
    padding-free  float64  1/32      317   2.0e-15   9.0e-16
    padded        float64  1/32      221   2.4e-01   1.0e-15    a crop sees zeros where the slid net sees pixels
    padding-free  float32  1         317   4.2e-06   0.0e+00
    padded        float32  1         221   2.2e-01   0.0e+00    a crop sees zeros where the slid net sees pixels
    accurate net, width 1, 144,656,488 parameters; 6 scales of one image, 1575 windows of 221x221 pixels
"""
import argparse
import dataclasses
import time
from functools import partial
from types import SimpleNamespace

import tinydet                                                      # before numpy: sets how BLAS threads wait
import numpy as np
import timing

from tinydet import augment, images, to_numpy
from tinydet.backend import array_module
from tinydet.models import overfeat
from tinydet.ops import max_pool

OP = "bench_overfeat"
CLASSES = 1000
NARROW = {"fast": 1 / 32, "accurate": 1 / 32, "small": 1 / 4}       # of the channels; of 16 a 32nd would leave half a one
ROUTES = ("offsets", "dilated")
FORMS = (*ROUTES, "crops")
PAIRS = (("crops", "offsets"), ("crops", "dilated"), ("offsets", "dilated"))
LIMITS = {"float32": 1e-4, "float64": 1e-10}


# Net and photograph

class PaddingFree(overfeat.Spec):
    """The same net with no padding anywhere: its larger window is all that an output sees."""

    @property
    def layers(self):
        table = super().layers
        return dataclasses.replace(table, trunk=tuple((*row[:4], 0, row[5]) for row in table.trunk))


def make(args, put, kind=overfeat.Spec, dtype="float32", width=1.0):
    """The net. init None (He's rule), so that values neither fade nor grow from layer to layer: only equality and cost matter here."""
    rng = np.random.default_rng(args.seed)
    if dtype == "float32":                                          # drawn as float64 they take longer
        rng = SimpleNamespace(standard_normal=partial(rng.standard_normal, dtype=np.float32))
    spec = kind(tuple(map(str, range(CLASSES))), args.table, width, dropout=0.0, init=None)
    return overfeat.OverFeat(spec, rng, dtype).to(put)


def photograph(args):
    """uint8 (H, W, 3): --image, or smooth noise, 640x480."""
    if args.image:
        return images.read_image(args.image)
    rough = np.random.default_rng(args.seed).integers(0, 256, (15, 20, 3), np.uint8)
    return augment.resize(rough, overfeat.NO_BOXES, 640, 480)[0]


def scaled(net, image, args, put):
    """The image at every scale of the net: arrays (1, H, W, 3)."""
    return [put(net.normalise(overfeat.resize_to(net.table, image, size)[None])) for size in net.table.sizes[:2 if args.quick else None]]


# The forms

def windows(table, xs):
    """All windows: rows (scale, row, column of the scale's fine map), int64."""
    maps = [overfeat.outputs(table, *x.shape[1:3]).fine for x in xs]
    return np.array([(s, *at) for s, size in enumerate(maps) for at in np.ndindex(*size)])


def cut(arrays, rows, side, jump=1):
    """A square of each row's array, `side` wide, that begins at jump times its row and column: (R, side, side, C)."""
    squares = [arrays[s][:, jump * r:jump * r + side, jump * c:jump * c + side] for s, r, c in rows.tolist()]
    return array_module(squares[0]).concatenate(squares)


def pooled(net, maps):
    """The classifier's outputs (R, K), from the trunk's maps of single windows."""
    return net.parts["classifier"](max_pool.forward(maps, net.table.pool)[0])[:, 0, 0]


def crops(net, xs, rows, batch):
    """The outputs (R, K) of windows cut out of the images."""
    table = net.table
    return np.concatenate([to_numpy(pooled(net, net.parts["trunk"](cut(xs, rows[i:i + batch], table.window, table.jump))))
                           for i in range(0, len(rows), batch)])


def blocks(net, xs, rows):
    """The outputs (R, K) of windows cut out of the trunk's maps of the whole images: naive block slicing (notes, 3.4)."""
    return to_numpy(pooled(net, cut([net.parts["trunk"](x) for x in xs], rows, net.table.pool * net.table.k)))


def fine(net, xs, route):
    """The classifier's fine maps of all scales."""
    return [net.dense(x, route, ("classifier",))[0] for x in xs]


def forms(net, xs, rows, batch):
    return {**{route: partial(fine, net, xs, route) for route in ROUTES}, "crops": partial(crops, net, xs, rows, batch)}


# Checks before any timing

def draw(table, xs, args):
    """The windows that are sampled, and how many there are."""
    found = windows(table, xs)
    count = min(args.sample, len(found))
    return found[np.sort(np.random.default_rng(args.seed).choice(len(found), count, replace=False))], len(found)


def apart(net, xs, rows, batch):
    """How far each route's maps are from the windows alone, over the maps' largest value: {"crops" or "blocks": {route: float}}."""
    alone = {"crops": crops(net, xs, rows, batch), "blocks": blocks(net, xs, rows)}
    found = {way: {} for way in alone}
    for route in ROUTES:
        maps = list(map(to_numpy, fine(net, xs, route)))
        largest = max(float(np.abs(F).max()) for F in maps)
        if largest == 0:
            raise ValueError(f"{OP}: the maps must not be 0 everywhere, got weights of --seed that make them so")
        at = np.stack([maps[s][0, r, c] for s, r, c in rows.tolist()])
        for way, ys in alone.items():
            found[way][route] = float(np.abs(at - ys).max()) / largest
    return found


def agree(net, image, args, put):
    """apart, and what it was judged by. Raises ValueError if blocks or, in a net that pads nothing, crops are too far apart."""
    xs, dtype, padded = scaled(net, image, args, put), net.dtype.name, any(row[4] for row in net.table.trunk)
    rows, _ = draw(net.table, xs, args)
    found = apart(net, xs, rows, args.batch)
    for way in ("blocks",) if padded else ("blocks", "crops"):
        for route, off in found[way].items():
            if not off <= LIMITS[dtype]:
                raise ValueError(f"{OP}: the {'padded' if padded else 'padding-free'} net's fine map ({route}) and {way} must agree to "
                                 f"{LIMITS[dtype]:g} in {dtype}, got {off:.2g} of the largest value")
    return {"net": "padded" if padded else "padding-free", "dtype": dtype, "width": net.spec.width, "window": net.table.window,
            "sample": len(rows), "limit": LIMITS[dtype], "apart": found}


# Measuring and telling

def extrapolated(times, sample, total):
    """Seconds of every turn, those of the sampled crops multiplied by total / sample."""
    return {form: [t * total / sample for t in turns] if form == "crops" else turns for form, turns in times.items()}


def work(net, xs, total):
    """Multiply-adds of the fine maps of all scales, and of all windows alone: {"dense", "crops"}."""
    how = (net.table, CLASSES, net.spec.width)
    one = overfeat.multiply_adds(*how)
    head = sum(n for name, n in one.items() if name.startswith("classifier."))
    trunk = sum(n for x in xs for name, n in overfeat.multiply_adds(*how, size=x.shape[1:3]).items() if name.startswith("trunk."))
    return {"dense": trunk + head * total, "crops": sum(one.values()) * total}


def probe(form, args, put):
    """MB of one call of this form, as timing.memory tells it. A narrow net runs it before: it compiles."""
    image = photograph(args)

    def build(width):
        net = make(args, put, width=width)
        xs = scaled(net, image, args, put)
        return forms(net, xs, draw(net.table, xs, args)[0], args.batch)[form], xs[0]
    build(NARROW[args.table])[0]()
    return timing.memory(*build(args.width))


def memory_told(found, held):
    """found: {form: {kind: MB of the call}}; held: MB of the weights, which the ratios count, too."""
    return {"MB": found, "weights MB": held, "ratio": {f"{a} / {b}": {k: (held + found[a][k]) / (held + found[b][k]) for k in found[b]}
                                                      for a, b in PAIRS}}


def named(width):
    return "1" if width == 1 else f"1/{1 / width:g}"


def tell_agreement(found, title=False):
    if title:
        print(f"{'net':14}{'dtype':9}{'width':7}{'window':>6}{'crops':>10}{'blocks':>10}"
              f"    fine maps less {found['sample']} windows alone, over the largest value")
    off = [max(by_route.values()) for by_route in (found["apart"]["crops"], found["apart"]["blocks"])]
    print(f"{found['net']:14}{found['dtype']:9}{named(found['width']):7}{found['window']:6}{off[0]:10.1e}{off[1]:10.1e}"
          + "    a crop sees zeros where the slid net sees pixels" * (found["net"] == "padded"), flush=True)


def tell(result):
    times, used, way = result["time"], result["memory"], result["extrapolation"]
    print(f"{'':10}{'seconds':>9}  {'crops / it':24}" + "".join(f"{k + ' MB':>12}{'crops / it':>12}" for k in used["MB"]["crops"]))
    for form in FORMS:
        ratio, note = f"crops / {form}", ""
        if form == "crops":
            note = (f"    EXTRAPOLATED to {way['windows']} windows from {way['sample']}, {way['sample seconds']:.2f} s" if way["extrapolated"]
                    else "    all windows")
        spread = "" if form == "crops" else "{:.1f} [{:.1f}, {:.1f}]".format(times["ratio"][ratio], *times["quartiles"][ratio])
        print(f"{form:10}{times['seconds'][form]:9.2f}  {spread:24}"
              + "".join(f"{v:12.1f}" + (f"{used['ratio'][ratio][k]:12.2f}" if spread else " " * 12) for k, v in used["MB"][form].items()) + note)
    work = result["multiply-adds"]
    print(f"multiply-adds: {work['dense'] / 1e9:,.4g} billion slid, {work['crops'] / 1e9:,.4g} billion as crops, {work['crops'] / work['dense']:.1f} "
          f"times as many; weights, which the ratios of memory count: {used['weights MB']:.1f} MB")


def main(args, put):
    image, found = photograph(args), []
    for dtype, width in (("float64", NARROW[args.table]), ("float32", args.width)):
        for kind in (PaddingFree, overfeat.Spec):                   # one net at a time: a full one takes 580 MB
            net = None
            net = make(args, put, kind, dtype, width)
            found.append(agree(net, image, args, put))
            tell_agreement(found[-1], len(found) == 1)
    xs = scaled(net, image, args, put)                              # of the last, the net itself
    rows, total = draw(net.table, xs, args)
    held = sum(a.nbytes for a in net.arrays().values()) / 2**20
    print(f"{args.table} net, width {named(args.width)}, {sum(a.size for a in net.params.values()):,} parameters; {len(xs)} scales of "
          f"one image, {total} windows of {net.table.window}x{net.table.window} pixels", flush=True)
    wait = array_module(xs[0]).cuda.runtime.deviceSynchronize if array_module(xs[0]) is not np else lambda: None
    turns = timing.measure(forms(net, xs, rows, args.batch), args.turns, wait)
    times = timing.told(extrapolated(turns, len(rows), total), PAIRS)
    settings = {**timing.arguments_told(args), "photograph": image.shape, "scales": [x.shape[1:3] for x in xs], **timing.settings()}
    counted = work(net, xs, total)
    del net, xs                                                     # its memory is the children's
    result = {"settings": settings, "date": time.strftime("%Y-%m-%d %H:%M"), "agreement": found, "turns": turns,
              "extrapolation": {"extrapolated": len(rows) < total, "sample": len(rows), "windows": total, "factor": total / len(rows),
                                "batch": args.batch, "sample seconds": float(np.median(turns["crops"]))},
              "time": times, "multiply-adds": counted,
              "memory": memory_told({form: timing.probe_of(__file__, form, args) for form in FORMS}, held)}
    tell(result)
    return timing.finish(args, result)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--table", choices=overfeat.TABLES, default="accurate", help="the net (%(default)s)")
    a("--image", metavar="FILE", help="a photograph (default: smooth noise)")
    a("--sample", type=int, default=16, metavar="WINDOWS", help="windows that are cut out (%(default)s)")
    a("--batch", type=int, default=8, metavar="WINDOWS", help="of these at once (%(default)s)")
    a("--quick", action="store_true", help="1/32 of the channels (small: 1/4), two scales")
    a("--turns", type=int, default=20, help="timed turns (%(default)s; figures that are quoted need 20)")
    a("--seed", type=int, default=0, help="of weights, photograph and sample (%(default)s)")
    a("--backend", choices=tinydet.backend.BACKENDS, default="numba", help="(%(default)s)")
    a("--json", metavar="FILE", help="write all to it")
    a("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, least in (("sample", 1), ("batch", 1), ("turns", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    timing.check_json(parser, args.json)
    args.width = NARROW[args.table] if args.quick else 1.0
    return args


if __name__ == "__main__":
    timing.start(main, probe, arguments())
