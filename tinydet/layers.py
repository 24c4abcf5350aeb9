"""Layers: thin classes that hold parameters around the ops. The caller holds the cache."""
import numpy as np

from tinydet.ops import batch_norm, conv, dropout, max_pool, offset_pool, relu


class Layer:
    """Base: `params` and `grads` (same keys, same shapes), `state` (arrays that are saved but not trained), `forward`, `backward`.

    forward(x, train=False, rng=None) returns y and cache; train chooses batch statistics and dropout, whose mask comes from rng
    (a numpy Generator). backward(dy, cache) returns dx and ADDS the parameter gradients to `grads`: a head that is shared by
    several scales runs several times before the optimiser clears them. layer(x) is forward without the cache.
    """

    def __init__(self, **params):
        self.params = params
        self.grads = {k: np.zeros_like(v) for k, v in params.items()}
        self.state = {}

    def __call__(self, x):
        return self.forward(x)[0]

    def arrays(self):
        """Every array that makes up the layer, by name: parameters and state."""
        return {**self.params, **self.state}

    def _add(self, **grads):
        for k, g in grads.items():
            self.grads[k] += g


class Conv2D(Layer):
    """Convolution kxk (ops.conv), Cin -> Cout. Weights by He's rule N(0, 2/(k*k*Cin)), or N(0, std^2); bias 0.

    input_grad=False: backward returns None, for a layer that sees the image. dtype float32 or float64.
    """

    def __init__(self, Cin, Cout, size, stride=1, pad=0, dilation=1, *, rng, std=None, input_grad=True, dtype=np.float32):
        std = np.sqrt(2 / (size * size * Cin)) if std is None else std
        super().__init__(w=(rng.standard_normal((size, size, Cin, Cout)) * std).astype(dtype), b=np.zeros(Cout, dtype))
        self.stride, self.pad, self.dilation, self.input_grad = stride, pad, dilation, input_grad

    def forward(self, x, train=False, rng=None):
        return conv.forward(x, self.params["w"], self.params["b"], self.stride, self.pad, self.dilation)

    def backward(self, dy, cache):
        dx, dw, db = conv.backward(dy, cache, self.input_grad)
        self._add(w=dw, b=db)
        return dx


class BatchNorm(Layer):
    """Batch normalisation (ops.batch_norm) with running averages: run = momentum * run + (1 - momentum) * batch.

    train=True uses the batch's mean and variance and updates the averages (variance unbiased, m/(m - 1)); train=False uses
    the averages. frozen=True always uses them.
    """

    def __init__(self, C, momentum=0.9, eps=1e-5, frozen=False, dtype=np.float32):
        super().__init__(gamma=np.ones(C, dtype), beta=np.zeros(C, dtype))
        self.state = {"mean": np.zeros(C, dtype), "var": np.ones(C, dtype)}
        self.momentum, self.eps, self.frozen = momentum, eps, frozen

    def forward(self, x, train=False, rng=None):
        gamma, beta = self.params["gamma"], self.params["beta"]
        if not train or self.frozen:
            return batch_norm.forward_frozen(x, gamma, beta, self.state["mean"], self.state["var"], self.eps)
        y, cache, (mean, var) = batch_norm.forward(x, gamma, beta, self.eps)
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


class MaxPool(Layer):
    """Max pooling (ops.max_pool), floor at the border."""

    def __init__(self, size, stride=None):
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, x, train=False, rng=None):
        return max_pool.forward(x, self.size, self.stride)

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


class Dropout(Layer):
    """Inverted dropout (ops.dropout) with train=True, the identity otherwise."""

    def __init__(self, p=0.5):
        super().__init__()
        self.p = p

    def forward(self, x, train=False, rng=None):
        if not train:
            return x, None
        if rng is None:
            raise ValueError("Dropout.forward: train=True needs rng, a numpy.random.Generator, got None")
        return dropout.forward(x, self.p, rng)

    def backward(self, dy, cache):
        return dy if cache is None else dropout.backward(dy, cache)


class Composite(Layer):
    """A layer made of named parts. `params`, `grads` and `state` are those of the parts, named "<part>.<name>"."""

    def __init__(self, **parts):
        self.parts = parts

    def _collect(self, attribute):
        return {f"{part}.{k}": v for part, layer in self.parts.items() for k, v in getattr(layer, attribute).items()}

    params = property(lambda self: self._collect("params"))
    grads = property(lambda self: self._collect("grads"))
    state = property(lambda self: self._collect("state"))


class Sequential(Composite):
    """Layers one after the other; the parts are named "0", "1", ..."""

    def __init__(self, *layers):
        super().__init__(**{str(i): layer for i, layer in enumerate(layers)})

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
        for layer, c in zip(reversed(self.parts.values()), reversed(cache)):
            dy = layer.backward(dy, c)
        return dy


def load(layer, arrays, source="weights"):
    """Copy arrays, a mapping by name as layer.arrays() gives, into the layer.

    Raises ValueError naming what is missing, misshapen, too much or not finite; nothing is copied then. source: the file, for the message.
    """
    own = layer.arrays()
    for name, target in own.items():
        if name not in arrays:
            raise ValueError(f"layers.load: {source} lacks the array {name}")
        if arrays[name].shape != target.shape:
            raise ValueError(f"layers.load: {source}: {name} must have shape {target.shape}, got {arrays[name].shape}")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"layers.load: {source}: {name} must be finite, got NaN or infinity")
    if extra := sorted(set(arrays) - set(own)):
        raise ValueError(f"layers.load: {source} holds arrays that the model lacks: {', '.join(extra)}")
    for name, target in own.items():
        target[...] = arrays[name]
