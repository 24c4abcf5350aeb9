"""Layers: thin classes that hold parameters around the ops, and how they compose. The caller holds the cache."""
import copy
from types import MappingProxyType

import numpy as np

from tinydet import checks
from tinydet.backend import array_module
from tinydet.files import fitting
from tinydet.ops import (add, batch_norm, concat, conv, dropout, global_max_pool, linear, lrn, max_pool, offset_pool, relu,
                         upsample)


class Layer:
    """Base: `params` and `grads` (same keys, same shapes), `state` (arrays that are saved but not trained), `forward`, `backward`.

    forward(x, train=False, rng=None) returns y and cache; train chooses batch statistics and dropout, whose mask comes from rng
    (a numpy Generator). backward(dy, cache) returns dx and ADDS the parameter gradients to `grads`: a head that is shared by
    several scales runs several times before the optimiser clears them. layer(x) is forward without the cache.
    freeze() keeps the parameters as they are: backward adds no gradient for them, the optimisers leave them alone, and
    `trained` (the parameters that train) is empty.
    """

    frozen = False

    def __init__(self, **params):
        self.params = params
        self.grads = {k: array_module(v).zeros_like(v) for k, v in params.items()}
        self.state = {}

    def __call__(self, x):
        return self.forward(x)[0]

    def __repr__(self):
        return type(self).__name__

    def multiply_adds(self, x, y):
        """Multiply-adds of the products of a forward pass from an x to a y; elementwise work counts as 0."""
        return 0

    def arrays(self):
        """Every array that makes up the layer, by name: parameters and state."""
        return {**self.params, **self.state}

    def freeze(self, frozen=True):
        """Freeze the parameters, or let them train again (frozen=False: also a BatchNorm made frozen). Returns the layer."""
        self.frozen = frozen
        return self

    def to(self, put):
        """Move parameters, gradients and state to the backend of put: `with use("cuda") as put: net.to(put)`. Returns the layer.

        An optimiser made before still holds the arrays of the other backend: move first.
        """
        for arrays in (self.params, self.grads, self.state):
            for name, a in arrays.items():
                arrays[name] = put(a)
        return self

    @property
    def trained(self):
        """The parameters that train, by name: all, or none of a frozen layer."""
        return {} if self.frozen else self.params

    def _add(self, **grads):
        if not self.frozen:
            for k, g in grads.items():
                add.accumulate(self.grads[k], g)


class Conv2D(Layer):
    """Convolution kxk (ops.conv), Cin -> Cout. Weights by He's rule N(0, 2/(k*k*Cin)), or N(0, std^2); bias 0.

    pad: a number or (top, bottom, left, right). input_grad=False: backward returns None, for a layer that sees the image.
    relu=True: max(0, y), in one kernel on a GPU. dtype float32 or float64.
    """

    def __init__(self, Cin, Cout, size, stride=1, pad=0, dilation=1, *, rng, std=None, input_grad=True, dtype=np.float32, relu=False):
        checks.small("layers.Conv2D", 1, Cin=Cin, Cout=Cout, size=size, stride=stride, dilation=dilation)
        std = np.sqrt(2 / (size * size * Cin)) if std is None else std
        super().__init__(w=(rng.standard_normal((size, size, Cin, Cout)) * std).astype(dtype), b=np.zeros(Cout, dtype))
        self.stride, self.pad, self.dilation, self.input_grad, self.relu = stride, pad, dilation, input_grad, relu

    def __repr__(self):
        kh, kw, Cin, Cout = self.params["w"].shape
        more = [f"{k} {v}" for k, v, usual in (("pad", self.pad, 0), ("dilation", self.dilation, 1)) if v != usual]
        return ", ".join([f"Conv2D {kh}x{kw}/{self.stride} {Cin} -> {Cout}", *more]) + " + ReLU" * self.relu

    def multiply_adds(self, x, y):
        return y.size * self.params["w"][..., 0].size

    def forward(self, x, train=False, rng=None):
        return conv.forward(x, self.params["w"], self.params["b"], self.stride, self.pad, self.dilation, self.relu)

    def backward(self, dy, cache):
        dx, dw, db = conv.backward(dy, cache, self.input_grad, not self.frozen)
        self._add(w=dw, b=db)
        return dx


class Linear(Layer):
    """Fully connected layer (ops.linear), Cin -> Cout. Weights by He's rule N(0, 2/Cin), or N(0, std^2); bias 0."""

    def __init__(self, Cin, Cout, *, rng, std=None, dtype=np.float32):
        checks.small("layers.Linear", 1, Cin=Cin, Cout=Cout)
        std = np.sqrt(2 / Cin) if std is None else std
        super().__init__(w=(rng.standard_normal((Cin, Cout)) * std).astype(dtype), b=np.zeros(Cout, dtype))

    def __repr__(self):
        return "Linear {} -> {}".format(*self.params["w"].shape)

    def multiply_adds(self, x, y):
        return y.size * len(self.params["w"])

    def forward(self, x, train=False, rng=None):
        return linear.forward(x, self.params["w"], self.params["b"])

    def backward(self, dy, cache):
        dx, dw, db = linear.backward(dy, cache, not self.frozen)
        self._add(w=dw, b=db)
        return dx


class Flatten(Layer):
    """(N, H, W, C) to (N, H*W*C), for a linear layer; the values of one pixel stay together."""

    def forward(self, x, train=False, rng=None):
        return x.reshape(len(x), int(np.prod(x.shape[1:]))), x.shape

    def backward(self, dy, cache):
        return dy.reshape(cache)


class BatchNorm(Layer):
    """Batch normalisation (ops.batch_norm) with running averages: run = momentum * run + (1 - momentum) * batch.

    train=True uses the batch's mean and variance and updates the averages (variance unbiased, m/(m - 1)); train=False uses
    the averages. Frozen (here or by freeze()), it always uses the averages, and gamma and beta do not train either.
    relu=True: max(0, y) in the same pass over memory, for a ReLU layer behind it.
    """

    def __init__(self, C, momentum=0.9, eps=1e-5, frozen=False, dtype=np.float32, relu=False):
        super().__init__(gamma=np.ones(C, dtype), beta=np.zeros(C, dtype))
        self.state = {"mean": np.zeros(C, dtype), "var": np.ones(C, dtype)}
        self.momentum, self.eps, self.frozen, self.relu = momentum, eps, frozen, relu

    def __repr__(self):
        return "BatchNorm" + " + ReLU" * self.relu

    def forward(self, x, train=False, rng=None):
        gamma, beta = self.params["gamma"], self.params["beta"]
        if not train or self.frozen:
            return batch_norm.forward_frozen(x, gamma, beta, self.state["mean"], self.state["var"], self.eps, self.relu)
        y, cache, (mean, var) = batch_norm.forward(x, gamma, beta, self.eps, self.relu)
        count = x.size // len(gamma)
        for name, batch in (("mean", mean), ("var", var * (count / max(1, count - 1)))):
            run = self.state[name]
            run += (1 - self.momentum) * (batch - run)
        return y, cache

    def backward(self, dy, cache):
        dx, dgamma, dbeta = batch_norm.backward(dy, cache)
        self._add(gamma=dgamma, beta=dbeta)
        return dx


class ReLU(Layer):
    """max(x, 0) (ops.relu)."""

    def forward(self, x, train=False, rng=None):
        return relu.forward(x)

    def backward(self, dy, cache):
        return relu.backward(dy, cache)


class LRN(Layer):
    """Local response normalisation across channels (ops.lrn, which names the two conventions)."""

    def __init__(self, size=5, alpha=1e-4, beta=0.75, k=1.0, divide_by_n=True):
        super().__init__()
        self.options = size, alpha, beta, k, divide_by_n

    def __repr__(self):
        return "LRN {} channels, alpha {}, beta {}, k {}".format(*self.options) + ", alpha undivided" * (not self.options[4])

    def forward(self, x, train=False, rng=None):
        return lrn.forward(x, *self.options)

    def backward(self, dy, cache):
        return lrn.backward(dy, cache)


class MaxPool(Layer):
    """Max pooling (ops.max_pool): size, stride (default: size), pad, and floor or ceil at the border."""

    def __init__(self, size, stride=None, pad=0, ceil=False):
        super().__init__()
        self.size, self.stride, self.pad, self.ceil = size, stride, pad, ceil

    def __repr__(self):
        return f"MaxPool {self.size}/{self.stride or self.size}" + (f", pad {self.pad}" if self.pad else "") + ", ceil" * self.ceil

    def forward(self, x, train=False, rng=None):
        return max_pool.forward(x, self.size, self.stride, self.pad, self.ceil)

    def backward(self, dy, cache):
        return max_pool.backward(dy, cache)


class OffsetPool(Layer):
    """Offset max pooling (ops.offset_pool): the pooled maps of all offsets in one."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x, train=False, rng=None):
        return offset_pool.forward(x, self.size)

    def backward(self, dy, cache):
        return offset_pool.backward(dy, cache)


class GlobalMaxPool(Layer):
    """The best position of each channel's map (ops.global_max_pool): (N, H, W, C) to (N, C)."""

    def forward(self, x, train=False, rng=None):
        return global_max_pool.forward(x)

    def backward(self, dy, cache):
        return global_max_pool.backward(dy, cache)


class Upsample(Layer):
    """Every pixel factor x factor times (ops.upsample)."""

    def __init__(self, factor=2):
        super().__init__()
        self.factor = factor

    def __repr__(self):
        return f"Upsample x{self.factor}"

    def forward(self, x, train=False, rng=None):
        return upsample.forward(x, self.factor)

    def backward(self, dy, cache):
        return upsample.backward(dy, cache)


class Dropout(Layer):
    """Dropout (ops.dropout) with train=True. At test time inverted dropout is the identity, classical scales by 1 - p."""

    def __init__(self, p=0.5, by_map=False, inverted=True):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"layers.Dropout: p must lie in [0, 1), got {p}")
        self.p, self.by_map, self.inverted = p, by_map, inverted

    def __repr__(self):
        return f"Dropout {self.p}" + " by map" * self.by_map + ", classical" * (not self.inverted)

    def forward(self, x, train=False, rng=None):
        if not train:
            return (x, None) if self.inverted else dropout.forward_test(x, self.p)
        if rng is None:
            raise ValueError("Dropout.forward: train=True needs rng, a numpy.random.Generator, got None")
        return dropout.forward(x, self.p, rng, self.by_map, self.inverted)

    def backward(self, dy, cache):
        return dy if cache is None else dropout.backward(dy, cache)


# Layers made of layers. Where x or y is named xs or ys it is a list: a net with several inputs or outputs


class Composite(Layer):
    """A layer made of named parts. `params`, `grads` and `state` are those of the parts, named "<part>.<name>".

    Raises ValueError where one layer with parameters stands in two places: an optimiser would update it twice. Shared runs one
    layer on several inputs.
    """

    def __init__(self, **parts):
        self.parts = parts
        seen = {}
        for name, layer in self.leaves().items():
            if layer.params and id(layer) in seen:
                raise ValueError(f"{type(self).__name__}: a layer must stand in one place, got it as {seen[id(layer)]} and {name}: use Shared")
            seen[id(layer)] = name

    def leaves(self):
        """The layers that are not composed themselves, by name: "<part>.<part>..."."""
        found = {}
        for name, part in self.parts.items():
            if isinstance(part, Composite):
                found |= {f"{name}.{k}": leaf for k, leaf in part.leaves().items()}
            else:
                found[name] = part
        return found

    def _collect(self, attribute):
        """Read only: a new array would not reach the part. Change arrays in place, or the dict of the part itself."""
        return MappingProxyType({f"{part}.{k}": v for part, layer in self.parts.items() for k, v in getattr(layer, attribute).items()})

    params = property(lambda self: self._collect("params"))
    grads = property(lambda self: self._collect("grads"))
    state = property(lambda self: self._collect("state"))
    trained = property(lambda self: self._collect("trained"))
    frozen = property(lambda self: all(layer.frozen for layer in self.parts.values() if layer.params))

    def freeze(self, frozen=True):
        for layer in self.parts.values():
            layer.freeze(frozen)
        return self

    def to(self, put):
        for layer in self.parts.values():
            layer.to(put)
        return self


class Sequential(Composite):
    """Layers one after the other; the parts are named "0", "1", ...

    input_grad=False: backward ends at the first layer that trains and returns None, for a net that sees the image or whose
    first layers are frozen.
    """

    def __init__(self, *layers, input_grad=True):
        super().__init__(**{str(i): layer for i, layer in enumerate(layers)})
        self.input_grad = input_grad

    def __call__(self, x):
        for layer in self.parts.values():               # no cache outlives its layer: large images need the memory
            x = layer(x)
        return x

    def forward(self, x, train=False, rng=None):
        caches = []
        for layer in self.parts.values():
            x, cache = layer.forward(x, train, rng)
            caches.append(cache)
        return x, caches

    def backward(self, dy, cache):
        for layer, c in reversed(self._reached(cache)):
            dy = layer.backward(dy, c)
        return dy if self.input_grad else None

    def _reached(self, cache):
        """The layers that backward must pass, each with its cache."""
        pairs = list(zip(self.parts.values(), cache))
        first = 0 if self.input_grad else next((i for i, (layer, _) in enumerate(pairs) if layer.trained), len(pairs))
        return pairs[first:]


class Stages(Sequential):
    """A Sequential that returns what every layer made, as a list: the maps of a backbone's stages, for a feature pyramid.

    backward takes one gradient a stage, None where a stage's map was not used.
    """

    def __call__(self, x):
        return self.forward(x)[0]

    def forward(self, x, train=False, rng=None):
        ys, caches = [], []
        for layer in self.parts.values():
            x, cache = layer.forward(x, train, rng)
            ys.append(x)
            caches.append(cache)
        return ys, caches

    def backward(self, dys, cache):
        _same_number("Stages.backward", "gradients", dys, cache)
        above = None
        reached = self._reached(cache)
        for (layer, c), dy in zip(reversed(reached), reversed(dys)):
            dy = _sum(above, dy)
            above = None if dy is None else layer.backward(dy, c)
        return above if self.input_grad else None


class Residual(Composite):
    """y = branch(x) + shortcut(x) (He et al.: a residual block without its last ReLU). shortcut=None: x itself."""

    def __init__(self, branch, shortcut=None):
        super().__init__(branch=branch, **({} if shortcut is None else {"shortcut": shortcut}))

    def forward(self, x, train=False, rng=None):
        a, branch_cache = self.parts["branch"].forward(x, train, rng)
        b, shortcut_cache = self.parts["shortcut"].forward(x, train, rng) if "shortcut" in self.parts else (x, None)
        y, add_cache = add.forward(a, b)
        return y, (branch_cache, shortcut_cache, add_cache)

    def backward(self, dy, cache):
        da, db = add.backward(dy, cache[2])
        dx = self.parts["branch"].backward(da, cache[0])
        return _sum(dx, self.parts["shortcut"].backward(db, cache[1]) if "shortcut" in self.parts else db)


class Fork(Composite):
    """Every part sees the same x: forward returns the list of their ys, in order (a detector's classifier and regressor).

    backward takes one gradient a part, None for a part that has none, and returns the sum of what they send back.
    """

    def forward(self, x, train=False, rng=None):
        ys, caches = [], []
        for layer in self.parts.values():
            y, cache = layer.forward(x, train, rng)
            ys.append(y)
            caches.append(cache)
        return ys, caches

    def backward(self, dys, cache):
        _same_number("Fork.backward", "gradients", dys, cache)
        dx = None
        for layer, dy, c in zip(self.parts.values(), dys, cache):
            if dy is not None:
                dx = _sum(dx, layer.backward(dy, c))
        return dx


class Shared(Composite):
    """One layer, the part "layer", for each x of a list: the heads of a pyramid. Parameter gradients add up over all of them."""

    def __init__(self, layer):
        super().__init__(layer=layer)

    def forward(self, xs, train=False, rng=None):
        ys, caches = [], []
        for x in xs:
            y, cache = self.parts["layer"].forward(x, train, rng)
            ys.append(y)
            caches.append(cache)
        return ys, caches

    def backward(self, dys, cache):
        """dys: one a map; None where a map has no gradient, which then gets None."""
        _same_number("Shared.backward", "gradients", dys, cache)
        return [None if dy is None else self.parts["layer"].backward(dy, c) for dy, c in zip(dys, cache)]


class Concat(Fork):
    """A Fork whose outputs are joined along the channels (ops.concat) into one y."""

    def forward(self, x, train=False, rng=None):
        ys, caches = super().forward(x, train, rng)
        y, cache = concat.forward(ys)
        return y, (caches, cache)

    def backward(self, dy, cache):
        return super().backward(concat.backward(dy, cache[1]), cache[0])


def _sum(a, b):
    """a + b, where None stands for no gradient; of two lists, as a part that takes a list sends back, the list of the sums."""
    if isinstance(a, list) and isinstance(b, list):
        return [_sum(x, y) for x, y in zip(a, b, strict=True)]
    return b if a is None else a if b is None else a + b


def _same_number(op, name, given, cache):
    if len(given) != len(cache):
        raise ValueError(f"{op}: {name} must be {len(cache)}, one for each output, got {len(given)}")


# What is done with a whole net

def fold(layer):
    """A copy of the net in which every BatchNorm right behind a Conv2D of a Sequential is folded into it (batch_norm.fold).

    It answers as the net does at test time, up to rounding, and faster; names of the other parts stay, and the ReLU of a BatchNorm
    that has one becomes that of the Conv2D. The net itself stays as it is.
    A Composite of your own must reach its parts through self.parts: an attribute of its own would still hold the unfolded layer.
    """
    layer = copy.copy(layer)
    if not isinstance(layer, Composite):
        layer.params = {k: v.copy() for k, v in layer.params.items()}
        layer.state = {k: v.copy() for k, v in layer.state.items()}
        layer.grads = {k: array_module(v).zeros_like(v) for k, v in layer.params.items()}
        return layer
    parts, before = {}, None                                            # before: the copy of the layer that x has just left
    for name, part in layer.parts.items():
        if type(layer) is Sequential and type(part) is BatchNorm and type(before) is Conv2D and not before.relu:
            p, arrays = before.params, part.arrays()
            p["w"], p["b"] = batch_norm.fold(p["w"], p["b"], *(arrays[k] for k in ("gamma", "beta", "mean", "var")), part.eps)
            before.relu = part.relu
        else:
            before = parts[name] = fold(part)
    layer.parts = parts
    return layer


def named(parts, kind=Sequential, **options):
    """A Sequential or Stages of parts, a mapping by the names that they go by (in params and arrays) in place of numbers."""
    chain = kind(*parts.values(), **options)
    chain.parts = dict(parts)
    return chain


def from_channels_first(arrays):
    """Published weights in this project's layout: conv (Cout, Cin, kh, kw) to (kh, kw, Cin, Cout), linear (Cout, Cin) to (Cin, Cout).

    arrays: a mapping by name; arrays of other dimensions stay. Returns a dict of C-contiguous copies. A linear layer behind a flattened
    (C, H, W) map must first be reshaped to the convolution (Cout, C, H, W) that it is.
    """
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}
    return {name: np.array(a.transpose(axes.get(a.ndim)) if a.ndim in axes else a, order="C") for name, a in arrays.items()}


def load(layer, arrays, source="weights", cast=False):
    """Copy arrays, a mapping by name as layer.arrays() gives, into the layer. source: the file, for the message.

    cast=True converts floating dtypes into the layer's, for published weights. Raises ValueError naming all that is missing,
    too much, misshapen, of another dtype or not finite (after conversion, too); nothing is copied then.
    """
    own = layer.arrays()
    for name, a in fitting("layers.load", source, arrays, own, cast=cast).items():
        own[name][...] = array_module(own[name]).asarray(a)
