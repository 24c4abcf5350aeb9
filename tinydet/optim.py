"""Optimisers (SGD with momentum, AdaGrad), gradient clipping and learning-rate schedules."""
import functools
import math

import numpy as np
from numba import njit, prange

from tinydet import checks, cuda
from tinydet.backend import array_module, pick, scalar, to_numpy

FORMS = ("plain", "caffe")


class Optimizer:
    """Base: what the optimisers share. step(lr) updates the parameters of a layer in place, then clears all its gradients.

    Only what is in `layer.trained` at the step is updated; frozen parameters keep their bits. `state`, for checkpoints, holds one
    array by parameter name, of its shape and dtype, for the parameters that train when the optimiser is made, and no others.
    weight_decay * w is added to the gradient of arrays that have more than one axis, i.e. of conv weights, not of biases and
    gammas (CHOICE); decay_all=True: of every one.
    rates: factor of the learning rate by parameter name, a mapping (1 where it lacks the name) or a function of the name. Caffe's
    lr_mult 2 for biases: rates=lambda name: 2 if name.endswith("b") else 1. With 0 the parameter stays, its state goes on.
    clip: limit of the norm of all trained gradients together (clip_norm), before decay; None does not clip.
    Raises ValueError for settings out of range, for unknown names in rates, for lr unless it is finite and >= 0, and for a
    parameter that was frozen when the optimiser was made and trains now; FloatingPointError naming the parameter if a gradient
    is not finite. Nothing is updated then.
    On a GPU step waits for nothing, so it cannot raise that: a kernel enters the first such parameter in `trouble`, and as long as it
    is noted nothing is updated and no gradient of a trained parameter is cleared, in this step and those after. check() raises.
    """

    def __init__(self, layer, weight_decay, decay_all, rates, clip):
        self.layer, self.weight_decay, self.decay_all, self.clip = layer, weight_decay, decay_all, clip
        self._check("weight_decay must be finite and >= 0", weight_decay, 0 <= weight_decay < math.inf)
        self._check("clip must be None or > 0", clip, clip is None or clip > 0)
        factor = rates if callable(rates) else lambda name: (rates or {}).get(name, 1)
        self.rates = {name: factor(name) for name in layer.trained}
        if not callable(rates):
            unknown = sorted(set(rates or {}) - set(layer.params))
            self._check("rates must name parameters of the layer", unknown, not unknown)
        for name, rate in self.rates.items():
            self._check(f"the rate of {name} must be finite and >= 0", rate, 0 <= rate < math.inf)
        self.state = {name: self._start(w) for name, w in layer.trained.items()}
        xp = array_module(next(iter(layer.trained.values()), None))
        self.trouble = xp.zeros(1, np.int32)                        # 1 + place, in state, of the first parameter of a bad gradient

    def step(self, lr):
        op, trained = f"{type(self).__name__}.step", self.layer.trained
        if not 0 <= lr < math.inf:
            raise ValueError(f"{op}: lr must be finite and >= 0, got {lr}")
        for name in trained:
            if name not in self.state:
                raise ValueError(f"{op}: what trains must have trained when the optimiser was made, got {name}, "
                                 "which was frozen then: make a new optimiser")
        grads = {name: self.layer.grads[name] for name in trained}
        if self.clip is not None:
            clip_norm(grads, self.clip)
        for place, name in enumerate(self.state, 1):
            if name in trained:
                self._note(place, trained[name], grads[name], self.state[name], self._decay(trained[name]))
        if checks.on_host(self.trouble):
            self.check()
        for name, w in trained.items():
            self._update(w, grads[name], self.state[name], float(lr * self.rates[name]), self._decay(w))
        for name, g in self.layer.grads.items():
            if name not in trained:
                g[...] = 0

    def check(self):
        """Raise the FloatingPointError of a step on a GPU, which waits until it is done: call this where the loss is read, too.

        On the host step has raised it already. The next step starts afresh.
        """
        place = int(to_numpy(self.trouble)[0])
        if not place:
            return
        self.trouble[...] = 0
        name = list(self.state)[place - 1]
        w, g, state = (to_numpy(arrays[name]) for arrays in (self.layer.params, self.layer.grads, self.state))
        wrong = self._unusable(w, g, state, self._decay(w)) or "not finite"         # unless someone has cleared it since
        raise FloatingPointError(f"{type(self).__name__}.step: the gradient of {name} is {wrong}: "
                                 "lower the learning rate or check the data")

    def _check(self, rule, value, holds):
        if not holds:
            raise ValueError(f"optim.{type(self).__name__}: {rule}, got {value!r}")

    def _start(self, w):
        """The state of parameter w before the first step."""
        return array_module(w).zeros_like(w)

    def _decay(self, w):
        return self.weight_decay if w.ndim > 1 or self.decay_all else 0

    def _unusable(self, w, g, state, decay):
        """What is wrong with the gradient g of parameter w, on the host; None if nothing is."""
        return _not_finite(g)

    def _note(self, place, w, g, state, decay):
        """Set trouble to place, unless it is set, if the gradient g of parameter w cannot be used."""
        pick(g, numpy=self._note_host, cuda=self._note_cuda)(place, w, g, state, decay)

    def _note_host(self, place, w, g, state, decay):
        if not self.trouble[0] and self._unusable(w, g, state, decay):
            self.trouble[0] = place

    def _note_cuda(self, place, w, g, state, decay):
        cuda.launch("sgd.cu", "sgd_check", (array_module(g).ascontiguousarray(g), self.trouble, g.size, place), threads=g.size)

    @property
    def kind(self):
        """What the state means: a checkpoint of one kind is no use to another."""
        return type(self).__name__

    def _update(self, w, g, state, lr, decay):
        """One step of parameter w and its state, in place; then g = 0. On a GPU: unless trouble is noted."""
        raise NotImplementedError


class SGD(Optimizer):
    """SGD with momentum and weight decay, on the `params` and `grads` of a layer. Options and errors: see Optimizer.

    form "plain": v = momentum * v + (g + weight_decay * w);  w = w - lr * v   (OverFeat, sec. 3.1; where lr enters is a CHOICE.)
    form "caffe": v = momentum * v + lr * (g + weight_decay * w);  w = w - v   (Fast R-CNN, OHEM: Caffe's.)
    They differ when lr changes: plain rescales the momentum there, caffe carries on at the old rate.
    `state` holds the velocities v, 0 at first. momentum lies in [0, 1).
    """

    def __init__(self, layer, momentum=0.9, weight_decay=0.0, decay_all=False, *, form="plain", rates=None, clip=None):
        super().__init__(layer, weight_decay, decay_all, rates, clip)
        self._check("momentum must lie in [0, 1)", momentum, 0 <= momentum < 1)
        self._check(f"form must be one of {', '.join(FORMS)}", form, form in FORMS)
        self.momentum, self.form = momentum, form

    kind = property(lambda self: f"SGD {self.form}")

    def _update(self, w, g, v, lr, decay):
        run = pick(w, numpy=_sgd_numpy, numba=_sgd_numba, cuda=functools.partial(_sgd_cuda, self.trouble))
        run(w, g, v, self.momentum, lr, decay, self.form == "caffe")


class AdaGrad(Optimizer):
    """AdaGrad: every element has a rate of its own, which falls as its gradients add up (Oquab et al., CVPR 2015; the released code).

    d = g + weight_decay * w;  m = m + d^2;  w = w - lr * d / sqrt(m)
    m starts at `initial`, 1e-10 in the authors' code, and counts the present gradient: the first step is lr * sign(d) unless d is
    tiny. That code decays weights and biases alike (5e-4): hence decay_all. `state` holds m; initial lies in [1e-30, 1e30].
    Options and errors: see Optimizer. Where m would overflow, the gradient is refused like one that is not finite: m would stay
    infinite and the parameter stand still. On a GPU array code serves: about 25 launches a parameter.
    """

    def __init__(self, layer, weight_decay=0.0, decay_all=True, *, initial=1e-10, rates=None, clip=None):
        self.initial = initial
        self._check("initial must lie in [1e-30, 1e30]", initial, 1e-30 <= initial <= 1e30)          # float32 holds it
        super().__init__(layer, weight_decay, decay_all, rates, clip)

    def _start(self, w):
        return array_module(w).full_like(w, self.initial)

    def _unusable(self, w, g, m, decay):
        with np.errstate(over="ignore", invalid="ignore"):
            return _not_finite(g) or (None if np.isfinite(m + (g + decay * w) ** 2).all() else "too large to square and add up")

    def _note_cuda(self, place, w, g, m, decay):
        xp = array_module(w)
        with np.errstate(over="ignore", invalid="ignore"):
            usable = xp.isfinite(m + (g + decay * w) ** 2).all()                # nor is it where g is not
        self.trouble[...] = xp.where(usable | (self.trouble > 0), self.trouble, place)

    def _update(self, w, g, m, lr, decay):
        pick(w, numpy=_adagrad_numpy, cuda=functools.partial(_adagrad_cuda, self.trouble))(w, g, m, lr, decay)


def clip_norm(grads, limit):
    """Scale all gradients so that their norm, taken together, is at most limit; in place. Returns the norm before, a float.

    norm = sqrt(sum of g^2 over all arrays), added up in float64 after division by the largest |g|, so that no square overflows
    or vanishes; if norm > limit: g = g * limit / norm, else they keep their bits.
    grads: mapping of name to float array. No gradients, or none but zeros: 0.0. Raises ValueError unless limit > 0, TypeError for other
    dtypes, FloatingPointError naming a gradient that is not finite; nothing is scaled then. On a GPU array code serves, about 12 launches an
    array: the norm is a 0-d float64 array there, and NaN, not an error, for gradients that are not finite (the optimisers raise it).
    """
    _positive("optim.clip_norm", limit)
    _refuse("optim.clip_norm", grads)
    arrays = [g for g in grads.values() if g.size]
    return pick(arrays[0], numpy=_clip_norm_numpy, cuda=_clip_norm_cuda)(arrays, limit) if arrays else 0.0


def clip_value(grads, limit):
    """Cut every element of the gradients at -limit and limit, in place. Arguments and errors as in clip_norm.

    On a GPU array code serves, four launches an array; what is not finite stays there, for the optimisers to find.
    """
    _positive("optim.clip_value", limit)
    _refuse("optim.clip_value", grads)
    for g in grads.values():
        bound = min(limit, float(np.finfo(g.dtype).max))
        pick(g, numpy=_clip_value_numpy, cuda=_clip_value_cuda)(g, bound)


def _positive(op, limit):
    if not limit > 0:
        raise ValueError(f"{op}: limit must be > 0, got {limit}")


def _not_finite(g):
    return None if pick(g, numpy=_finite_numpy, numba=_finite_numba)(g) else "not finite"


def _refuse(op, grads):
    for name, g in grads.items():
        if g.dtype.kind != "f":
            raise TypeError(f"{op}: the gradient of {name} must be a float array, got {g.dtype}")
        if checks.on_host(g) and (wrong := _not_finite(g)):
            raise FloatingPointError(f"{op}: the gradient of {name} is {wrong}: lower the learning rate or check the data")


def step_schedule(lr, at, factor, warmup=0, first=1 / 3):
    """Function of the time t (step or epoch): lr * factor^k, k = number of entries of `at` that are <= t.

    For t < warmup that times first + (1 - first) * t / warmup. OverFeat (sec. 3.1): step_schedule(5e-2, (30, 50, 60, 70, 80), 0.5)
    over epochs; AP-loss (its code): warmup 500 steps. Raises ValueError unless warmup >= 0 and first lies in [0, 1].
    """
    if not (warmup >= 0 and 0 <= first <= 1):
        raise ValueError(f"optim.step_schedule: warmup must not be negative and first lie in [0, 1], got {warmup}, {first}")
    return lambda t: lr * factor ** sum(t >= a for a in at) * (first + (1 - first) * t / warmup if t < warmup else 1)


def cosine_schedule(lr, steps, warmup=0):
    """Function of the step t: rises linearly over `warmup` steps, lr * (t + 1)/warmup, then falls along half a cosine to 0.

    lr * (1 + cos(pi * (t - warmup)/(steps - warmup)))/2 for t >= warmup, 0 at `steps`. Raises ValueError unless 0 <= warmup < steps.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"optim.cosine_schedule: warmup must lie in 0..steps - 1, got warmup {warmup}, steps {steps}")

    def at(t):
        if t < warmup:
            return lr * (t + 1) / warmup
        return lr * (1 + math.cos(math.pi * min(1, (t - warmup) / (steps - warmup)))) / 2
    return at


# NumPy

def _sgd_numpy(w, g, v, momentum, lr, decay, caffe):
    v *= momentum
    if caffe:
        v += lr * (g + decay * w)
        w -= v
    else:
        v += g
        if decay:
            v += decay * w
        w -= lr * v
    g[...] = 0


def _finite_numpy(g):
    return bool(np.isfinite(g).all())


def _adagrad_numpy(w, g, m, lr, decay):
    d = g + decay * w
    m += d * d
    w -= lr * d / np.sqrt(m)
    g[...] = 0


def _clip_value_numpy(g, bound):
    g.clip(-bound, bound, out=g)


def _clip_norm_numpy(grads, limit):
    largest = max(float(np.abs(g).max()) for g in grads)
    if largest == 0:
        return 0.0
    root = math.sqrt(sum(float(np.square(g.astype(np.float64) / largest).sum()) for g in grads))
    if largest * root > limit:
        for g in grads:
            g[...] = g.astype(np.float64) / largest * (limit / root)
    return largest * root


# Numba: one pass over memory each, the same bits; threads from PART numbers on

PART = 1 << 16


def _plain(a):
    return a.flags.c_contiguous and a.dtype in (np.float32, np.float64)


def _sgd_numba(w, g, v, momentum, lr, decay, caffe):
    if not all(_plain(a) and a.dtype == w.dtype for a in (w, g, v)):
        return _sgd_numpy(w, g, v, momentum, lr, decay, caffe)
    run = _sgd if w.size < PART else _sgd_parts
    run(w.reshape(-1), g.reshape(-1), v.reshape(-1), *map(w.dtype.type, (momentum, lr, decay)), caffe)


def _finite_numba(g):
    if not _plain(g):
        return _finite_numpy(g)
    return (_finite if g.size < PART else _finite_parts)(g.reshape(-1))


@njit(cache=True)
def _sgd(w, g, v, momentum, lr, decay, caffe):
    zero = w.dtype.type(0)
    for k in range(len(w)):
        if caffe:
            v[k] = v[k] * momentum + lr * (g[k] + decay * w[k])
            w[k] -= v[k]
        else:
            v[k] = v[k] * momentum + g[k]
            if decay != zero:
                v[k] += decay * w[k]
            w[k] -= lr * v[k]
        g[k] = zero


@njit(cache=True, parallel=True)
def _sgd_parts(w, g, v, momentum, lr, decay, caffe):
    for first in prange(-(-len(w) // PART)):
        part = slice(first * PART, (first + 1) * PART)
        _sgd(w[part], g[part], v[part], momentum, lr, decay, caffe)


@njit(cache=True)
def _finite(g):
    """Whether g - g is 0 everywhere: a sum of flags, which is vector code where an early end would not be."""
    wrong, zero = 0, g.dtype.type(0)
    for k in range(len(g)):
        wrong += g[k] - g[k] != zero
    return wrong == 0


@njit(cache=True, parallel=True)
def _finite_parts(g):
    wrong = 0
    for part in prange(-(-len(g) // PART)):
        wrong += not _finite(g[part * PART:(part + 1) * PART])
    return wrong == 0


# CUDA: kernels/sgd.cu, two launches a parameter; the rest by array code that never asks for a number

def _sgd_cuda(trouble, w, g, v, momentum, lr, decay, caffe):
    given, arrays = (w, g, v), [array_module(w).ascontiguousarray(a) for a in (w, g, v)]
    cuda.launch("sgd.cu", "sgd_step", (*arrays, trouble, w.size, momentum, lr, decay, caffe), threads=w.size)
    for a, b in zip(given, arrays):
        if not a.flags.c_contiguous:
            a[...] = b


def _adagrad_cuda(trouble, w, g, m, lr, decay):
    xp, go = array_module(w), trouble == 0
    with np.errstate(all="ignore"):
        d = g + decay * w
        m += xp.where(go, d * d, 0)
        w -= xp.where(go, lr * d / xp.sqrt(m), 0)
    g[...] = xp.where(go, 0, g)


def _clip_value_cuda(g, bound):
    xp = array_module(g)
    g[...] = xp.where(xp.isfinite(g), g.clip(-bound, bound), g)


def _clip_norm_cuda(grads, limit):
    xp = array_module(grads[0])
    with np.errstate(all="ignore"):
        largest = xp.stack([abs(g).max().astype(np.float64) for g in grads]).max()
        unit = xp.where(largest > 0, largest, 1)
        root = xp.sqrt(xp.stack([xp.square(g.astype(np.float64) / unit).sum() for g in grads]).sum())      # NaN if any number is none
        norm, factor = largest * root, limit / root
        over = norm > limit
        for g in grads:
            g[...] = xp.where(over, g.astype(np.float64) / unit * factor, g)
    return scalar(norm)
