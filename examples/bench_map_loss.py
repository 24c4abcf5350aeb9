"""Cost of mAP after NMS as a loss (tinydet/ops/map_loss.py, after 1607.03476) and of the exact two-pass step that trains with it.

    python examples/bench_map_loss.py --json map_loss.json
    python examples/bench_map_loss.py --only step --batches 8 32 --regions 1000
    python examples/bench_map_loss.py --images 4 --candidates 8 --classes 2 --batches 2 --turns 1           # a smoke test

    loss    one call, float64, with both estimators (sde, env) and two forms of AP (prec, interp), on a "large" batch of --images with
            --candidates windows each, all of which are candidates of each of --classes, and on a --small one. Beside it the NumPy
            reference, and env with interp, which goes through all TPs at each breakpoint: both on the small batch alone, as they are
            slow. And the brute force that both do without: AP of a class anew (NMS in all images, labels, AP; overlaps known, as
            map-loss notes, sec. 4.6, have it; NumPy, a window of all images at a time) for each score up and down by delta
    step    fast_rcnn_map.step on --batches of embedded scenes with --regions windows each, the trunk training, random weights and
            running averages as they are: two passes, of which the first keeps scores and boxes alone, beside one pass that keeps every
            image's caches, up to batches of --one-pass. Timed are both passes, the loss between them and the clearing of the gradients

The brute force is EXTRAPOLATED: --sample windows of those with a pseudo-gradient are timed, and the seconds multiplied by all candidates
/ sample (2 evaluations of AP a candidate; what is worked out once, the overlaps, left out).
The problem, from --seed: frames of 500 pixels with 1 to 5 objects of 40 to 240 pixels a side, a tenth of them difficult. Each window
of each class lies at one of the image's objects or at one of as many places more and one, drawn at random, every edge moved by N(0, 0.12
sides), 3 deviations at most: such heaps are what NMS thins out. Score: N(0, 1), plus 3 IoU with the nearest object of its class, plus
IoU with the nearest of another. How much NMS keeps, mAP, and how many candidates have a pseudo-gradient are told.
Before any timing all must agree. Loss and dscores to 1e-12: on small problems with the reference, for each estimator and form of AP, and
with the brute force, for sde and each form of AP; on the large and the small batch with the brute force for the sampled windows. Both
forms of the step to 1e-4: the loss, and each parameter's gradient, by norm, over the larger of its norm and a thousandth of the whole
net's. A region without gradient does not go backward in two passes, in one pass all do; with --dropout above 0 all do in both.
The forms run in turn, each first equally often; the first turn compiles and does not count. A ratio is that of the medians, in brackets the
quartiles of the turns' ratios. Memory is that of one call in a fresh process for each form, on top of what it is given: traced, what NumPy
and Python asked for at most, and resident, by how much the process grew (VmHWM; off Linux ru_maxrss). With --backend cuda it is that of
CuPy's pool (unverified: not yet run on a GPU), and reference and brute force stay on the host.
Figures worth quoting need 20 turns and an idle machine.
"""
import argparse
import itertools
import time
from functools import partial

import tinydet                                                      # before numpy: sets how BLAS threads wait
import numpy as np
import timing

from tinydet import proposals, scenes, to_numpy, use
from tinydet.backend import array_module
from tinydet.models import fast_rcnn, fast_rcnn_map
from tinydet.ops import boxes as box_ops, map_loss

OP = "bench_map_loss"
PARTS = ("loss", "step")
NMS, MATCH = 0.3, 0.5
FORMS = tuple(itertools.product(("sde", "env"), ("prec", "interp")))
SLOW = ("env", "interp")
CHECK = (3, 14, 2)                                                  # images, candidates, classes of the problems on which all must agree
LIMIT, TOLERANCE, SMALL = 1e-12, 1e-4, 1e-3                         # of the loss; of a step; SMALL: of the whole net's gradient, by norm
STEPS = ("two passes", "one pass")
DENSITIES = (0.5, 0.7, 0.8, 0.9)                                    # of windows: the IoU that they reach


# The problem, and the forms of the loss

def problem(images, candidates, classes, seed):
    """What map_loss.loss takes, a dict of NumPy arrays; windows image by image, `candidates` each."""
    rng = np.random.default_rng([seed, images, candidates, classes])

    def anywhere(count):
        sides = np.exp(rng.uniform(np.log(40), np.log(240), (count, 2)))
        corner = rng.uniform(0, 1, (count, 2)) * (500 - sides)
        return np.concatenate([corner, corner + sides], 1)

    at = np.repeat(np.arange(images), rng.integers(1, 6, images))
    gt, labels, hard = anywhere(len(at)), rng.integers(0, classes, len(at)), rng.random(len(at)) < 0.1
    hard[0] = False                                                 # some class counts
    boxes, scores = np.empty((images, candidates, classes, 4)), rng.standard_normal((images, candidates, classes))
    for i in range(images):
        mine = at == i
        heaps = np.concatenate([gt[mine], anywhere(mine.sum() + 1)])
        heaps = heaps[rng.integers(0, len(heaps), (candidates, classes))]
        sides = np.tile(heaps[..., 2:] - heaps[..., :2], 2)
        boxes[i] = heaps + 0.12 * sides * rng.standard_normal(heaps.shape).clip(-3, 3)
        for c in range(classes):
            overlap, own = box_ops.iou(boxes[i, :, c].copy(), gt[mine]), labels[mine] == c
            scores[i, :, c] += 3 * (overlap * own).max(1) + (overlap * ~own).max(1)
    return {"scores": scores.reshape(-1, classes), "boxes": boxes.reshape(-1, classes, 4), "images": np.repeat(np.arange(images), candidates),
            "gt_boxes": gt, "gt_labels": labels, "gt_images": at, "gt_difficult": hard}


def ours(given, put, of=map_loss.loss, **options):
    """of(given, ...) as a function without arguments; scores and boxes are moved before."""
    moved = {name: put(given[name]) for name in ("scores", "boxes")}
    return partial(of, **{**given, **moved}, nms=NMS, match=MATCH, most=np.bincount(given["images"]).max().item(), **options)


def reference(given, **options):
    """The same in NumPy."""
    run = ours(given, np.asarray, **options)

    def referred():
        with use("numpy"):
            return run()
    return referred


class Brute:
    """AP of one class for any scores of its candidates, all anew but overlaps and objects (notes, sec. 4.6)."""

    def __init__(self, given, c):
        I = given["images"][-1] + 1
        boxes, mine = given["boxes"][:, c].reshape(I, -1, 4), given["gt_labels"] == c
        self.s, self.line = given["scores"][:, c].reshape(I, -1), np.arange(I)
        self.near = np.array([box_ops.iou(b, b) > NMS for b in boxes])
        self.gt = np.full(self.s.shape, -1)                         # object, -1 none, -2 a difficult one
        for i in range(I):
            objects = np.flatnonzero(mine & (given["gt_images"] == i))
            if len(objects):
                overlap = box_ops.iou(boxes[i], given["gt_boxes"][objects])
                best = objects[overlap.argmax(1)]
                self.gt[i] = np.where(overlap.max(1) < MATCH, -1, np.where(given["gt_difficult"][best], -2, best))
        self.P = int((mine & ~given["gt_difficult"]).sum())

    def average(self, s, ap="prec"):
        gone, kept = (np.zeros(s.shape, bool) for _ in "ab")
        for j in np.argsort(-s, 1, kind="stable").T:                # the next best of every image
            kept[self.line, j] = free = ~gone[self.line, j]
            gone |= self.near[self.line, j] & free[:, None]
        members = np.flatnonzero(kept & (self.gt != -2))
        gt = self.gt.ravel()[members[np.argsort(-s.ravel()[members], kind="stable")]]
        hit = np.zeros(len(gt), bool)
        hit[np.unique(gt, return_index=True)[1]] = True
        places = np.flatnonzero(hit & (gt >= 0))
        precision = np.arange(1, len(places) + 1) / (places + 1)
        return (precision if ap == "prec" else np.maximum.accumulate(precision[::-1])).sum() / self.P

    def at(self, row, v, ap="prec"):
        s = self.s.copy()
        s.ravel()[row] = v
        return self.average(s, ap)

    def slope(self, row, ap="prec"):
        s, delta = self.s.ravel()[row], max(self.s.std(), map_loss.LEAST)
        return (self.at(row, s + delta, ap) - self.at(row, s - delta, ap)) / (2 * delta)


def brutes(given):
    """{class: Brute}, those with objects that count."""
    return {c: Brute(given, c) for c in np.unique(given["gt_labels"][~given["gt_difficult"]]).tolist()}


def brute_force(classes, chosen, ap="prec"):
    """Entries of dscores, by brute force. classes: brutes(); chosen: pairs of a row and a class."""
    return np.array([-classes[c].slope(row, ap) / len(classes) for row, c in chosen])


# Checks of the loss before any timing

def apart(found, expected, what):
    """How far two arrays are apart, at most. Raises ValueError if that is too far."""
    far = float(np.abs(to_numpy(found) - to_numpy(expected)).max(initial=0))
    if not far <= LIMIT:
        raise ValueError(f"{OP}: all forms must agree to {LIMIT:g}, got {far:.2g} between {what}")
    return far


def agree(args, put, draws=3):
    """On small problems: {"brute force": how far it is from ours at most, loss or an entry of dscores, "NumPy": the same}."""
    far = {"brute force": 0.0, "NumPy": 0.0}
    for draw, (estimator, ap) in itertools.product(range(draws), FORMS):
        given, name = problem(*CHECK, args.seed + draw), f"{estimator} {ap}"
        value, d = ours(given, put, estimator=estimator, ap=ap)()
        expected, g = reference(given, estimator=estimator, ap=ap)()
        far["NumPy"] = max(far["NumPy"], apart(value, expected, f"the loss, {name}, and NumPy's"), apart(d, g, f"dscores, {name}, and NumPy's"))
        classes = brutes(given)
        mean = np.mean([b.average(b.s, ap) for b in classes.values()])
        far["brute force"] = max(far["brute force"], apart(value, 1 - mean, f"the loss, {name}, and the brute force's"))
        if estimator == "sde":
            g = np.zeros(d.shape)
            for c in classes:
                g[:, c] = brute_force(classes, [(row, c) for row in range(len(g))], ap)
            far["brute force"] = max(far["brute force"], apart(d, g, f"dscores, {name}, and the brute force's"))
    return far


def looked_at(given, put, args):
    """What a batch is like, a dict, and the windows that the brute force takes, pairs of a row and a class."""
    d = to_numpy(ours(given, put)()[1])
    aps, kept, flags = map(to_numpy, ours(given, put, map_loss.average_precisions)())
    present = np.flatnonzero(~np.isnan(aps))
    count = d[:, present].size
    moving = np.argwhere(d)
    if not len(moving):
        raise ValueError(f"{OP}: some candidate must have a pseudo-gradient, got none of {count}")
    chosen = moving[np.sort(np.random.default_rng(args.seed).choice(len(moving), min(args.sample, len(moving)), replace=False))].tolist()
    far = apart(d[tuple(np.transpose(chosen))], brute_force(brutes(given), chosen), "sampled dscores, sde prec, and the brute force's")
    return {"candidates": count, "objects": int((~given["gt_difficult"]).sum()), "kept": float(kept[:, present].mean()),
            "true positives": int((flags == 1).sum()), "mAP": float(aps[present].mean()), "with a pseudo-gradient": len(moving) / count,
            "sample": len(chosen), "sampled apart": far}, chosen


# The two forms of a step

def one_pass(net, views, objective, seed):
    """fast_rcnn_map.step with the caches of all images kept: as it says there, without a second forward."""
    found, caches = [], []
    for n, v in enumerate(views):
        rng = np.random.default_rng([*seed, n])
        maps, trunk_cache = net.features(v.x, True, rng)
        scores, deltas, cache = net.regions(maps, fast_rcnn.rois_of(maps, 0, v.regions), True, rng)
        found.append((scores, deltas))
        caches.append((trunk_cache, cache))
    scores, deltas = (array_module(maps).concatenate(column) for column in zip(*found))
    values, dscores, ddeltas = fast_rcnn_map.loss(net, scores, deltas, views, objective)
    ends = np.cumsum([len(v.regions.boxes) for v in views]).tolist()
    for v, end, cache in zip(views, ends, caches):
        part = slice(end - len(v.regions.boxes), end)
        net.backward(dscores[part], ddeltas[part], cache)
    return {**values, "rows": len(scores)}


class Steps:
    """The net, the views of the largest batch, and the objective."""

    def __init__(self, args, put, count, short=None, regions=None):
        short, regions = short or args.short, regions or args.regions
        spec = fast_rcnn.Spec(scenes.CLASSES, "small", (short,), 2 * short, dropout=args.dropout, std=(60.0,) * 3)
        self.net = fast_rcnn_map.freeze(fast_rcnn.FastRCNN(spec, np.random.default_rng(args.seed)).to(put), "all")
        self.objective = fast_rcnn_map.Objective(chunk=regions)
        examples = scenes.scenes(count, args.seed)
        for least in DENSITIES:
            windows = proposals.for_examples(proposals.covering(examples, least), examples)
            if min(map(len, windows)) >= regions:
                break
        else:
            raise ValueError(f"{OP}: --regions must be at most the windows of every image, {min(map(len, windows))}, got {regions}")
        self.views = []
        for i, e in enumerate(examples):
            rng = np.random.default_rng([args.seed, i])
            image, *rest = fast_rcnn.training_image(spec, e, windows[i], rng, most=regions)
            x = put(fast_rcnn.batch(self.net, [image]))
            self.views.append(fast_rcnn_map.view(spec, image.shape[:2], *rest, x=x))

    def side(self, form, count):
        """A step on the first `count` images, a function without arguments; the gradients are cleared before."""
        def run():
            for g in self.net.grads.values():
                g[...] = 0
            return {"two passes": fast_rcnn_map.step, "one pass": one_pass}[form](self.net, self.views[:count], self.objective, (0,))
        return run

    def agree(self, count, forms=STEPS):
        """How many regions `count` images have and go backward, and how far both forms are apart, a dict. Raises ValueError if that is too far."""
        values, grads = {}, {}
        for form in forms:
            values[form] = self.side(form, count)()
            grads[form] = {k: to_numpy(g).astype(np.float64) for k, g in self.net.grads.items()}
        told = {"regions": sum(len(v.regions.boxes) for v in self.views[:count]), "backward": {form: v["rows"] for form, v in values.items()}}
        if len(forms) < len(STEPS):
            return told
        two, one = (float(values[form]["loss"]) for form in STEPS)
        whole = np.sqrt(sum((g ** 2).sum() for g in grads["two passes"].values()))
        far = {k: float(np.linalg.norm(g - grads["one pass"][k]) / max(np.linalg.norm(g), SMALL * whole)) for k, g in grads["two passes"].items()}
        worst = max(far, key=far.get)
        if not abs(one - two) <= TOLERANCE * abs(two):
            raise ValueError(f"{OP}: both forms of the step must have the same loss, got {two} from two passes and {one} from one")
        if not (whole > 0 and far[worst] <= TOLERANCE):
            raise ValueError(f"{OP}: both forms of the step must have the same gradients to {TOLERANCE:g}, got {far[worst]:.2g} for {worst}")
        return {**told, "gradients apart": far[worst], "losses apart": abs(one - two) / abs(two)}


# Memory, in fresh processes

def probe(form, args, put):
    """MB of one call, as timing.memory tells it. form: [estimator, ap], or [form of the step, images]. A small call compiles before."""
    if form[0] in STEPS:
        Steps(args, put, 4, 64, 10).side(form[0], 1)()
        steps = Steps(args, put, form[1])
        return timing.memory(steps.side(*form), steps.views[0].x)

    def call(*size):
        return ours(problem(*size, args.seed), put, estimator=form[0], ap=form[1])
    call(*CHECK)()
    run = call(args.images, args.candidates, args.classes)
    return timing.memory(run, run.keywords["scores"])


# The parts: each returns what it adds to the result, {"turns": {row: {form: seconds}}, "time": {row: ...}, ...}

def waiting(put):
    """Until all that was launched is done."""
    xp = array_module(put(np.zeros(1)))
    return xp.cuda.runtime.deviceSynchronize if xp is not np else lambda: None


def loss_part(args, put):
    found = {"agreement": agree(args, put), "batches": {}, "turns": {}, "time": {}}
    print("small problems: " + ", ".join(f"{name} agrees to {far:.0e}" for name, far in found["agreement"].items()), flush=True)
    for row, size in {"large": (args.images, args.candidates, args.classes), "small": args.small}.items():
        given = problem(*size, args.seed)
        batch, chosen = looked_at(given, put, args)
        sides = {f"{estimator} {ap}": ours(given, put, estimator=estimator, ap=ap) for estimator, ap in FORMS
                 if row == "small" or (estimator, ap) != SLOW}
        if row == "small":
            sides["NumPy"] = reference(given)
        sides["brute force"] = partial(brute_force, brutes(given), chosen)
        times = timing.measure(sides, args.turns, waiting(put))
        seconds = {**times, "brute force": [t * batch["candidates"] / batch["sample"] for t in times["brute force"]]}
        told = timing.told(seconds, [(form, "sde prec") for form in sides if form != "sde prec"])
        found["batches"][row], found["turns"][row], found["time"][row] = {"size": list(size), **batch, "extrapolated": ["brute force"]}, times, told
        print("{}: {} images, {} windows each, {} classes: {candidates} candidates, {objects} objects".format(row, *size, **batch))
        print("    NMS keeps {kept:.1%}, of which {true positives} true positives; mAP {mAP:.3f}; {with a pseudo-gradient:.1%} have a "
              "pseudo-gradient".format(**batch))
        tell(told, {})
        print(f"    brute force: EXTRAPOLATED from {2 * batch['sample']} of {2 * batch['candidates']} evaluations; it and NumPy: sde prec")
    found["memory"] = {"loss": {" ".join(form): timing.probe_of(__file__, form, args) for form in FORMS if form != SLOW}}
    for form, MB in found["memory"]["loss"].items():
        print(f"    {form:24}memory " + ", ".join(f"{kind} {v:.1f} MB" for kind, v in MB.items()), flush=True)
    return found


def step_part(args, put):
    found, steps = {"steps": {}, "turns": {}, "time": {}, "memory": {}}, Steps(args, put, max(args.batches))
    for count in args.batches:
        row, forms = f"{count} images", STEPS[:1 + (count <= args.one_pass)]
        found["steps"][row] = steps.agree(count, forms)
        times = timing.measure({form: steps.side(form, count) for form in forms}, args.turns, waiting(put))
        found["turns"][row], found["time"][row] = times, timing.told(times, [(form, STEPS[0]) for form in forms[1:]])
    found["weights and gradients MB"] = sum(a.nbytes for named in (steps.net.arrays(), steps.net.grads) for a in named.values()) / 2**20
    del steps                                                       # its memory is the children's
    for (row, told), of in zip(found["time"].items(), found["steps"].values()):
        used = found["memory"][row] = {form: timing.probe_of(__file__, [form, int(row.split()[0])], args) for form in told["seconds"]}
        print(f"{row}, {of['regions']} regions: go backward " + ", ".join(f"{n} in {form}" for form, n in of["backward"].items())
              + (f"; gradients agree to {of['gradients apart']:.0e}" if "gradients apart" in of else ""))
        tell(told, {form: ", ".join(f"{kind} {v:.1f} MB" for kind, v in MB.items()) for form, MB in used.items()})
    return found


def tell(told, more):
    """more: what else to say of some forms."""
    for form, seconds in told["seconds"].items():
        ratio = f"{form} / {next(iter(told['seconds']))}"
        spread = "{:.3g} [{:.3g}, {:.3g}]".format(told["ratio"][ratio], *told["quartiles"][ratio]) if ratio in told["ratio"] else ""
        print(f"    {form:16}{seconds:12.4f} s  {spread:28}{more.get(form, '')}".rstrip(), flush=True)


def main(args, put):
    result = {"settings": {**timing.arguments_told(args), **timing.settings()}, "date": time.strftime("%Y-%m-%d %H:%M"), "turns": {}, "time": {},
              "memory": {}}
    for part in args.only:
        for key, value in {"loss": loss_part, "step": step_part}[part](args, put).items():
            result[key] = result[key] | value if key in ("turns", "time", "memory") else value
    return timing.finish(args, result)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    a("--images", type=int, default=128, help="of the large batch (%(default)s)")
    a("--candidates", type=int, default=100, help="windows of an image of it (%(default)s)")
    a("--classes", type=int, default=10, help="of it (%(default)s)")
    a("--small", type=int, nargs=3, default=[16, 50, 4], metavar=("I", "K", "C"), help="images, windows and classes of the small batch (16 50 4)")
    a("--sample", type=int, default=4, metavar="WINDOWS", help="that the brute force takes (%(default)s)")
    a("--batches", type=int, nargs="+", default=[8, 32, 128], metavar="IMAGES", help="of step (8 32 128)")
    a("--one-pass", type=int, default=128, metavar="IMAGES", help="largest batch in one pass: its caches must fit into memory (%(default)s)")
    a("--regions", type=int, default=1000, help="windows of an image of step (%(default)s)")
    a("--short", type=int, default=128, metavar="PIXELS", help="short side to which its images are scaled (%(default)s)")
    a("--dropout", type=float, default=0.0, help="of its net (%(default)s)")
    a("--turns", type=int, default=20, help="timed turns (%(default)s; figures that are quoted need 20)")
    a("--seed", type=int, default=0, help="of problems, sample, weights, scenes and windows (%(default)s)")
    a("--backend", choices=tinydet.backend.BACKENDS, default="numba", help="(%(default)s)")
    a("--json", metavar="FILE", help="write all to it")
    a("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, least in (("images", 1), ("candidates", 1), ("classes", 1), ("small", 1), ("sample", 1), ("batches", 1), ("one-pass", 0),
                        ("regions", 1), ("short", 16), ("turns", 1), ("seed", 0)):
        if np.min(getattr(args, name.replace("-", "_"))) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name.replace('-', '_'))}")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout must lie in [0, 1), got {args.dropout}")
    if len(set(args.only)) < len(args.only) or len(set(args.batches)) < len(args.batches):
        parser.error("--only and --batches must name nothing twice")
    timing.check_json(parser, args.json)
    return args


if __name__ == "__main__":
    timing.start(main, probe, arguments())
