"""Vector code that plain Numba loops do not give: two kinds of small functions, emitted as LLVM, for compiled code to call.

product     a block of a matrix product held in registers: C[r, v] (+)= sum_k A[r, k] * B[k, v]
gather,     Y = L X L^T for a small constant matrix L, on many channels at once: X read from an image, Y written to panels, or
scatter     X read from panels, Y written to an image (Winograd's transforms and their adjoints)

Arguments are arrays with the index of their first element and strides, all counted in elements; NOTHING is checked: callers prove
their ranges, and tests compare odd sizes with the NumPy reference. One vector is as wide as the CPU's registers, and the block is
shaped to their number: AVX-512 64 bytes and 32 registers, AVX2 32 bytes and 16, anything else 16 bytes, which LLVM turns into what the
machine has. NUMBA_CPU_FEATURES, where set, decides, as it does for Numba.

Numba's disk cache knows the text of a compiled function's own file only: `jit` makes it notice a change of this file, too.
"""
import hashlib
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

FEATURES = config.CPU_FEATURES if config.CPU_FEATURES is not None else get_host_cpu_features()
BYTES = 64 if "+avx512f" in FEATURES else 32 if "+avx2" in FEATURES else 16             # of a vector
ROWS = {4: 6, 3: 8, 2: 12, 1: 24} if BYTES == 64 else {2: 6, 1: 12}                     # rows of a block, by its width in vectors
SHORT = {4: 2, 3: 4, 2: 4, 1: 12} if BYTES == 64 else {2: 2, 1: 4}                      # the same where few rows are left
ALL_ROWS = max(ROWS.values())                                                           # a multiple of each


def lanes(dtype):
    """Numbers in one vector."""
    return BYTES // np.dtype(dtype).itemsize


def panel(C, dtype):
    """Width of the panels that C channels are cut into: the largest block width that divides C, rounded up to whole vectors."""
    vectors = -(-C // lanes(dtype))
    return lanes(dtype) * max(v for v in ROWS if vectors % v == 0)


def jit(function):
    """njit(cache=True, parallel=True) whose code on disk is taken only if this file is still the one it was compiled with."""
    compiled = njit(cache=True, parallel=True)(function)
    index = compiled._cache._cache_file                                 # Numba's own; a test notices if it moves
    index._source_stamp = index._source_stamp, hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return compiled


def whole(b, P):
    """b (C,) with zeros behind it, up to whole panels of width P."""
    return b if len(b) % P == 0 else np.concatenate([b, np.zeros(-len(b) % P, b.dtype)])


# Emitting

INDEX = ir.IntType(64)


class Emitter:
    """Arithmetic on vectors of one array's dtype."""

    def __init__(self, context, builder, dtype):
        self.context, self.builder = context, builder
        self.real = context.get_value_type(dtype)
        self.size = dtype.bitwidth // 8
        self.lanes = BYTES // self.size
        self.vector = ir.VectorType(self.real, self.lanes)
        self.mask = ir.VectorType(ir.IntType(1), self.lanes)

    def pointer(self, array_type, array, index):
        """Address of element `index` of the array's data."""
        data = self.context.make_array(array_type)(self.context, self.builder, array).data
        return self.builder.gep(data, [index])

    def index(self, n):
        return ir.Constant(INDEX, n)

    def at(self, pointer, index, type):
        """The address `index` elements on, as that of a value of `type`."""
        return self.builder.bitcast(self.builder.gep(pointer, [index]), type.as_pointer())

    def load(self, pointer, index):
        return self.builder.load(self.at(pointer, index, self.vector), align=self.size)

    def store(self, value, pointer, index):
        self.builder.store(value, self.at(pointer, index, self.vector), align=self.size)

    def first(self, n):
        """Mask of the first n lanes, none where n <= 0."""
        numbers = ir.Constant(ir.VectorType(INDEX, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", numbers, self.splat(n, ir.VectorType(INDEX, self.lanes)))

    def _masked(self, name, returns, arguments, types):
        name = f"llvm.masked.{name}.v{self.lanes}f{self.size * 8}.p0"
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(returns, types), name)
        return self.builder.call(function, arguments)

    def masked_load(self, pointer, index, mask):
        at = self.at(pointer, index, self.vector)
        align, zero = ir.Constant(ir.IntType(32), self.size), ir.Constant(self.vector, None)
        return self._masked("load", self.vector, [at, align, mask, zero], [at.type, align.type, self.mask, self.vector])

    def masked_store(self, value, pointer, index, mask):
        at, align = self.at(pointer, index, self.vector), ir.Constant(ir.IntType(32), self.size)
        self._masked("store", ir.VoidType(), [value, at, align, mask], [self.vector, at.type, align.type, self.mask])

    def splat(self, value, vector=None):
        vector = vector or self.vector
        one = self.builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined),
                                           ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count))

    def constant(self, value):
        return ir.Constant(self.vector, [float(value)] * self.lanes)

    def fma(self, a, b, c):
        """a * b + c, rounded once where the machine can (fmuladd), else twice."""
        name = f"llvm.fmuladd.v{self.lanes}f{self.size * 8}"
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(self.vector, [self.vector] * 3), name)
        return self.builder.call(function, [a, b, c])


def _void(*names):
    """Signature of an intrinsic whose arguments are arrays or integers."""
    return types.void(*(n if isinstance(n, types.Array) else types.int64 for n in names))


# C[r, v] (+)= sum A[r, k] * B[k, v]

ZERO, ADD, ROW = 0, 1, 2


def _product(vectors, rows):
    @intrinsic
    def product(typing, a, ia, a_row, a_outer, a_inner, b, ib, b_outer, b_inner, c, ic, c_row, outer, inner, columns, start, first, i_first):
        """C[r, v] = S[r, v] + sum_{i < outer, j < inner} A[ia + r*a_row + i*a_outer + j*a_inner] * B[ib + i*b_outer + j*b_inner + v], r < rows.

        C[r, v] is element ic + r*c_row + v; only its first `columns` columns are read and written. S, by start: ZERO is 0, ADD is C
        before, ROW is first[i_first + v], whole vectors.
        """
        def emit(context, builder, signature, values):
            a, ia, a_row, a_outer, a_inner, b, ib, b_outer, b_inner, c, ic, c_row, outer, inner, columns, start, first, i_first = values
            e = Emitter(context, builder, signature.args[0].dtype)
            pa, pb, pc, pf = (e.pointer(signature.args[k], values[k], values[k + 1]) for k in (0, 5, 9, 16))
            width = vectors * e.lanes
            sums = [[cgutils.alloca_once(builder, e.vector) for _ in range(vectors)] for _ in range(rows)]
            full = builder.icmp_signed(">=", columns, e.index(width))
            for row in sums:
                for s in row:
                    builder.store(ir.Constant(e.vector, None), s)

            def where(r, v):
                return builder.add(builder.mul(c_row, e.index(r)), e.index(v * e.lanes))

            def mask(v):
                return e.first(builder.sub(columns, e.index(v * e.lanes)))

            with builder.if_then(builder.icmp_signed("==", start, e.index(ROW))):
                for v in range(vectors):
                    begin = e.load(pf, e.index(v * e.lanes))
                    for row in sums:
                        builder.store(begin, row[v])
            with builder.if_then(builder.icmp_signed("==", start, e.index(ADD))):
                with builder.if_else(full) as (then, otherwise):
                    with then:
                        for r, row in enumerate(sums):
                            for v, s in enumerate(row):
                                builder.store(e.load(pc, where(r, v)), s)
                    with otherwise:
                        for v in range(vectors):
                            m = mask(v)
                            for r in range(rows):
                                builder.store(e.masked_load(pc, where(r, v), m), sums[r][v])
            with cgutils.for_range(builder, outer, intp=INDEX) as i:
                a_i = builder.gep(pa, [builder.mul(i.index, a_outer)])
                b_i = builder.gep(pb, [builder.mul(i.index, b_outer)])
                with cgutils.for_range(builder, inner, intp=INDEX) as j:
                    a_j = builder.gep(a_i, [builder.mul(j.index, a_inner)])
                    b_j = builder.gep(b_i, [builder.mul(j.index, b_inner)])
                    right = [e.load(b_j, e.index(v * e.lanes)) for v in range(vectors)]
                    for r, row in enumerate(sums):
                        left = e.splat(builder.load(builder.gep(a_j, [builder.mul(a_row, e.index(r))])))
                        for v, s in enumerate(row):
                            builder.store(e.fma(left, right[v], builder.load(s)), s)
            with builder.if_else(full) as (then, otherwise):
                with then:
                    for r, row in enumerate(sums):
                        for v, s in enumerate(row):
                            e.store(builder.load(s), pc, where(r, v))
                with otherwise:
                    for v in range(vectors):
                        m = mask(v)
                        for r in range(rows):
                            e.masked_store(builder.load(sums[r][v]), pc, where(r, v), m)
            return context.get_dummy_value()

        return _void(a, ia, a_row, a_outer, a_inner, b, ib, b_outer, b_inner, c, ic, c_row, outer, inner, columns, start, first, i_first), emit
    return product


R1, R2, R3, R4 = (ROWS.get(v, 1) for v in (1, 2, 3, 4))
S1, S2, S3, S4 = (SHORT.get(v, 1) for v in (1, 2, 3, 4))
product1, product2, short1, short2 = _product(1, R1), _product(2, R2), _product(1, S1), _product(2, S2)
product3, product4, short3, short4 = (                                                  # never called where blocks are narrower
    (_product(3, R3), _product(4, R4), _product(3, S3), _product(4, S4)) if 4 in ROWS else [short1] * 4)


@njit
def short(vectors):
    """SHORT, for compiled code."""
    return S4 if vectors == 4 else S3 if vectors == 3 else S2 if vectors == 2 else S1


@njit
def multiply(vectors, a, ia, a_row, a_outer, a_inner, b, ib, b_outer, b_inner, c, ic, c_row, rows, outer, inner, columns, start, first, i_first):
    """product for `rows` rows, block by block; the last block may go beyond them, up to a multiple of SHORT[vectors]."""
    r = 0
    if vectors == 4 and R4 > 1:
        while rows - r >= R4:
            product4(a, ia + r * a_row, a_row, a_outer, a_inner, b, ib, b_outer, b_inner, c, ic + r * c_row, c_row, outer, inner, columns,
                     start, first, i_first)
            r += R4
        while r < rows:
            short4(a, ia + r * a_row, a_row, a_outer, a_inner, b, ib, b_outer, b_inner, c, ic + r * c_row, c_row, outer, inner, columns,
                   start, first, i_first)
            r += S4
    elif vectors == 3 and R3 > 1:
        while rows - r >= R3:
            product3(a, ia + r * a_row, a_row, a_outer, a_inner, b, ib, b_outer, b_inner, c, ic + r * c_row, c_row, outer, inner, columns,
                     start, first, i_first)
            r += R3
        while r < rows:
            short3(a, ia + r * a_row, a_row, a_outer, a_inner, b, ib, b_outer, b_inner, c, ic + r * c_row, c_row, outer, inner, columns,
                   start, first, i_first)
            r += S3
    elif vectors == 2:
        while rows - r >= R2:
            product2(a, ia + r * a_row, a_row, a_outer, a_inner, b, ib, b_outer, b_inner, c, ic + r * c_row, c_row, outer, inner, columns,
                     start, first, i_first)
            r += R2
        while r < rows:
            short2(a, ia + r * a_row, a_row, a_outer, a_inner, b, ib, b_outer, b_inner, c, ic + r * c_row, c_row, outer, inner, columns,
                   start, first, i_first)
            r += S2
    else:
        while rows - r >= R1:
            product1(a, ia + r * a_row, a_row, a_outer, a_inner, b, ib, b_outer, b_inner, c, ic + r * c_row, c_row, outer, inner, columns,
                     start, first, i_first)
            r += R1
        while r < rows:
            short1(a, ia + r * a_row, a_row, a_outer, a_inner, b, ib, b_outer, b_inner, c, ic + r * c_row, c_row, outer, inner, columns,
                   start, first, i_first)
            r += S1


# Y = L X L^T

def gather(matrices):
    """An intrinsic: X from an image, Y = L X L^T to panels. X is q x q vectors of n channels, Y p x p; matrices: kind -> L (p, q).

    X[u, v] starts at image[i + u*row + v*col] and is 0 where u is outside r0 <= u < r1, v outside c0 <= v < c1, and beyond n channels.
    Y[s, t] goes to panels[j + (s*p + t)*step], whole vectors. A kind that is not in matrices does nothing.
    """
    @intrinsic
    def transform(typing, kind, image, i, row, col, r0, r1, c0, c1, n, panels, j, step):
        def emit(context, builder, signature, values):
            kind, image, i, row, col, r0, r1, c0, c1, n, panels, j, step = values
            e = Emitter(context, builder, signature.args[1].dtype)
            source, target = e.pointer(signature.args[1], image, i), e.pointer(signature.args[10], panels, j)
            for L in _each(builder, kind, matrices):
                p, q = L.shape
                X = _border(e, source, row, col, (r0, r1, c0, c1), n, q)
                for at, y in _apply(e, L, X).items():
                    e.store(y, target, builder.mul(step, e.index(at[0] * p + at[1])))
            return context.get_dummy_value()

        return _void(kind, image, i, row, col, r0, r1, c0, c1, n, panels, j, step), emit
    return transform


def scatter(matrices, add):
    """An intrinsic, the way back: X from panels, Y = L X L^T to an image, as in gather with the two exchanged; add: added to it."""
    @intrinsic
    def transform(typing, kind, panels, j, step, image, i, row, col, r0, r1, c0, c1, n):
        def emit(context, builder, signature, values):
            kind, panels, j, step, image, i, row, col, r0, r1, c0, c1, n = values
            e = Emitter(context, builder, signature.args[1].dtype)
            source, target = e.pointer(signature.args[1], panels, j), e.pointer(signature.args[4], image, i)
            for L in _each(builder, kind, matrices):
                p, q = L.shape
                X = {(u, v): e.load(source, builder.mul(step, e.index(u * q + v))) for u in range(q) for v in range(q)}
                Y = _apply(e, L, X)
                places = {at: _at(e, row, col, at) for at in Y}
                with builder.if_else(_inside(e, (r0, r1, c0, c1), n, p)) as (then, otherwise):
                    with then:
                        for at, y in Y.items():
                            e.store(builder.fadd(y, e.load(target, places[at])) if add else y, target, places[at])
                    with otherwise:
                        for at, y in Y.items():
                            mask = _mask(e, (r0, r1, c0, c1), n, at)
                            y = builder.fadd(y, e.masked_load(target, places[at], mask)) if add else y
                            e.masked_store(y, target, places[at], mask)
            return context.get_dummy_value()

        return _void(kind, panels, j, step, image, i, row, col, r0, r1, c0, c1, n), emit
    return transform


def _each(builder, kind, matrices):
    """Yield every matrix, with the builder where the code for its kind belongs; afterwards it stands behind them all."""
    end = builder.append_basic_block("end")
    switch = builder.switch(kind, end)
    for k, L in matrices.items():
        block = builder.append_basic_block(f"kind{k}")
        switch.add_case(ir.Constant(INDEX, k), block)
        builder.position_at_end(block)
        yield L
        builder.branch(end)
    builder.position_at_end(end)


def _at(e, row, col, at):
    return e.builder.add(e.builder.mul(row, e.index(at[0])), e.builder.mul(col, e.index(at[1])))


def _inside(e, limits, n, side):
    """Whether all side x side values lie inside the limits and fill their vectors."""
    r0, r1, c0, c1 = limits
    tests = [(r0, "<=", 0), (c0, "<=", 0), (r1, ">=", side), (c1, ">=", side), (n, ">=", e.lanes)]
    result = None
    for value, how, bound in tests:
        test = e.builder.icmp_signed(how, value, e.index(bound))
        result = test if result is None else e.builder.and_(result, test)
    return result


def _mask(e, limits, n, at):
    """The lanes that exist of value `at`: the first n, or none outside the limits."""
    r0, r1, c0, c1 = limits
    b, inside = e.builder, None
    for low, high, k in ((r0, r1, at[0]), (c0, c1, at[1])):
        test = b.and_(b.icmp_signed("<=", low, e.index(k)), b.icmp_signed(">", high, e.index(k)))
        inside = test if inside is None else b.and_(inside, test)
    return e.first(b.select(inside, n, e.index(0)))


def _border(e, source, row, col, limits, n, side):
    """Load side x side vectors, zero where they do not exist."""
    b = e.builder
    slots = {(u, v): cgutils.alloca_once(b, e.vector) for u in range(side) for v in range(side)}
    with b.if_else(_inside(e, limits, n, side)) as (then, otherwise):
        with then:
            for at, slot in slots.items():
                b.store(e.load(source, _at(e, row, col, at)), slot)
        with otherwise:
            for at, slot in slots.items():
                b.store(e.masked_load(source, _at(e, row, col, at), _mask(e, limits, n, at)), slot)
    return {at: b.load(slot) for at, slot in slots.items()}


def _apply(e, L, X):
    """L X L^T: L on every column, then on every row."""
    p, q = L.shape
    half = {}
    for v in range(q):
        for s, value in enumerate(_combine(e, L, [X[u, v] for u in range(q)])):
            half[s, v] = value
    return {(s, t): value for s in range(p) for t, value in enumerate(_combine(e, L, [half[s, v] for v in range(q)]))}


def _combine(e, L, x):
    """L x. Two rows that differ in signs only (points 1 and -1) share their sums: a + b and a - b."""
    values, done = [None] * len(L), set()
    for i in range(len(L)):
        if i in done:
            continue
        twin = next((k for k in range(i + 1, len(L)) if k not in done and np.array_equal(np.abs(L[i]), np.abs(L[k]))
                     and (L[i] * L[k] > 0).any() and (L[i] * L[k] < 0).any()), None)
        if twin is None:
            values[i] = _sum(e, L[i], x)
            continue
        done.add(twin)
        same, other = (_sum(e, np.where(sign * L[i] * L[twin] > 0, L[i], 0), x) for sign in (1, -1))
        values[i], values[twin] = e.builder.fadd(same, other), e.builder.fsub(same, other)
    return values


def _sum(e, weights, x):
    """sum weights[k] * x[k] over the weights that are not 0, the ones of size 1 first: they need no product."""
    total, b = None, e.builder
    for k in sorted(np.flatnonzero(weights), key=lambda k: abs(weights[k]) != 1):
        w = weights[k]
        if total is None:
            total = x[k] if w == 1 else b.fmul(e.constant(w), x[k])
        elif abs(w) == 1:
            total = b.fadd(total, x[k]) if w == 1 else b.fsub(total, x[k])
        else:
            total = e.fma(e.constant(w), x[k], total)
    return ir.Constant(e.vector, None) if total is None else total
