"""What sliding the weak net saves (Oquab et al., CVPR 2015; notes, sec. 4): six scales at full size, beside PyTorch and windows cut out.

    python examples/bench_oquab.py --counts             # sides, parameters, multiply-adds alone, beside those of the notes
    python examples/bench_oquab.py --json oquab.json
    python examples/bench_oquab.py --quick --turns 1    # a smoke test: 1/16 of the channels, three scales

Table "6144", 2048 adaptation units, 20 classes, random weights and biases, float32; one frame of 500x500 pixels (smooth noise, less the
mean) at the scales 0.5 to 2.8. Rescaling comes before, for all forms.
    slid                    ours: the net once over each scale
    nchw, channels_last     PyTorch on the CPU, both layouts, with the same weights and layers; left out where it is not installed
    crops                   the loop that sliding replaces: a window of 224 cut out at every cell of the maps, --sample at once in the net
crops is EXTRAPOLATED: of each scale --sample windows are timed, drawn by --seed, cutting included, and the seconds multiplied by all
windows / sample. The forms run in turn, scale by scale, each first equally often; the first turn compiles and does not count. "all" is
the median of the turns' sums over the scales; a ratio is that of the medians, in brackets the quartiles of the turns' ratios.
Before any timing the maps must have the sides of the notes (4.1), and PyTorch's be ours to 1e-4 of the largest value. Crops cannot be: a
crop sees zeros where the slid net sees the pixels around it (notes, 4.1); how far apart they are is told.
Memory is that of all scales in a fresh process for each form, on top of the weights: traced, what NumPy and Python asked for at most (of
PyTorch unknown), and resident, by how much the process grew (VmHWM; off Linux ru_maxrss). Of crops it is that of the sample. With
--backend cuda it is the memory of CuPy's pool, and PyTorch is left out (unverified: not yet run on a GPU).
Figures worth quoting need 20 turns, an idle machine, and both threads (NUMBA_NUM_THREADS, OPENBLAS_NUM_THREADS, --threads).
"""
import argparse
import os
import sys
import time

import tinydet                                                      # before numpy: sets how BLAS threads wait
import numpy as np
import timing

from tinydet import augment, checks, to_numpy
from tinydet.backend import array_module
from tinydet.models import oquab, oquab_weak

OP = "bench_oquab"
TABLE, CLASSES, SIDE, NARROW, LIMIT = "6144", 20, 500, 1 / 16, 1e-4
LAYOUTS = {"nchw": "contiguous_format", "channels_last": "channels_last"}

MAPS = {224: (55, 27, 13, 6, 1), 250: (61, 30, 14, 6, 1), 256: (63, 31, 15, 7, 2), 287: (70, 34, 16, 7, 2), 288: (71, 35, 17, 8, 3),
        350: (86, 42, 20, 9, 4), 500: (124, 61, 30, 14, 9), 700: (174, 86, 42, 20, 15), 1000: (249, 124, 61, 30, 25),
        1024: (255, 127, 63, 31, 26), 1400: (349, 174, 86, 42, 37), 2048: (511, 255, 127, 63, 58)}      # sides of an input's maps, by notes, sec. 4.1
AT = ("conv1", "conv1_pool", "conv2_pool", "conv5_pool", "fc7")     # those that MAPS has
PARAMETERS = {"trunk.conv1": 34_944, "trunk.conv2": 614_656, "trunk.conv3": 885_120, "trunk.conv4": 1_327_488, "trunk.conv5": 884_992,
              "features.fc6": 56_629_248, "features.fc7": 37_754_880, "head.fca": 12_584_960, "head.fcb": 40_980, "trunk": 3_747_200,
              "source net, 4096 units, 1000 classes": 62_378_344, "source net, 6144 units, 1512 classes": 107_422_568,
              "head.fca of 3x3": 113_248_256, "head.fcb of 3x3": 368_660}      # notes, sec. 1, 4.1
WORK = {"trunk.conv1": 0.54, "trunk.conv2": 2.29, "trunk.conv3": 0.80, "trunk.conv4": 1.19, "trunk.conv5": 0.80, "features.fc6": 4.59,
        "features.fc7": 3.06, "head.fca": 1.02}                     # billion multiply-adds at SIDE, notes, sec. 6


def counts():
    """What the tables alone say beside what the notes say, as texts: {what: [ours, notes]}. Raises ValueError if one differs."""
    table, work = oquab.TABLES[TABLE], oquab.multiply_adds(oquab.TABLES[TABLE], CLASSES, "weak", size=(SIDE, SIDE))
    own, wide = (oquab.parameters(table, CLASSES, "weak", kernel) for kernel in (1, 3))
    sources = (sum(oquab.parameters(oquab.TABLES[name], outputs).values()) for name, outputs in (("4096", 1000), ("6144", 1512)))
    ours = [*own.values(), sum(n for name, n in own.items() if name.startswith("trunk.")), *sources, wide["head.fca"], wide["head.fcb"]]
    found = {f"sides at {side}: {', '.join(AT)}": ["/".join(str(n) for n in row) for row in (map(dict(oquab.sides(table, side)).get, AT), notes)]
             for side, notes in MAPS.items()}
    found |= {f"parameters of {what}": [f"{n:,}", f"{notes:,}"] for (what, notes), n in zip(PARAMETERS.items(), ours, strict=True)}
    found |= {f"multiply-adds at {SIDE} of {name}": [f"{work[name] / 1e9:.2f} G", f"{notes:.2f} G"] for name, notes in WORK.items()}
    found[f"multiply-adds at {SIDE} of all"] = [f"{sum(work.values()) / 1e9:.1f} G", "14.3 G"]
    if wrong := [f"{what}: {n}, not {notes}" for what, (n, notes) in found.items() if n != notes]:
        raise ValueError(f"{OP}: all must be as in the notes, got {'; '.join(wrong)}")
    return found


def make(args, put, width, dtype="float32"):
    """The net, with biases of N(0, 1), and {scale: (1, H, W, 3)}: a frame of smooth noise at every scale."""
    rng = np.random.default_rng(args.seed)                          # std: not divided by, as in the papers, so that LRN matters
    net = oquab.Oquab(oquab.Spec(tuple(map(str, range(CLASSES))), TABLE, "weak", width, std=1.0), rng, dtype)
    for name, a in net.params.items():
        if name.endswith(".b"):
            a[...] = rng.standard_normal(len(a))
    image, _ = augment.resize(rng.integers(0, 256, (20, 20, 3), np.uint8), np.zeros((0, 4)), SIDE, SIDE)
    x = put(oquab_weak.frame(net, image, SIDE)[0][None])
    return net.to(put), {f"{scale:g}": oquab_weak.rescaled(x, scale, net.table.window) for scale in oquab_weak.SCALES[:3 if args.quick else 6]}


def torch_nets(net, args, layouts=LAYOUTS):
    """PyTorch's net with copies of the weights: {layout: of}, of(x) a function without arguments that gives net(x); {} where it cannot."""
    try:
        import torch                                                # after tinydet, as in a program that uses both
    except ImportError:
        torch = None
    if torch is None or array_module(net.params["head.fcb.w"]) is not np:
        print("PyTorch is left out: it " + ("would run on the CPU" if torch else "is not installed (pip install torch)"))
        return {}
    torch.set_num_threads(args.threads)

    def build(layout):
        nn, parts = torch.nn, []
        for r in oquab.rows(net.table, CLASSES, "weak", width=net.spec.width):
            top, bottom, left, right = checks.padding(OP, r.pad)
            even = top == bottom == left == right
            conv = nn.utils.skip_init(nn.Conv2d, r.Cin, r.Cout, r.size, r.stride, top if even else 0)
            conv.weight.data = torch.from_numpy(np.array(net.params[f"{r.name}.w"].transpose(3, 2, 0, 1), order="C"))
            conv.bias.data = torch.from_numpy(net.params[f"{r.name}.b"].copy())
            parts += [conv] if even else [nn.ZeroPad2d((left, right, top, bottom)), conv]
            parts += [nn.ReLU(inplace=True)] * r.relu + [nn.LocalResponseNorm(5, 1e-4, 0.75, net.spec.lrn_k)] * r.norm
            parts += [nn.MaxPool2d(*r.pool)] if r.pool else []      # floor mode; its LRN divides alpha by 5, as ours
        model = nn.Sequential(*parts).to(memory_format=layout)

        def of(x):
            t = torch.from_numpy(x.transpose(0, 3, 1, 2)).contiguous(memory_format=layout)
            return torch.inference_mode()(lambda: model(t).permute(0, 2, 3, 1).numpy())
        return of
    return {layout: build(getattr(torch, LAYOUTS[layout])) for layout in layouts}


def draw(net, x, args):
    """Rows and columns of the map's cells that are sampled, (2, R)."""
    n = oquab.map_side(net.table, x.shape[1])
    return np.stack(np.divmod(np.sort(np.random.default_rng(args.seed).choice(n * n, min(args.sample, n * n), replace=False)), n))


def crops(net, x, cells):
    """The scores (R, K) of the windows of these cells, cut out and run at once."""
    side, corners = net.table.window, (net.table.step * cells.T).tolist()
    return net(array_module(x).stack([x[0, r:r + side, c:c + side] for r, c in corners]))[:, 0, 0]


def forms(net, x, args, models):
    """{form: function without arguments}, at one scale. models: torch_nets."""
    cells = draw(net, x, args)
    return {"slid": lambda: net(x), **{layout: of(x) for layout, of in models.items()}, "crops": lambda: crops(net, x, cells)}


def agree(net, x, args, models):
    """How far each form is from the slid net's map, over its largest value: {form: float}. Raises ValueError for what must not differ."""
    found = {form: to_numpy(run()) for form, run in forms(net, x, args, models).items()}
    F, side, (rows, columns) = found.pop("slid"), MAPS[x.shape[1]][-1], draw(net, x, args)
    if F.shape != (1, side, side, CLASSES):
        raise ValueError(f"{OP}: an input of {x.shape[1]} must give a map of {side}x{side} (notes, sec. 4.1), got {F.shape}")
    apart = {form: float(np.abs(y - (F[0, rows, columns] if form == "crops" else F)).max() / np.abs(F).max()) for form, y in found.items()}
    if not all(apart[form] <= LIMIT for form in models):
        raise ValueError(f"{OP}: PyTorch's maps must be ours to {LIMIT:g} of the largest value, got {apart}")
    return apart


def probe(form, args, put):
    """MB of this form at all scales, as timing.memory tells it. A narrow net runs before: it compiles."""
    def build(width):
        net, xs = make(args, put, width)
        models = torch_nets(net, args, (form,)) if form in LAYOUTS else {}
        sides = [forms(net, x, args, models)[form] for x in xs.values()]      # PyTorch's do not hold our net
        return (lambda: [run() for run in sides]), xs["1"]
    build(NARROW)[0]()
    return {kind: MB for kind, MB in timing.memory(*build(args.width)).items() if kind != "traced" or form not in LAYOUTS}


def tell(result):
    scales, times, used = result["scales"], result["time"], result["memory"]

    def line(title, values):
        print(f"{title:46}" + "".join(f"{v:>20}" for v in values))
    line(f"{'scale':>5}{'input':>7}{'map':>5}{'notes':>7}{'windows':>9}{'G mult-adds':>13}", [f"{form} s" for form in used["MB"]])
    for name, row in {**scales, "all": {k: sum(row[k] for row in scales.values()) for k in ("windows", "sample", "multiply-adds")}}.items():
        sides = f"{row['input']:7}{row['map']:5}{MAPS[row['input']][-1]:7}" if name in scales else " " * 19
        line(f"{name:>5}{sides}{row['windows']:9}{row['multiply-adds'] / 1e9:13.2f}", [f"{v:.3f}" for v in times[name]["seconds"].values()])
    both = zip(times["all"]["ratio"].values(), times["all"]["quartiles"].values())
    line("  all over slid", ["", *("{:.2f} [{:.2f}, {:.2f}]".format(ratio, *quartiles) for ratio, quartiles in both)])
    for kind in used["MB"]["slid"]:
        line(f"  MB {kind}, beside {used['weights MB']:.1f} of weights", [f"{MB[kind]:.1f}" if kind in MB else "-" for MB in used["MB"].values()])
    print(f"crops: {row['windows']} windows" + f", EXTRAPOLATED from {row['sample']}" * (row["sample"] < row["windows"]))


def main(args, put):
    counted = counts()
    for what, both in counted.items() if args.counts else ():
        print("{:62}{:>19}{:>19}".format(what, *both))
    print(f"{len(counted)} sides, parameter counts and multiply-adds are those of the notes", flush=True)
    if args.counts:
        return timing.finish(args, {"counts": counted})
    net, xs = make(args, put, args.width)
    models, scales = torch_nets(net, args), {}
    for scale, x in xs.items():
        work = sum(oquab.multiply_adds(net.table, CLASSES, "weak", width=args.width, size=x.shape[1:3]).values())
        side = oquab.map_side(net.table, x.shape[1])
        scales[scale] = {"input": x.shape[1], "map": side, "windows": side * side, "sample": min(args.sample, side * side), "multiply-adds": work,
                         "apart": agree(net, x, args, models)}
    print("apart from slid, over the largest value: " + ", ".join(f"{form} {max(row['apart'][form] for row in scales.values()):.1e}"
          for form in (*models, "crops")) + " (a crop sees zeros where the slid net sees pixels)", flush=True)
    wait = array_module(x).cuda.runtime.deviceSynchronize if array_module(x) is not np else lambda: None
    turns = {scale: timing.measure(forms(net, x, args, models), args.turns, wait) for scale, x in xs.items()}
    seconds = {scale: {**turns[scale], "crops": [t * row["windows"] / row["sample"] for t in turns[scale]["crops"]]} for scale, row in scales.items()}
    seconds["all"] = {form: np.sum([each[form] for each in seconds.values()], 0).tolist() for form in ("slid", *models, "crops")}
    held = sum(a.nbytes for a in net.arrays().values()) / 2**20
    settings = {**timing.arguments_told(args), **timing.settings(), "torch": sys.modules["torch"].__version__ if models else None}
    del net, xs, x, models                                          # their memory is the children's
    times = {scale: timing.told(each, [(form, "slid") for form in each if form != "slid"]) for scale, each in seconds.items()}
    result = {"settings": settings, "date": time.strftime("%Y-%m-%d %H:%M"), "counts": counted, "scales": scales, "turns": turns, "time": times,
              "memory": {"weights MB": held, "MB": {form: timing.probe_of(__file__, form, args) for form in seconds["all"]}}}
    tell(result)
    return timing.finish(args, result)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--counts", action="store_true", help="sides and counts alone")
    a("--sample", type=int, default=8, metavar="WINDOWS", help="windows that are cut out of each scale, at once (%(default)s)")
    a("--quick", action="store_true", help="1/16 of the channels, three scales")
    a("--turns", type=int, default=20, help="timed turns (%(default)s; figures that are quoted need 20)")
    a("--seed", type=int, default=0, help="of weights, photograph and sample (%(default)s)")
    a("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of Numba, at most NUMBA_NUM_THREADS, and PyTorch (%(default)s)")
    a("--backend", choices=tinydet.backend.BACKENDS, default="numba", help="(%(default)s)")
    a("--json", metavar="FILE", help="write all to it")
    a("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, least in (("sample", 1), ("turns", 1), ("seed", 0), ("threads", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    timing.check_json(parser, args.json)
    args.width = NARROW if args.quick else 1.0
    return args


if __name__ == "__main__":
    timing.start(main, probe, arguments())
