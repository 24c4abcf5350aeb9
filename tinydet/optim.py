"""Stochastic gradient descent and its learning-rate schedules."""
import math

import numpy as np


class SGD:
    """SGD with momentum and weight decay, on the `params` and `grads` of a layer.

    v = momentum * v + (g + weight_decay * w);  w = w - lr * v   (OverFeat, sec. 3.1; where lr enters is a CHOICE.)
    Decay acts on the arrays that have more than one axis, i.e. on conv weights, not on biases and gammas (CHOICE);
    decay_all=True on every one. step(lr) updates the parameters in place and clears the gradients.
    `state` holds the velocities by parameter name, for checkpoints.
    Raises FloatingPointError naming the parameter if a gradient is not finite; nothing is updated then.
    """

    def __init__(self, layer, momentum=0.9, weight_decay=0.0, decay_all=False):
        self.params, self.grads = layer.params, layer.grads
        self.momentum, self.weight_decay, self.decay_all = momentum, weight_decay, decay_all
        self.state = {k: np.zeros_like(w) for k, w in self.params.items()}

    def step(self, lr):
        for name, g in self.grads.items():
            if not np.isfinite(g).all():
                raise FloatingPointError(f"SGD.step: the gradient of {name} is not finite: lower the learning rate or check the data")
        for name, w in self.params.items():
            g, v = self.grads[name], self.state[name]
            v *= self.momentum
            v += g
            if self.weight_decay and (w.ndim > 1 or self.decay_all):
                v += self.weight_decay * w
            w -= lr * v
            g[...] = 0


def step_schedule(lr, at, factor):
    """Function of the time t (step or epoch): lr * factor^k, k = number of entries of `at` that are <= t.

    OverFeat (sec. 3.1): step_schedule(5e-2, (30, 50, 60, 70, 80), 0.5) over epochs.
    """
    return lambda t: lr * factor ** sum(t >= a for a in at)


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
