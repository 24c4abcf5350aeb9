import dataclasses
import functools
import math

import numba
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fake_cupy
from conftest import BACKENDS, RUNNING
from tinydet import emulate, to_numpy, use
from tinydet.ops import map_loss
from tinydet.ops.nms import nms

backends = pytest.mark.parametrize("backend", BACKENDS)
needs_emulator = pytest.mark.skipif("emulated" not in RUNNING, reason="needs g++")
MODES = ("prec", "interp", "11pt")
ESTIMATORS = ("sde", "env")


@dataclasses.dataclass
class Case:
    scores: np.ndarray
    boxes: np.ndarray
    images: np.ndarray
    gt_boxes: np.ndarray
    gt_labels: np.ndarray
    gt_images: np.ndarray
    gt_difficult: np.ndarray

    def but(self, **change):
        return dataclasses.replace(self, **change)


def arguments(case, put):
    return put(case.scores), put(case.boxes), case.images, case.gt_boxes, case.gt_labels, case.gt_images, case.gt_difficult


def run(backend, case, **options):
    """Loss and dscores, on the host."""
    with use(backend) as put:
        value, d = map_loss.loss(*arguments(case, put), **options)
    assert type(value) is float or backend == "cuda" and value.shape == ()
    assert d.dtype == case.scores.dtype and d.shape == case.scores.shape
    return float(to_numpy(value)), to_numpy(d)


def precisions(backend, case, **options):
    with use(backend) as put:
        return tuple(map(to_numpy, map_loss.average_precisions(*arguments(case, put), **options)))


# Brute force (notes, sec. 4.6): everything anew for each score, pair by pair, in plain Python

def overlap(a, b, one):
    w, h = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k]) + one) for k in (0, 1))
    sides = [max(0.0, box[k + 2] - box[k] + one) for box in (a, b) for k in (0, 1)]
    return w * h, sides[0] * sides[1] + sides[2] * sides[3] - w * h


def average(hits, P, ap):
    """AP of true and false detections, best first."""
    points = [(k, k / (r + 1)) for r, hit in enumerate(hits) if hit for k in [sum(hits[:r + 1])]]
    if ap == "prec":
        return sum(p for _, p in points) / P
    if ap == "interp":
        return sum(max(p for l, p in points if l >= k) for k, _ in points) / P
    return sum(max([p for k, p in points if 10 * k >= t * P], default=0) for t in range(11)) / 11


class Brute:
    """One class of a case: the frozen candidates, and what follows from any scores of theirs."""

    def __init__(self, case, c, nms=0.3, match=0.5, most=100, ap="prec", plus_one=False):
        self.s = dict(enumerate(case.scores[:, c].astype(float).tolist()))
        boxes = (case.boxes if case.boxes.ndim == 2 else case.boxes[:, c]).tolist()
        self.image, self.ap_kind = case.images.tolist(), ap
        objects = [k for k in range(len(case.gt_labels)) if case.gt_labels[k] == c]
        self.P = sum(not case.gt_difficult[k] for k in objects)
        self.rows = []
        for image in set(self.image):
            mine = [i for i in self.s if self.image[i] == image]
            self.rows += sorted(mine, key=lambda i: (-self.s[i], i))[:most]
        self.near = {i: set() for i in self.rows}
        for i in self.rows:
            for j in self.rows:
                inter, union = overlap(boxes[i], boxes[j], plus_one)
                if i != j and self.image[i] == self.image[j] and union > 0 and inter > nms * union:
                    self.near[i].add(j)
        self.gt = {}
        for i in self.rows:
            best, self.gt[i] = -1.0, -1
            for k in objects:
                if case.gt_images[k] == self.image[i]:
                    inter, union = overlap(boxes[i], case.gt_boxes[k].tolist(), plus_one)
                    iou = inter / union if union > 0 else 0.0
                    if iou > best:
                        best, self.gt[i] = iou, (-2 if case.gt_difficult[k] else k) if iou >= match else -1

    def detections(self, s):
        """Kept windows, best first, with 1, 0 or -1."""
        order, kept, taken, found = sorted(self.rows, key=lambda i: (-s[i], i)), set(), set(), []
        for i in order:
            if not self.near[i] & kept:
                kept.add(i)
                g = self.gt[i]
                found.append((i, -1 if g == -2 else int(g >= 0 and g not in taken)))
                taken.add(g)
        return found

    def ap(self, s):
        return average([hit == 1 for _, hit in self.detections(s) if hit >= 0], self.P, self.ap_kind)

    def at(self, i, v):
        return self.ap({**self.s, i: v})

    def sde(self, i, delta):
        return (self.at(i, self.s[i] + delta) - self.at(i, self.s[i] - delta)) / (2 * delta)

    def profile(self, i):
        """Distinct other scores, and f_i at the middle of each interval between them and beyond both ends."""
        b = sorted({self.s[j] for j in self.rows if j != i})
        points = [self.s[i]] if not b else [b[0] - 1, *((x + y) / 2 for x, y in zip(b, b[1:])), b[-1] + 1]
        return b, [self.at(i, v) for v in points]

    def lines(self, i, reach, least):
        """Slopes of U+, L+, U-, L-."""
        (b, values), s, now, found = self.profile(i), self.s[i], self.at(i, self.s[i]), []
        for side in (1, -1):
            slopes = [0.0]
            for k, x in enumerate(b):
                if 0 <= side * (x - s) <= reach:
                    slopes.append(side * (values[k + (side > 0)] - now) / max(side * (x - s), least))
            found += [max(slopes), min(slopes)]
        return found

    def env(self, i, reach, least):
        return sum(self.lines(i, reach, least)) / 2

    def widths(self, delta=None, kappa=1.0, reach=None, least=None):
        sigma = np.std([self.s[i] for i in self.rows]) if self.rows else 0
        return [max(f * sigma, 1e-3) if w is None else w for w, f in ((delta, kappa), (reach, 3), (least, 0.2))]


def brute_loss(case, estimator="sde", delta=None, kappa=1.0, reach=None, least=None, log=False, eps=1e-3, **options):
    classes = {c: Brute(case, c, **options) for c in range(case.scores.shape[1])}
    classes = {c: b for c, b in classes.items() if b.P}
    d = np.zeros(case.scores.shape)
    if not classes:
        return 0.0, d
    mean = sum(b.ap(b.s) for b in classes.values()) / len(classes)
    for c, b in classes.items():
        widths = b.widths(delta, kappa, reach, least)
        for i in b.rows:
            d[i, c] = -(b.sde(i, widths[0]) if estimator == "sde" else b.env(i, *widths[1:])) / len(classes)
    return (-math.log(mean + eps), d / (mean + eps)) if log else (1 - mean, d)


def draw(seed, n=12, C=2, images=3, objects=4):
    """A random case of the notes (sec. 8): 60 % of the windows jittered objects, 20 % of those difficult; a third of the cases has ties."""
    rng = np.random.default_rng(seed)
    n, I, G = int(rng.integers(1, n + 1)), int(rng.integers(1, images + 1)), int(rng.integers(1, objects + 1))

    def some(count):
        corner = rng.uniform(0, 20, (count, 2))
        return np.concatenate([corner, corner + rng.uniform(6, 16, (count, 2))], 1)
    gt, at = some(G), rng.integers(0, I, G)
    k = rng.integers(0, G, n)
    near = rng.random(n) < 0.6
    boxes, image = np.where(near[:, None], gt[k] + rng.normal(0, 1.5, (n, 4)), some(n)), np.where(near, at[k], rng.integers(0, I, n))
    scores = rng.normal(0, 1, (n, C))
    if seed % 3 == 0:
        scores = np.round(scores * 2) / 2
    if seed % 2:
        boxes = np.where(rng.random((n, C, 1)) < 0.7, boxes[:, None], some(n * C).reshape(n, C, 4))
    return Case(scores, boxes, 5 * image - 3, gt, rng.integers(0, C, G), 5 * at - 3, rng.random(G) < 0.2)


def options_of(seed):
    """The options that go with a random case: all modes, both estimators, both forms, steps that fall onto tied scores, few candidates."""
    rng = np.random.default_rng([seed, 1])
    return dict(ap=MODES[seed % 3 if seed % 2 else 0], estimator=ESTIMATORS[seed // 2 % 2], log=bool(seed % 5 == 0),
                delta=rng.choice([None, 0.25, 0.5, 1.0, 3.0]), kappa=float(rng.choice([0.5, 1])),
                reach=rng.choice([None, 0.5, 1.5, math.inf]), least=rng.choice([None, 0.01, 0.5]), most=int(rng.choice([2, 4, 100])),
                plus_one=bool(seed % 7 == 0), nms=float(rng.choice([0.1, 0.3, 0.5])), match=float(rng.choice([0.3, 0.5])))


# Definition

def agrees_with_brute_force(backend, seed):
    case, options = draw(seed), options_of(seed)
    value, d = run(backend, case, **options)
    expected, g = brute_loss(case, **options)
    assert abs(value - expected) < 1e-12, seed
    assert_allclose(d, g, rtol=1e-12, atol=1e-12, err_msg=str(seed))
    options = {k: options[k] for k in ("ap", "most", "plus_one", "nms", "match")}
    aps, kept, flags = precisions(backend, case, **options)
    for c in range(case.scores.shape[1]):
        b = Brute(case, c, **options)
        found = dict(b.detections(b.s)) if b.P else {}
        assert_array_equal(kept[:, c], [i in found for i in range(len(kept))])
        assert_array_equal(flags[:, c], [found.get(i, -1) for i in range(len(kept))])
        assert_allclose(aps[c], b.ap(b.s) if b.P else np.nan, atol=1e-12)


@backends
@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_cases_are_the_brute_force(backend, first):
    for seed in range(first, first + 20):
        agrees_with_brute_force(backend, seed)


@pytest.mark.slow
@backends
def test_thousands_of_random_cases_are_the_brute_force(backend):
    for seed in range(1000, 3500):
        agrees_with_brute_force(backend, seed)


@pytest.mark.parametrize("seed", range(40))
def test_profiles_and_the_two_state_theorem(seed):
    """Notes 4.1: whatever the score of a window, at most two sets of others are kept, and it is itself kept from one score on."""
    case, options = draw(seed), {"ap": MODES[seed % 3], "most": (3, 100)[seed % 2]}
    for c in range(2):
        b = Brute(case, c, **options)
        for i in b.rows if b.P else []:
            scores, values = b.profile(i)
            points, found, blocker, *_ = map_loss.profile(*arguments(case, np.asarray), window=i, label=c, **options)
            assert (np.diff(points) > 0).all() and (np.diff(found) != 0).all() and len(found) == len(points) + 1
            between = [v - 1e-9 for v in scores] + [scores[-1] + 1 if scores else 0]
            assert_allclose(found[np.searchsorted(points, between)], values, rtol=0, atol=1e-12)
            kept, others = [], set()
            for v in sorted(between + scores):                      # in between, and tied with each of the others
                now = {j for j, _ in b.detections({**b.s, i: v})}
                kept.append(i in now)
                others.add(frozenset(now - {i}))
            assert len(others) <= 2 and kept == sorted(kept)
            assert kept[-1] and (math.isnan(blocker) == kept[0])
            if not kept[0]:
                assert [i in dict(b.detections({**b.s, i: np.nextafter(blocker, to)})) for to in (-9, 9)] == [False, True]


def test_a_profile_has_the_slopes_of_both_estimators():
    """Of every candidate, on tied scores, too: those of loss() times the classes that count, line by line those of the definition."""
    compared, ties, least_width, unkept = np.zeros(2, int), 0, 0, 0
    for seed in range(42):
        case, options = draw(seed, 9), {k: v for k, v in options_of(seed).items() if k not in ("estimator", "log")}
        if seed % 4 == 0:
            options.update(delta=None, reach=None, least=None)
        widths, shared = ({k: v for k, v in options.items() if (k in ("delta", "kappa", "reach", "least")) == wide} for wide in (True, False))
        slopes = [-run("numpy", case, estimator=name, **options)[1] for name in ESTIMATORS]
        count = len({*case.gt_labels[~case.gt_difficult].tolist()})
        for c in range(2):
            b = Brute(case, c, **shared)
            for i in b.rows if b.P else []:
                p = map_loss.profile(*arguments(case, np.asarray), window=i, label=c, **options)
                for found, slope in zip((p.step, sum(p.lines) / 2), slopes):
                    assert abs(found - slope[i, c] * count) < 1e-12, (seed, c, i)
                assert_allclose([p.delta, p.reach, p.least], b.widths(**widths), rtol=1e-12)
                assert_allclose(p.lines, b.lines(i, *b.widths(**widths)[1:]), rtol=1e-12, atol=1e-12)
                assert p.score == b.s[i] and abs(p.now - b.at(i, b.s[i])) < 1e-12
                assert all(type(v) is float for v in (p.score, p.now, p.delta, p.reach, p.least, p.step, *p.lines))
                ends = [b.s[i] - 1e3, *(() if math.isnan(p.blocker) else [np.nextafter(p.blocker, to) for to in (-9, 9)])]
                assert [i in dict(b.detections({**b.s, i: v})) for v in ends] == ([True] if math.isnan(p.blocker) else [False, False, True])
                assert math.isnan(p.blocker) or p.blocker in {b.s[j] for j in b.near[i]}
                compared += abs(p.step) > 1e-6, abs(sum(p.lines)) > 1e-6
                ties += b.s[i] in [b.s[j] for j in b.rows if j != i]
                least_width += p.delta == 1e-3
                unkept += b.s[i] < p.blocker
    assert (compared > 60).all() and ties > 15 and least_width > 0 and unkept > 10


# Fixtures (notes, sec. 8)

BOX = [0.0, 0, 10, 10]


def one_class(windows, objects, difficult=()):
    """windows (image, box, score), objects (image, box) of one class."""
    images, boxes, scores = zip(*windows)
    at, gt = zip(*objects)
    return Case(np.array(scores)[:, None], np.array(boxes, float), np.array(images), np.array(gt, float), np.zeros(len(gt), int), np.array(at),
                np.array([k in difficult for k in range(len(gt))]))


def ranking(scores, hits):
    return one_class([(k, BOX, s) for k, s in enumerate(scores)], [(k, BOX) for k in hits])


A = ranking([2.0, 1.5, 1.0, 0.4, -0.3], [0, 2])
B = one_class([(0, [4, 0, 14, 10], 1.0), (0, BOX, 0.6), (0, [8, 0, 18, 10], 0.5), (1, [50, 50, 60, 60], 0.8), (1, BOX, 0.2)],
              [(0, BOX), (1, BOX)])
C = one_class([(0, [0, 0, 6.5, 10], 0.9), (0, [5.5, 0, 12, 10], 0.7), (0, [30, 0, 40, 10], 0.8), (1, [50, 50, 60, 60], 0.85), (1, BOX, 0.3),
               (0, [31, 0, 41, 10], 0.95)], [(0, [0, 0, 12, 10]), (0, [30, 0, 40, 10]), (1, BOX)], difficult=[1])
T = ranking([1.0, 1.0, 0.0], [1])
GRADIENTS = [
    (A, 0.83333333, dict(delta=0.75), [0.16666667, -0.27777778, 0.16666667, -0.05555556, 0]),
    (A, 0.83333333, dict(delta=0.25), [0] * 5),
    (A, 0.83333333, dict(estimator="env", reach=2, least=1e-3), [0.25, -0.41666667, 0.23611111, -0.10416667, -0.03205128]),
    (B, 0.16666667, dict(delta=0.5), [-0.33333333, 0.58333333, 0, 0, 0]),
    (B, 0.16666667, dict(delta=0.3), [0] * 5),
    (B, 0.16666667, dict(estimator="env", reach=1, least=1e-3), [-0.41666667, 0.72916667, 0.25, -0.06944444, 0.20833333]),
    (C, 0.75, dict(delta=0.25), [0.5, 0, 0, -0.5, 0, 0]),
    (C, 0.75, dict(estimator="env", reach=0.5, least=1e-3), [2.5, -0.10416667, 0, -2.5, 0.10416667, 0]),
    (T, 0.5, dict(delta=0.5), [-0.5, 0.5, 0]),
    (T, 0.5, dict(estimator="env", reach=2, least=0.01), [-25, 25.08333333, -0.08333333]),
]


@backends
@pytest.mark.parametrize("plus_one", [False, True])
def test_fixtures_A_B_C_T(backend, plus_one):
    for case, ap, options, g in GRADIENTS:
        value, d = run(backend, case, plus_one=plus_one, **options)
        assert_allclose(1 - value, ap, atol=5e-9)
        assert_allclose(-d[:, 0], g, rtol=1e-8, atol=5e-9)
    ap, kept, flags = precisions(backend, C, plus_one=plus_one)
    assert kept[:, 0].tolist() == [True, True, False, True, True, True] and flags[:, 0].tolist() == [1, 0, -1, 0, 1, -1]
    assert precisions(backend, B)[2][:, 0].tolist() == [0, -1, -1, 0, 1]
    turned = run(backend, B.but(**{k: getattr(B, k)[::-1].copy() for k in ("scores", "boxes", "images")}), delta=0.5)[1][::-1, 0]
    assert_allclose(turned[2], -0.25)                               # the other index wins the tie that w2 meets at its raised score


def steps(text):
    """breakpoints and values of "-inf:.45 -.3:.5": each value from the point before it on."""
    points, values = zip(*(map(float, part.split(":")) for part in text.split()))
    return points[1:], values


@pytest.mark.parametrize("case, profiles", [
    (A, ["-inf:.45 -.3:.5 .4:.58333333 1.5:.83333333", "-inf:1 1:.83333333 2:.58333333", "-inf:.7 -.3:.75 .4:.83333333 1.5:1",
         "-inf:.83333333 1:.75 2:.5", "-inf:.83333333 1:.75 2:.5"]),
    (B, ["-inf:.5 .6:.16666667", "-inf:.16666667 1:.75", "-inf:.16666667 1:.41666667", "-inf:.25 .2:.16666667",
         "-inf:.16666667 .8:.25 1:.5"]),
    (C, ["-inf:.58333333 .3:.5 .85:.75", "-inf:.83333333 .3:.75", "-inf:.75", "-inf:.83333333 .3:.75 .9:.5", "-inf:.75 .7:.83333333 .85:1",
         "-inf:.75"])])
def test_profiles_of_the_fixtures(case, profiles):
    blockers = {id(A): [np.nan] * 5, id(B): [0.6, 1, 1, np.nan, np.nan], id(C): [np.nan, np.nan, 0.95, np.nan, np.nan, 0.8]}[id(case)]
    for i, (expected, blocker) in enumerate(zip(profiles, blockers, strict=True)):
        points, values, found, *_ = map_loss.profile(*arguments(case, np.asarray), window=i, label=0)
        assert_allclose(points, steps(expected)[0], atol=1e-15)
        assert_allclose(values, steps(expected)[1], atol=5e-9)
        assert_array_equal(found, blocker)


@pytest.mark.parametrize("case, delta, up, down", [
    (A, 0.75, [0, -0.33333333, 0.22222222, -0.11111111, 0], [0.33333333, -0.22222222, 0.11111111, 0, 0]),
    (B, 0.5, [0, 1.16666667], [-0.66666667, 0])])
def test_one_sided_parts(case, delta, up, down):
    """Notes 3.1: g is the mean of the two, read here off the profile."""
    for i, (plus, minus) in enumerate(zip(up, down)):
        points, values, *_ = map_loss.profile(*arguments(case, np.asarray), window=i, label=0)
        s = case.scores[i, 0]
        below, now, above = (values[np.searchsorted(points, v)] for v in (s - delta, s, s + delta))
        assert_allclose([(above - now) / delta, (now - below) / delta], [plus, minus], atol=5e-9)


@backends
def test_fixture_Q_of_the_three_averages(backend):
    case = ranking([3.0, 2, 1], [1, 2])
    assert_allclose([precisions(backend, case, ap=ap)[0][0] for ap in MODES], [0.58333333, 0.66666667, 0.66666667], atol=5e-9)
    assert_allclose([precisions(backend, A, ap=ap)[0][0] for ap in MODES], [0.83333333, 0.83333333, 0.84848485], atol=5e-9)
    tenth = ranking(-np.arange(10.0), range(10))                    # recall 3/10, 6/10, 7/10 reach their points
    for hits in (3, 6, 7):
        some = tenth.but(images=np.where(np.arange(10) < hits, np.arange(10), np.arange(10) + 50))
        assert_allclose(precisions(backend, some, ap="11pt")[0], (hits + 1) / 11)


@backends
def test_fixture_R_of_a_false_positive_that_helps(backend):
    def case(score):
        return one_class([(0, [3, 0, 11, 10], score), (0, [0, 0, 8, 10], 0.9), (0, [6, 0, 14, 10], 0.8), (1, BOX, 0.5)], [(1, BOX)])
    assert_allclose(precisions(backend, case(0.1))[0], 1 / 3)
    assert_allclose(precisions(backend, case(0.95))[0], 1 / 2)
    assert run(backend, case(0.1), delta=0.85)[1][0, 0] < 0         # a rising score of a false positive lowers the loss


def many(cases):
    """One case of several classes from cases of one class."""
    n = [len(c.scores) for c in cases]
    start, at = np.cumsum([0, *n]), np.concatenate([100 * k + c.images for k, c in enumerate(cases)])
    scores = np.full((sum(n), len(cases)), -50.0)
    for k, c in enumerate(cases):
        scores[start[k]:start[k + 1], k] = c.scores[:, 0]
    objects = np.concatenate([100 * k + c.gt_images for k, c in enumerate(cases)])
    return Case(scores, np.concatenate([c.boxes for c in cases]), at, np.concatenate([c.gt_boxes for c in cases]),
                np.repeat(np.arange(len(cases)), [len(c.gt_boxes) for c in cases]), objects,
                np.concatenate([c.gt_difficult for c in cases]))


@backends
def test_fixture_M_of_several_classes(backend):
    absent = one_class([(0, BOX, 0.5)], [(0, BOX)], difficult=[0])  # class c has a difficult object alone
    case = many([A, ranking([1.0, 0.5, 0], [1]), absent])
    value, d = run(backend, case, delta=0.75)
    a, b = [-0.08333333, 0.13888889, -0.08333333, 0.02777778, 0], [0.16666667, -0.22222222, 0.05555556]
    assert_allclose(value, 0.33333333, atol=5e-9)
    assert_allclose(d[:5, 0], a, atol=5e-9)
    assert_allclose(d[5:8, 1], b, atol=5e-9)
    assert (d[:, 2] == 0).all() and np.count_nonzero(d) == 7
    value, logged = run(backend, case, delta=0.75, log=True, eps=0)
    assert_allclose(value, 0.40546511, atol=5e-9)
    assert_allclose(logged, 1.5 * d, rtol=1e-12)
    assert_allclose(logged[:5, 0], [-0.125, 0.20833333, -0.125, 0.04166667, 0], atol=1e-8)
    ap, kept, flags = precisions(backend, case)
    assert_allclose(ap, [0.83333333, 0.5, np.nan], atol=5e-9)
    assert not kept[:, 2].any() and (flags[:, 2] == -1).all()


@backends
def test_overlaps_exactly_at_the_thresholds(backend):
    """IoU 0.5 matches, IoU 0.3 keeps (notes 7, no. 3)."""
    half = one_class([(0, [0, 0, 6, 10], 1.0)], [(0, [0, 0, 12, 10])])
    third = one_class([(0, BOX, 1.0), (0, [0, 0, 10, 3], 0.5)], [(0, BOX)])
    for dtype in (np.float32, np.float64):
        small = {k: getattr(half, k).astype(dtype) for k in ("boxes", "gt_boxes")}
        assert precisions(backend, half.but(**small))[2].tolist() == [[1]]
        assert precisions(backend, half.but(**small), match=0.51)[2].tolist() == [[0]]
        small = {k: getattr(third, k).astype(dtype) for k in ("boxes", "gt_boxes")}
        assert precisions(backend, third.but(**small))[1].tolist() == [[True], [True]]
        assert precisions(backend, third.but(**small), nms=0.29)[1].tolist() == [[True], [False]]


# What each batch must keep

def big(seed=0, n=300, C=3, images=4, objects=24, **change):
    """Enough windows for several words of 64, and many objects."""
    rng = np.random.default_rng(seed)

    def some(count):
        corner = rng.uniform(0, 100, (count, 2))
        return np.concatenate([corner, corner + rng.uniform(15, 40, (count, 2))], 1)
    gt, at, k = some(objects), rng.integers(0, images, objects), rng.integers(0, objects, n)
    near = rng.random(n) < 0.6
    boxes, image = np.where(near[:, None], gt[k] + rng.normal(0, 3, (n, 4)), some(n)), np.where(near, at[k], rng.integers(0, images, n))
    case = Case(rng.normal(0, 1, (n, C)).round(2), boxes, image, gt, rng.integers(0, C, objects), at, rng.random(objects) < 0.2)
    return case.but(**change)


@functools.cache
def of_reference(n, most, ap, estimator):
    return run("numpy", big(n, n), ap=ap, estimator=estimator, most=most, delta=0.3), precisions("numpy", big(n, n), ap=ap, most=most)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] != "numpy"])
@pytest.mark.parametrize("ap", MODES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_many_windows_equal_the_reference(backend, ap, estimator):
    """Over the borders of words and blocks; kept windows are those of nms.nms, bit for bit."""
    for n, most in ((60, 100), (260, 65), (260, 256))[:1 if ap != "prec" else 2 if estimator == "env" else 3]:
        case, (expected, counted) = big(n, n), of_reference(n, most, ap, estimator)
        found = run(backend, case, ap=ap, estimator=estimator, most=most, delta=0.3)
        assert abs(found[0] - expected[0]) < 1e-12 and np.count_nonzero(expected[1]) > 30
        assert_allclose(found[1], expected[1], rtol=0, atol=1e-12)
        expected, found = counted, precisions(backend, case, ap=ap, most=most)
        assert_allclose(found[0], expected[0], rtol=1e-12)
        assert_array_equal(found[1], expected[1])
        assert_array_equal(found[2], expected[2])
        if most > 80:
            for c in range(3):
                alone = nms(case.boxes, case.scores[:, c].copy(), 0.3, groups=case.images)
                assert_array_equal(np.flatnonzero(found[1][:, c]), np.sort(alone))


@backends
def test_steps_too_small_change_nothing(backend):
    """Notes, property 3: the ordinary derivative is 0."""
    for seed in range(1, 12):
        case = draw(seed)
        order = np.argsort(case.scores, 0)
        scores = np.empty(case.scores.shape)
        np.put_along_axis(scores, order, 0.5 * np.arange(len(order))[:, None], 0)       # gaps of 0.5
        for ap in MODES:
            assert not run(backend, case.but(scores=scores), delta=0.24, ap=ap)[1].any()


def areas(points, values, left, right):
    """The integral of a step function from left to right."""
    edges = np.concatenate([[left], points[(points > left) & (points < right)], [right]])
    return float((np.diff(edges) * values[np.searchsorted(points, (edges[1:] + edges[:-1]) / 2)]).sum())


def test_the_step_estimate_is_the_derivative_of_the_smoothed_profile():
    """Notes 3.1 (i), (ii): jumps within delta add up to it, and it is the slope of the integral, taken exactly, over 2 delta."""
    delta, checked = 0.7, 0
    for seed in range(1, 30):
        case = draw(seed)
        d = run("numba", case, delta=delta)[1]
        for c in range(2):
            b = Brute(case, c)
            for i in b.rows if b.P else []:
                points, values, *_ = map_loss.profile(*arguments(case, np.asarray), window=i, label=c)
                s, g = b.s[i], -d[i, c] * len({*case.gt_labels[~case.gt_difficult]})
                if (abs(abs(points - s) - delta) < 1e-5).any():
                    continue
                assert abs(np.diff(values)[abs(points - s) < delta].sum() / (2 * delta) - g) < 1e-12
                high, low = (areas(points, values, s + h - delta, s + h + delta) / (2 * delta) for h in (1e-6, -1e-6))
                assert abs((high - low) / 2e-6 - g) < 1e-6
                checked += g != 0
    assert checked > 50


@backends
def test_signs_zeros_and_bounds(backend):
    """Notes, properties 5, 6, 8, under the conditions stated there."""
    signs, delta, least = np.zeros(2, int), 0.8, 0.3
    for seed in range(1, 13):
        case = draw(seed)
        d = run(backend, case, delta=delta)[1]
        count = max(1, len({*case.gt_labels[~case.gt_difficult]}))
        assert abs(d).max() <= 1 / (2 * delta * count) + 1e-12
        assert abs(run(backend, case, estimator="env", least=least)[1]).max() <= 1 / (least * count) + 1e-12
        aps, kept, flags = precisions(backend, case)
        for c in range(2):
            b = Brute(case, c)
            if not b.P:
                assert not d[:, c].any()
                continue
            reachable = len({b.gt[i] for i in b.rows if b.gt[i] >= 0})
            assert 0 <= aps[c] <= reachable / b.P + 1e-12
            for i in b.rows:
                blocker = map_loss.profile(*arguments(case, np.asarray), window=i, label=c)[2]
                if math.isnan(blocker) and b.gt[i] == -1:
                    assert d[i, c] >= 0
                    signs[0] += d[i, c] > 0
                if math.isnan(blocker) and b.gt[i] >= 0 and not any(kept[j, c] and b.gt[j] == b.gt[i] for j in b.rows if j != i):
                    assert d[i, c] <= 0
                    signs[1] += d[i, c] < 0
                if not kept[i, c] and b.s[i] + delta < blocker:
                    assert d[i, c] == 0
    assert (signs > 3).all()


@backends
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_invariances(backend, estimator):
    """Notes, property 7: a shift, a scale, the order of windows, the names of images, a class that is absent."""
    widths = dict(estimator=estimator, delta=0.5, reach=2.0, least=0.125)
    for seed in range(1, 6):
        case = draw(seed)
        case = case.but(scores=np.round(case.scores * 64) / 64)
        value, d = run(backend, case, **widths)
        shifted = run(backend, case.but(scores=case.scores + 8), **widths)
        scaled = run(backend, case.but(scores=case.scores * 4), **{k: v if k == "estimator" else 4 * v for k, v in widths.items()})
        named = run(backend, case.but(images=-case.images, gt_images=-case.gt_images), **widths)
        boxes = case.boxes if case.boxes.ndim == 2 else np.concatenate([case.boxes, case.boxes[:, :1]], 1)
        wider = run(backend, case.but(scores=np.concatenate([case.scores, case.scores[:, :1]], 1), boxes=boxes), **widths)
        for found, factor in ((shifted, 1), (scaled, 4), (named, 1), ((wider[0], wider[1][:, :2]), 1)):
            assert abs(found[0] - value) < 1e-12
            assert_allclose(found[1] * factor, d, rtol=0, atol=1e-12)
        assert not wider[1][:, 2:].any()
        distinct = case.but(scores=case.scores + np.arange(len(d))[:, None] / 1024)
        order = np.random.default_rng(seed).permutation(len(d))
        value, d = run(backend, distinct, **widths)
        found = run(backend, distinct.but(**{k: getattr(distinct, k)[order] for k in ("scores", "boxes", "images")}), **widths)
        assert abs(found[0] - value) < 1e-12
        assert_allclose(found[1], d[order], rtol=0, atol=1e-12)


@backends
def test_windows_that_are_no_candidates(backend):
    """They suppress nothing, and get exactly 0; the best `most` of each image are chosen, of equal scores the first rows."""
    case = one_class([(0, BOX, s) for s in (1.0, 2, 2, 2)] + [(1, BOX, 0.5)], [(0, BOX), (1, BOX)])
    assert precisions(backend, case, nms=1, most=2)[1][:, 0].tolist() == [False, True, True, False, True]
    d = run(backend, case, nms=1, most=2, delta=2)[1][:, 0]
    assert d[0] == 0 and d[3] == 0 and d[2] != 0 and d[4] != 0


@backends
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_empty_batches_and_images(backend, estimator):
    some = dict(estimator=estimator)
    none = {k: getattr(A, k)[:0] for k in ("gt_boxes", "gt_labels", "gt_images", "gt_difficult")}
    nothing = A.but(**none)
    for case in (nothing, A.but(gt_difficult=np.ones(2, bool))):
        for log in (False, True):
            value, d = run(backend, case, log=log, **some)
            assert value == 0 and not d.any()
        assert np.isnan(precisions(backend, case)[0]).all()
    empty = A.but(scores=np.zeros((0, 1)), boxes=np.zeros((0, 4)), images=np.zeros(0, int))
    assert run(backend, empty, **some)[0] == 1 and run(backend, empty.but(boxes=np.zeros((0, 1, 4))), **some)[1].shape == (0, 1)
    assert precisions(backend, empty)[0].tolist() == [0]
    assert run(backend, empty.but(**none), **some)[0] == 0
    assert run(backend, A.but(gt_images=np.array([0, 77])), **some)[0] == 0.5           # an object in an image without windows: missed
    alone = one_class([(3, BOX, 0.5)], [(3, BOX)])
    value, d = run(backend, alone, **some)
    assert value == 0 and not d.any()
    missed = one_class([(3, BOX, 0.5)], [(2, BOX)])
    assert run(backend, missed, **some)[0] == 1
    assert_allclose(run(backend, missed, log=True, **some)[0], math.log(1000))


@backends
def test_the_steps_follow_the_spread_of_the_scores(backend):
    """delta = kappa sigma, 3 sigma and 0.2 sigma, at least 1e-3."""
    case, sigma = draw(1), draw(1).scores.std(0)
    one = case.but(gt_labels=np.zeros(len(case.gt_labels), int), gt_difficult=np.zeros(len(case.gt_labels), bool))
    assert_array_equal(run(backend, one, kappa=0.5)[1], run(backend, one, delta=float(0.5 * sigma[0]))[1])
    assert_allclose(run(backend, one, estimator="env")[1],
                    run(backend, one, estimator="env", reach=float(3 * sigma[0]), least=float(0.2 * sigma[0]))[1], rtol=1e-12)
    tied = T.but(scores=np.ones((3, 1)))
    assert_array_equal(run(backend, tied)[1], run(backend, tied, delta=1e-3)[1])
    assert abs(run(backend, tied)[1]).max() > 10


@backends
def test_float32_and_strided_scores(backend):
    case = big(3, 120)
    boxes, objects = case.boxes.round(1).astype(np.float32), case.gt_boxes.round(1).astype(np.float32)
    case = case.but(boxes=boxes.astype(float), gt_boxes=objects.astype(float))
    small = case.but(scores=np.asfortranarray(case.scores.astype(np.float32)), boxes=boxes, gt_boxes=objects)
    value, d = run(backend, small, delta=0.303)
    expected, g = run("numpy", case, delta=0.303)
    assert abs(value - expected) < 1e-12
    assert_allclose(d, g, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_threads_change_no_bit(estimator, all_threads):
    case = big(5)
    found = run("numba", case, estimator=estimator)
    numba.set_num_threads(1)
    again = run("numba", case, estimator=estimator)
    assert found[0] == again[0]
    assert_array_equal(found[1], again[1])


def test_arguments_stay_whole():
    case = draw(3)
    before = dataclasses.replace(case, **{f.name: getattr(case, f.name).copy() for f in dataclasses.fields(case)})
    for backend in RUNNING:
        for estimator in ESTIMATORS:
            run(backend, case, estimator=estimator)
    for f in dataclasses.fields(case):
        assert_array_equal(getattr(case, f.name), getattr(before, f.name))


def test_free_scores_climb_to_the_best_that_can_be_reached():
    """Notes, property 11 and 3.3: 60 free scores, 150 steps of 0.1 along g / max |g|, delta 2."""
    for seed in (0, 1):
        case = big(seed, 60, 1, 8, 16, gt_difficult=np.zeros(16, bool))
        b = Brute(case, 0)
        best = len({g for g in b.gt.values() if g >= 0}) / b.P
        value, d = run("numba", case, delta=2.0)
        assert 1 - value < 0.8 * best
        for _ in range(150):
            case = case.but(scores=case.scores - 0.1 * d / max(abs(d).max(), 1e-9))
            value, d = run("numba", case, delta=2.0)
        assert 1 - value >= 0.95 * best


@needs_emulator
def test_on_a_gpu_nothing_waits_and_a_bad_score_makes_all_NaN():
    """On the stand-in for CuPy."""
    case = big(2, 80)
    expected = run("numpy", case, delta=0.3, log=True)
    with fake_cupy.installed(), use("cuda") as put:
        given = arguments(case, put)
        with fake_cupy.no_copies():
            found = map_loss.loss(*given, delta=0.3, log=True)
        assert abs(float(to_numpy(found[0])) - expected[0]) < 1e-12
        assert_allclose(to_numpy(found[1]), expected[1], rtol=0, atol=1e-12)
        for bad in (np.nan, np.inf):
            scores = case.scores.copy()
            scores[7, 1] = bad
            with np.errstate(invalid="ignore"):                     # of the stand-in
                value, d = map_loss.loss(put(scores), *given[1:])
            assert np.isnan(to_numpy(value)) and np.isnan(to_numpy(d)).any()
        with pytest.raises(TypeError, match="^map_loss.loss: images and objects must lie on the host, got an array on the GPU"):
            map_loss.loss(*given[:2], put(case.images), *given[3:])
        with pytest.raises(TypeError, match="^map_loss.loss: scores and boxes must both be NumPy's or both CuPy's"):
            map_loss.loss(given[0], case.boxes, *given[2:])


@needs_emulator
def test_more_candidates_than_the_kernels_hold_are_refused():
    case = big(0, 300, images=1, objects=3)
    run("emulated", case, most=256)
    with pytest.raises(ValueError, match="^map_loss.loss: on a GPU a class must have at most 256 candidates and objects in an image, got 257"):
        run("emulated", case, most=257)


@needs_emulator
def test_any_order_of_threads_gives_the_same_bits():
    case = big(4, 150)
    value, d = run("emulated", case, estimator="env")
    for order in ("reverse", "random"):
        with emulate.options(order=order, seed=1):
            again, d_again = run("emulated", case, estimator="env")
        assert again == value
        assert_array_equal(d_again, d)


@pytest.mark.parametrize("change, error, message", [
    (dict(scores=np.zeros(2)), ValueError, r"scores must have shape \(n, C\), got \(2,\)"),
    (dict(scores=np.zeros((2, 1), int)), TypeError, "scores must be float32 or float64, got int64"),
    (dict(scores=np.array([[0.0], [np.nan]])), ValueError, "scores must be finite, got NaN or infinity"),
    (dict(scores=np.array([[0.0], [np.inf]])), ValueError, "scores must be finite, got NaN or infinity"),
    (dict(boxes=np.zeros((3, 4))), ValueError, r"boxes must have shape \(2, 4\), got \(3, 4\)"),
    (dict(boxes=np.zeros((2, 2, 4))), ValueError, r"boxes must have shape \(2, 1, 4\), got \(2, 2, 4\)"),
    (dict(boxes=np.full((2, 4), np.nan)), ValueError, "boxes must be finite"),
    (dict(images=np.zeros(2)), TypeError, "images must be integers, got float64"),
    (dict(images=np.zeros(3, int)), ValueError, r"images must have shape \(2,\), got \(3,\)"),
    (dict(gt_boxes=np.zeros((1, 4), np.float32)), TypeError, "gt_boxes must be float64, as boxes are, got float32"),
    (dict(gt_labels=np.array([1])), ValueError, r"gt_labels must lie in 0\.\.0, got 1\.\.1"),
    (dict(gt_labels=np.array([-1])), ValueError, r"gt_labels must lie in 0\.\.0, got -1\.\.-1"),
    (dict(gt_images=np.zeros(2, int)), ValueError, r"gt_images must have shape \(1,\), got \(2,\)"),
    (dict(gt_difficult=np.zeros(1, int)), TypeError, "gt_difficult must be bool, got int64"),
    (dict(nms=1.5), ValueError, r"nms and match must lie in \[0, 1\], got 1.5 and 0.5"),
    (dict(match=np.nan), ValueError, r"nms and match must lie in \[0, 1\], got 0.3 and nan"),
    (dict(ap="voc"), ValueError, "ap must be one of prec, interp, 11pt, got 'voc'"),
    (dict(most=0), ValueError, "most must be at least 1, got 0"),
    (dict(estimator="fd"), ValueError, "estimator must be 'sde' or 'env', got 'fd'"),
    (dict(delta=0), ValueError, "delta must be a number above 0, got 0"),
    (dict(kappa=-1.0), ValueError, "kappa must be a number above 0, got -1.0"),
    (dict(least=math.inf), ValueError, "least must be a number above 0, got inf"),
    (dict(eps=-1), ValueError, "eps must be at least 0, got -1"),
    (dict(log=True, eps=0, gt_images=np.array([9])), ValueError, "eps must be above 0 where mAP is 0, got 0"),
])
def test_errors(change, error, message):
    fine = dict(scores=np.zeros((2, 1)), boxes=np.tile(BOX, (2, 1)), images=np.zeros(2, int), gt_boxes=np.array([BOX]),
                gt_labels=np.zeros(1, int), gt_images=np.zeros(1, int), gt_difficult=np.zeros(1, bool))
    map_loss.loss(**fine)
    with pytest.raises(error, match=r"^map_loss\.loss: " + message):
        map_loss.loss(**{**fine, **change})


@pytest.mark.parametrize("change, message", [
    *((dict([(name, bad)]), f"{name} must be a number above 0, got {bad}") for name, bad in (
        ("delta", 0), ("delta", math.inf), ("kappa", -1.0), ("kappa", math.nan), ("reach", 0.0), ("reach", math.nan), ("least", math.inf))),
    (dict(least="x"), "least must be a number above 0, got 'x'"),
    (dict(label=1), r"label must be of a class with objects that count, \[0\], got 1"),
    (dict(window=3), "window must be a candidate of class 0, got 3"),
    (dict(window=0, most=1), "window must be a candidate of class 0, got 0")])
def test_profile_errors(change, message):
    case = one_class([(0, BOX, 0.5), (0, BOX, 0.6)], [(0, BOX)])
    with pytest.raises(ValueError, match=r"^map_loss\.profile: " + message):
        map_loss.profile(*arguments(case, np.asarray), **{**dict(window=0, label=0), **change})
