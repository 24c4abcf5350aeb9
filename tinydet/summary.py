"""What a net is made of: outputs, parameters and multiply-adds, layer by layer."""
import dataclasses

import numpy as np

from tinydet.backend import array_module
from tinydet.layers import Composite


@dataclasses.dataclass
class Row:
    """One layer. name: "<part>.<part>..."; output: shape of its last output; runs: how often it ran in one forward pass."""

    name: str
    layer: str
    output: tuple
    params: int
    trained: int
    runs: int
    multiply_adds: int


@dataclasses.dataclass
class Summary:
    """The rows of a net, and their sums. print() shows the table."""

    rows: list

    @property
    def params(self):
        return sum(row.params for row in self.rows)

    @property
    def trained(self):
        return sum(row.trained for row in self.rows)

    @property
    def multiply_adds(self):
        return sum(row.multiply_adds for row in self.rows)

    def __str__(self):
        table = [("name", "layer", "output", "parameters", "multiply-adds")]
        for row in self.rows:
            runs = f" ({row.runs} runs)" if row.runs > 1 else ""
            frozen = " frozen" if row.params and not row.trained else ""
            table.append((row.name, row.layer, ("x".join(map(str, row.output)) if row.runs else "not run") + runs,
                          f"{row.params:,}{frozen}" if row.params else "", f"{row.multiply_adds:,}" if row.multiply_adds else ""))
        width = [max(len(line[k]) for line in table) for k in range(5)]
        lines = ["  ".join(cell.rjust(w) if k > 2 else cell.ljust(w) for k, (cell, w) in enumerate(zip(line, width))).rstrip() for line in table]
        return "\n".join([*lines, f"{self.params:,} parameters, {self.trained:,} of them train; {self.multiply_adds:,} multiply-adds"])


def summary(net, *inputs):
    """Run net.forward once, at test time, and tell what each layer did.

    inputs: what forward takes: arrays, or shapes such as (1, 224, 224, 3), which stand for zeros of the net's dtype, or lists of them.
    Multiply-adds count the products of convolutions and linear layers, for the inputs given (batch included), a shared layer
    as often as it runs. Layers that did not run are listed as such; one object in two places stands under its first name.
    Returns a Summary; print it. The net is left as it was. Raises ValueError for a net without layers.
    """
    leaves = {}
    for name, layer in (net.leaves() if isinstance(net, Composite) else {"": net}).items():
        if all(layer is not other for other in leaves.values()):
            leaves[name] = layer
    if not leaves:
        raise ValueError("summary.summary: net must hold a layer, got none")
    like = next(iter(net.params.values()), np.empty(0, np.float32))
    found = {name: [(), 0, 0] for name in leaves}                       # output, runs, multiply-adds
    own = {name: layer.__dict__.get("forward") for name, layer in leaves.items()}

    def watch(name, layer):
        forward = layer.forward

        def watched(x, *args, **options):
            y, cache = forward(x, *args, **options)
            found[name] = [y.shape, found[name][1] + 1, found[name][2] + layer.multiply_adds(x, y)]
            return y, cache
        layer.forward = watched                                         # on the object: its class stays as it is

    def given(x):
        return [given(v) for v in x] if isinstance(x, list) else array_module(like).zeros(x, like.dtype) if isinstance(x, tuple) else x

    try:
        for name, layer in leaves.items():
            watch(name, layer)
        net.forward(*map(given, inputs))
    finally:
        for name, layer in leaves.items():
            layer.__dict__.pop("forward", None)
            if own[name] is not None:
                layer.forward = own[name]
    return Summary([Row(name, repr(layer), found[name][0], sum(p.size for p in layer.params.values()),
                        sum(p.size for p in layer.trained.values()), *found[name][1:]) for name, layer in leaves.items()])
