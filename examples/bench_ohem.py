"""What it costs to train on the hardest regions (OHEM, 1604.03540, sec. 4.2): time and memory of a training step of Fast R-CNN.

    python examples/bench_ohem.py --json ohem.json
    python examples/bench_ohem.py --table VGG_CNN_M_1024 --short 600 --turns 5
    python examples/bench_ohem.py --data FOLDER --set train
    python examples/bench_ohem.py --regions 50 --turns 1            # a smoke test

Two images a step, of each --regions windows and its objects; 128 regions in all train, but for `all`. Four forms of the step:

    random      Fast R-CNN's quotas, of which nothing need be known before
    ohem        two networks: all regions forward with nothing kept, then the hardest forward and backward
    zeroing     the same gradient from one network: all regions forward and backward, the weights of those not chosen 0
    all         every region trains

Timed are forward, choice, loss, backward and the optimiser's update; images and regions are prepared before. Every turn takes another
pair of images, on which the forms run one after the other, each first in its turn (equally often if 4 divides --turns); turn 0 compiles and does
not count. Ratios
are of the medians, in brackets the quartiles of the turns' ratios. One net serves all: the rate is 0, so that the weights stay and all
forms see the same losses, and there is no dropout (CHOICE). Before any timing the two forms of OHEM must agree: losses and gradients to
1e-4.
Memory is that of one step in a fresh process for each form, on top of weights, gradients and velocities: traced, what NumPy and Python
asked for at most, whatever the allocator made of it, and resident, by how much the process grew (VmHWM; off Linux ru_maxrss). Resident
reads low by what was freed before and not given back. Ratios of memory count weights, gradients and velocities, too, as the paper's do.
ohem scores in chunks of which nothing is kept: it need not take more than random, while the paper's read-only net holds all regions.
With --backend cuda the memory is that of CuPy's pool (unverified: not yet run on a GPU).
Figures worth quoting need 20 turns and an idle machine.
"""
import argparse
import time

import tinydet                                                      # before numpy: sets how BLAS threads wait
import numpy as np
import timing

from tinydet import data, optim, proposals, scenes, to_numpy
from tinydet.backend import array_module
from tinydet.models import fast_rcnn
from tinydet.models.fast_rcnn import Sampler
from tinydet.ops import ohem, roi_loss

OP = "bench_ohem"
IMAGES, BATCH = 2, 128                                              # the paper's N and B
SCENES = 20
FORMS = ("random", "ohem", "zeroing", "all")
PAIRS = (("ohem", "random"), ("zeroing", "random"), ("all", "random"), ("ohem", "zeroing"))
TOLERANCE, SMALL = 1e-4, 1e-3                                       # SMALL: of the whole net's gradient, by norm
PAPER = {"VGG16": {"random": (0.57, 6.4), "ohem": (1.00, 8.7)},     # s a step, GB: table 2, Titan X, gradients of two passes added up
         "VGG_CNN_M_1024": {"random": (0.13, 2.6), "ohem": (0.22, 3.6)}}        # unverified (ohem notes, sec. 2.5)


# The other form of OHEM

def zeroing(net, x, regions, sampler, rng, chosen=None):
    """fast_rcnn.step of the sampler "ohem" ("mean_of_means") in its wasteful form (sec. 4.2; ohem notes, sec. 2.3): the same gradient.

    All regions go forward once, their caches kept; those losses choose; all go backward, the weights of those not chosen 0.
    chosen: the indices of each image, where they are known. Else takes what fast_rcnn.step takes, and returns loss, count and indices.
    """
    xp, dtype, N = array_module(x), x.dtype, len(x)
    rois = np.concatenate([np.column_stack([np.full(len(r.boxes), float(n)), r.boxes]) for n, r in enumerate(regions)])
    labels, targets = (np.concatenate([getattr(r, name) for r in regions]) for name in ("labels", "targets"))
    rois, labels, targets = (xp.asarray(a) for a in (rois.astype(dtype.name), labels, targets.astype(dtype.name)))
    maps, trunk_cache = net.features(x, True, rng)
    scores, deltas, cache = net.regions(maps, rois, True, rng)
    ends = np.cumsum([len(r.boxes) for r in regions]).tolist()
    parts = [slice(end - len(r.boxes), end) for end, r in zip(ends, regions)]
    if chosen is None:
        losses, batch = roi_loss.each(scores, deltas, labels, targets), max(1, sampler.batch // N)
        chosen = [ohem.select(losses[p], rois[p, 1:], labels[p], batch, sampler.threshold, sampler.per_label) for p in parts]
    weights = xp.zeros(len(rois), dtype)
    for p, c in zip(parts, chosen):
        weights[p][c] = 1 / (N * max(1, len(c)))
    value, dscores, ddeltas = roi_loss.loss(scores, deltas, labels, targets, weights)
    net.parts["trunk"].backward(net.backward_regions(dscores, ddeltas, cache), trunk_cache)
    return {"loss": value, "regions": sum(map(len, chosen))}, chosen


def agree(net, x, regions):
    """Raise ValueError unless both forms of OHEM have the same loss and gradients, to TOLERANCE; returns how far they are apart, a dict.

    Gradients are compared for one choice, that of the two networks: for each parameter the norm of the difference over that of its
    gradient or, where that is larger, SMALL of the whole net's (before batch norm a bias has no gradient but rounding). Losses are
    compared with each form choosing on its own: rounding may exchange regions of nearly equal loss, which the sum does not show.
    """
    sampler = Sampler("ohem", batch=BATCH)

    def run(step, **more):
        for g in net.grads.values():
            g[...] = 0
        values, chosen = step(net, x, regions, sampler, np.random.default_rng(0), **more)
        return float(values["loss"]), chosen, {k: to_numpy(g).astype(np.float64) for k, g in net.grads.items()}

    two, chosen, grads = run(fast_rcnn.step)
    one, own, _ = run(zeroing)
    _, _, zeroed = run(zeroing, chosen=chosen)
    for g in net.grads.values():
        g[...] = 0
    whole = np.sqrt(sum((g ** 2).sum() for g in grads.values()))
    apart = {k: float(np.linalg.norm(g - zeroed[k]) / max(np.linalg.norm(g), SMALL * whole)) for k, g in grads.items()}
    worst = max(apart, key=apart.get)
    if not abs(one - two) <= TOLERANCE * abs(two):
        raise ValueError(f"{OP}: both forms of OHEM must have the same loss, got {two} from two networks and {one} from zeroing")
    if not (whole > 0 and apart[worst] <= TOLERANCE):
        raise ValueError(f"{OP}: both forms of OHEM must have the same gradients to {TOLERANCE:g}, got {apart[worst]:.2g} for {worst}")
    both = sum(len(np.intersect1d(to_numpy(a), to_numpy(b))) for a, b in zip(chosen, own))
    return {"gradients apart": apart[worst], "losses apart": abs(one - two) / abs(two),
            "regions chosen by both": both / sum(map(len, chosen))}


# What a step is given

def source(args):
    """Examples, their class names, and all windows of each."""
    examples, classes = data.read(args.data, args.set) if args.data else (scenes.scenes(SCENES, args.seed), scenes.CLASSES)
    if len(examples) < IMAGES:
        raise ValueError(f"{OP}: there must be at least {IMAGES} images, got {len(examples)}")
    for least in (0.7, 0.8, 0.9):                                   # denser and denser
        found = proposals.covering(examples, least)
        if found["per_image"] >= args.regions:
            windows = proposals.for_examples(found, examples)
            if min(map(len, windows)) >= args.regions:
                return examples, classes, windows
    raise ValueError(f"{OP}: --regions must be at most the windows of every image, {found['per_image']:.0f} on average, got {args.regions}")


class Bench:
    """Net, optimiser, data, and the forms of a step: `sides`, functions of a pair of images and a Generator."""

    def __init__(self, args, put):
        self.args, self.put = args, put
        self.examples, classes, self.windows = source(args)
        std = (60.0 if args.table == "small" else 1.0,) * 3
        spec = fast_rcnn.Spec(tuple(classes), args.table, (args.short,), 2 * args.short, dropout=0.0, std=std)
        self.net = fast_rcnn.FastRCNN(spec, np.random.default_rng(args.seed), pretrained=True).to(put)      # frozen as in the paper
        self.optimizer = optim.SGD(self.net, 0.9, 5e-4, form="caffe")
        self.sides = {**{name: self.side(name) for name in ("random", "ohem", "all")}, "zeroing": self.side("ohem", zeroing)}

    def side(self, name, step=fast_rcnn.step):
        sampler = Sampler(name, batch=BATCH)

        def run(x, regions, rng):
            values, _ = step(self.net, x, regions, sampler, rng)
            self.optimizer.step(0.0)
            self.optimizer.check()                                  # waits for a GPU
            return values["regions"]
        return run

    def pair(self, turn):
        """x and the Regions of the images of a turn."""
        rng, images, regions = np.random.default_rng([self.args.seed, turn]), [], []
        for i in rng.choice(len(self.examples), IMAGES, replace=False):
            windows = rng.choice(self.windows[i], self.args.regions, replace=False)
            image, *rest = fast_rcnn.training_image(self.net.spec, self.examples[i], windows, rng)
            images.append(image)
            regions.append(fast_rcnn.label(self.net.spec, *rest))
        return self.put(fast_rcnn.batch(self.net, images)), regions

    def held(self):
        """MB of weights, gradients and velocities."""
        return sum(a.nbytes for named in (self.net.arrays(), self.net.grads, self.optimizer.state) for a in named.values()) / 2**20


# Memory, in fresh processes

def probe(form, args, put):
    """MB that one step of this form takes: {"traced", "resident"}, on a GPU {"pool"}. Small regions of small images warm up before."""
    bench = Bench(args, put)
    x, regions = bench.pair(1)
    few = [fast_rcnn.Regions(*(v[:20] for v in vars(r).values())) for r in regions]
    bench.sides[form](array_module(x).ascontiguousarray(x[:, :64, :64]), few, np.random.default_rng(0))
    return timing.memory(lambda: bench.sides[form](x, regions, np.random.default_rng(0)), x)


# Measuring and telling

def measure(bench):
    """Seconds of every turn, and the regions that trained, by form."""
    times, counts = {k: [] for k in FORMS}, {k: [] for k in FORMS}
    for turn in range(bench.args.turns + 1):
        x, regions = bench.pair(turn)
        first = turn % len(FORMS)
        for form in FORMS[first:] + FORMS[:first]:
            start = time.perf_counter()
            count = bench.sides[form](x, regions, np.random.default_rng(turn))
            times[form].append(time.perf_counter() - start)
            counts[form].append(count)
    return {k: t[1:] for k, t in times.items()}, {k: float(np.mean(c[1:])) for k, c in counts.items()}


def memory_told(found, held):
    """found: {form: {kind: MB of the step}}; held: MB that are there before. The ratios count both."""
    kinds = list(found[FORMS[0]])
    first = kinds[0]
    return {"MB": found, "held MB": held, "total MB": {form: held + found[form][first] for form in FORMS},
            "ratio": {f"{a} / {b}": {k: (held + found[a][k]) / (held + found[b][k]) for k in kinds} for a, b in PAIRS}}


def spread(times, ratio):
    return f"{times['ratio'][ratio]:.2f} [{times['quartiles'][ratio][0]:.2f}, {times['quartiles'][ratio][1]:.2f}]"


def tell(result, table):
    name = table if table in PAPER else "VGG16"
    paper, memory, times = PAPER[name], result["memory"], result["time"]
    kinds = list(memory["MB"][FORMS[0]])
    print(f"{'':10}{'train':>7}{'ms a step':>11}  {'/ random':20}" + "".join(f"{k + ' MB':>12}{'/ random':>10}" for k in kinds)
          + f"    paper, {name}{' (unverified)' * (name != 'VGG16')}: s, / random, GB, / random")
    for form in FORMS:
        ratio = f"{form} / random" if form != "random" else None
        line = f"{form:10}{result['regions that train'][form]:7.0f}{times['seconds'][form] * 1e3:11.1f}  "
        line += f"{spread(times, ratio) if ratio else '':20}"
        for k in kinds:
            line += f"{memory['MB'][form][k]:12.1f}" + (f"{memory['ratio'][ratio][k]:10.2f}" if ratio else " " * 10)
        if form in paper:
            (seconds, gigabytes), (least, fewest) = paper[form], paper["random"]
            line += f"    {seconds:.2f}, {seconds / least:.2f}, {gigabytes:.1f}, {gigabytes / fewest:.2f}"
        print(line)
    ratio = "ohem / zeroing"
    print(f"{ratio}: time {spread(times, ratio)}, memory " + ", ".join(f"{k} {memory['ratio'][ratio][k]:.2f}" for k in kinds)
          + "; the paper: time below 0.5, similar memory")
    print(f"weights, gradients and velocities, which the ratios of memory count: {memory['held MB']:.1f} MB")


def main(args, put):
    bench = Bench(args, put)
    apart = agree(bench.net, *bench.pair(0))
    print(f"two networks and zeroing agree: gradients to {apart['gradients apart']:.0e}, losses to {apart['losses apart']:.0e}, "
          f"{apart['regions chosen by both']:.1%} of the regions chosen by both", flush=True)
    times, counts = measure(bench)
    held = bench.held()
    del bench                                                       # its memory is the children's
    result = {"settings": {**timing.arguments_told(args), "images": IMAGES, "batch": BATCH, **timing.settings()}, "date": time.strftime("%Y-%m-%d %H:%M"),
              "agreement": apart, "regions that train": counts, "turns": times, "time": timing.told(times, PAIRS),
              "memory": memory_told({form: timing.probe_of(__file__, form, args) for form in FORMS}, held),
              "paper: s a step, GB": PAPER}
    tell(result, args.table)
    return timing.finish(args, result)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--data", metavar="FOLDER", help="a PASCAL VOC, YOLO or COCO folder (default: embedded scenes)")
    a("--set", default="train", help="its image set (%(default)s)")
    a("--table", choices=fast_rcnn.TABLES, default="small", help="the net (%(default)s; the others are the papers', at full size)")
    a("--short", type=int, default=240, metavar="PIXELS", help="short side to which images are scaled (%(default)s; the papers: 600)")
    a("--regions", type=int, default=2000, metavar="R", help="windows an image, drawn from a dense set (%(default)s)")
    a("--turns", type=int, default=20, help="timed turns (%(default)s; figures that are quoted need 20)")
    a("--seed", type=int, default=0, help="of weights, scenes, images and windows (%(default)s)")
    a("--backend", choices=tinydet.backend.BACKENDS, default="numba", help="(%(default)s)")
    a("--json", metavar="FILE", help="write all to it")
    a("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, least in (("turns", 1), ("regions", 1), ("short", 16), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    timing.check_json(parser, args.json)
    return args


if __name__ == "__main__":
    timing.start(main, probe, arguments())
