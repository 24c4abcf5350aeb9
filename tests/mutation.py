"""Mutation testing: change one operator, sign, index or constant at a time and see whether a test fails.

    python tests/mutation.py [--mutants 240] [--seed 0] [--workers 2] [--files GLOB...] [--list-only] [--out runs/mutation.json]

Mutants (columns count from 1):
- + <-> -, * <-> /, and //, %, ** -> *; << <-> >>, & <-> |; the same in augmented assignments (@ stays)
- < <-> <=, > <-> >=, == <-> !=, is <-> is not, in <-> not in, and <-> or
- not, unary minus and ~ removed
- integers n -> n + 1 and n -> n - 1, floats x -> 2 x and 0.0 -> 1.0, True <-> False
- two neighbouring names of a multi-index exchanged: a[u, v] -> a[v, u]
- min <-> max, minimum <-> maximum, argmin <-> argmax where they are called
- the two arguments of a call exchanged, except of min, max, minimum and maximum, where that changes nothing

Left out: strings (so docstrings too), `raise` statements with their messages, decorators, imports, annotations; and, before
Python 3.12, an expression in an f-string where the parser gives a position at which it does not stand.

The sample is seeded; each file gets its share of the mutants, at least 3. The same seed and sources give the same mutants, and a
larger --mutants contains the smaller sample. The tests that match a file (MATCHING) run one test file after the other until one
fails, in a fresh copy of the tree for each mutant: nothing is written to the checkout but --out. Outcomes: killed (a test fails),
crash (the tests cannot be collected, or the interpreter dies), timeout, survived; all but the last count as killed. --out keeps
the outcomes: a rerun continues, and tests anew where the mutated file, its tests or conftest.py changed (other files are not
looked at: delete --out after a change there). Exit status 0: at least 95 % killed, not counting EQUIVALENT mutants; 1: fewer;
2: something is wrong, such as a test that fails without any mutant.
"""
import argparse
import ast
import hashlib
import json
import os
import queue
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

ROOT = Path(__file__).resolve().parents[1]
TREE = ("tinydet", "tests", "kernels", "examples", "README.md", "pyproject.toml")       # what a copy holds
FILES = ("tinydet/ops/*.py", "tinydet/layers.py", "tinydet/optim.py", "tinydet/simd.py", "tinydet/workspace.py")
OPS = ("tests/test_{stem}.py", "tests/test_every_op.py", "tests/test_layers.py")        # in this order; missing ones are skipped
MATCHING = {
    "tinydet/layers.py": ("tests/test_layers.py", "tests/test_composition.py", "tests/test_checkpoints.py", "tests/test_summary.py",
                           "tests/test_every_op.py"),
    "tinydet/optim.py": ("tests/test_optim.py",),
    "tinydet/simd.py": ("tests/test_simd.py", "tests/test_conv_direct.py", "tests/test_conv_winograd.py"),
    "tinydet/workspace.py": ("tests/test_workspace.py",),
}
PASS = 95                       # per cent killed
LIMIT, TIMES = 60, 5            # a test file may take so many seconds, or so many times what it takes unmutated with a cold cache
MEMORY = 8 << 30                # bytes of address space: an endless loop that appends must not fill the machine

# Mutants that no test can kill: "file: line -> mutated line" (as the report prints them) and the reason.
EQUIVALENT = {
    "tinydet/ops/conv.py: if kh == kw == stride == 1 and not any(pad): -> if kh == kw == stride == 0 and not any(pad):":
        "speed only: without the short way the general one gives the same",
    "tinydet/ops/lrn.py: _normalise(np.ascontiguousarray(x).reshape(-1, C), y.reshape(-1, C), s.reshape(-1, C), half, a, beta, k) -> _normalise(np.ascontiguousarray(x).reshape(-1, C), y.reshape(-2, C), s.reshape(-1, C), half, a, beta, k)":
        "NumPy takes every negative length as the open one",
    "tinydet/ops/lrn.py: squares = np.zeros(C + 2 * half, x.dtype) -> squares = np.zeros(C + 3 * half, x.dtype)":
        "a longer border of zeros",
    "tinydet/ops/merge.py: places[r, 2] = max(0.0, boxes[r, 2] - boxes[r, 0]) * max(0.0, boxes[r, 3] - boxes[r, 1]) -> places[r, 2] = max(0.0, boxes[r, 2] - boxes[r, 0]) * max(1.0, boxes[r, 3] - boxes[r, 1])":
        "rules out fewer pairs early: speed only",
    "tinydet/ops/merge.py: area = (places[r, 2] + places[s, 2]) / 2 if kind == 0 else 1.0 -> area = (places[r, 2] + places[s, 2]) / 2 if kind == 0 else 2.0":
        "rules out fewer pairs early: speed only",
    "tinydet/ops/merge.py: area = (places[r, 2] + places[s, 2]) / 2 if kind == 0 else 1.0 -> area = (places[r, 2] + places[s, 2]) * 2 if kind == 0 else 1.0":
        "rules out fewer pairs early: speed only",
    "tinydet/ops/merge.py: return kind != 2 and bound >= 0 and dx * dx + dy * dy > bound * bound * area * (1 + 1e-9)      # \"diff\" has no such bound -> return kind != 2 and bound >= -1 and dx * dx + dy * dy > bound * bound * area * (1 + 1e-9)      # \"diff\" has no such bound":
        "scores of these kinds are never negative, so above a negative bound anyway",
    "tinydet/ops/assign.py: for m in range(p * PART, min((p + 1) * PART, len(anchors))): -> for m in range(p / PART, min((p + 1) * PART, len(anchors))):":
        "goes through the anchors of earlier parts again, to the same result",
    "tinydet/ops/logistic_loss.py: return xp.where(x >= 0, 1, e) / (1 + e) -> return xp.where(x > 0, 1, e) / (1 + e)":
        "at 0 both are 1/2",
    "tinydet/ops/max_pool.py: H, W = (oh - 1) * stride + reach[0], (ow - 1) * stride + reach[1]   # of the padded image, as far as windows reach -> H, W = (oh - 0) * stride + reach[0], (ow - 1) * stride + reach[1]   # of the padded image, as far as windows reach":
        "a larger buffer of padding",
    "tinydet/ops/merge.py: a = -1 -> a = -2":
        "only its sign is read",
    "tinydet/ops/offset_pool.py: F = array_module(maps[0]).zeros((len(maps[0]), H, W, maps[0].shape[3]), maps[0].dtype) -> F = array_module(maps[0]).zeros((len(maps[-1]), H, W, maps[0].shape[3]), maps[0].dtype)":
        "maps that differ raise the same error below",
    "tinydet/ops/offset_pool.py: F = array_module(maps[0]).zeros((len(maps[0]), H, W, maps[0].shape[3]), maps[0].dtype) -> F = array_module(maps[0]).zeros((len(maps[0]), H, W, maps[-1].shape[3]), maps[0].dtype)":
        "maps that differ raise the same error below",
    "tinydet/ops/offset_pool.py: F = array_module(maps[0]).zeros((len(maps[0]), H, W, maps[0].shape[3]), maps[0].dtype) -> F = array_module(maps[-1]).zeros((len(maps[0]), H, W, maps[0].shape[3]), maps[0].dtype)":
        "the maps lie on one device",
    "tinydet/ops/soft_nms.py: iou = inter / np.where(union > 0, union, 1)             # inter is 0 where the union is -> iou = inter / np.where(union > 0, union, 2)             # inter is 0 where the union is":
        "inter is 0 where the union is",
    "tinydet/ops/logistic_loss.py: z = np.where(counts, -t * x, 0) -> z = np.where(counts, -t * x, 1)":
        "what stands in for entries that count nowhere",
    "tinydet/layers.py: return _sum(dx, self.parts[\"shortcut\"].backward(db, cache[1]) if \"shortcut\" in self.parts else db) -> return _sum(self.parts[\"shortcut\"].backward(db, cache[1]) if \"shortcut\" in self.parts else db, dx)":
        "a sum",
    "tinydet/ops/box_loss.py: curve = np.where(inside, d * d / (4 * half) if beta else 0, size - half) -> curve = np.where(inside, d * d / (4 * half) if beta else -1, size - half)":
        "beta = 0: nothing is inside, so the value is never chosen",
}

SWAPS = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
         ast.Mod: ("%", "*"), ast.Pow: ("**", "*"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"), ast.BitAnd: ("&", "|"),
         ast.BitOr: ("|", "&"), ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
         ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
         ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.And: ("and", "or"), ast.Or: ("or", "and")}
REMOVED = {ast.Not: r"not\b\s*", ast.USub: "-", ast.Invert: "~"}
CALLS = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "argmin": "argmax", "argmax": "argmin"}
SYMMETRIC = ("min", "max", "minimum", "maximum")


class Wrong(Exception):
    """The table cannot be made; no statement about any mutant."""


class Mutant(NamedTuple):
    id: str                     # path:line:column old -> new
    path: str
    before: str                 # the line, or the lines joined
    after: str
    source: str                 # of the whole file, mutated

    @property
    def change(self):
        return f"{self.path}: {self.before} -> {self.after}"


# Mutants

def mutants(path, source):
    """All mutants of a file, in order of position."""
    found = []
    for start, end, new in sorted(set(_edits(source))):
        first, last = source.rfind("\n", 0, start) + 1, source.find("\n", end)
        last = len(source) if last < 0 else last
        before, after = (" ".join(line.strip() for line in text.splitlines())
                         for text in (source[first:last], source[first:start] + new + source[end:last]))
        old = " ".join(source[start:end].split())
        at = f"{path}:{source.count(chr(10), 0, start) + 1}:{start - first + 1}"
        found.append(Mutant(f"{at} {old} -> {' '.join(new.split())}" if new else f"{at} {old} removed",
                            path, before, after, source[:start] + new + source[end:]))
    return found


def _edits(source):
    """Yield (start, end, replacement) of every mutant. An edit is made only where the text is what the syntax tree says."""
    lines = source.encode().splitlines(keepends=True)                   # the tree counts columns in bytes
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.decode()))

    def offset(line, column):
        return starts[line - 1] + len(lines[line - 1][:column].decode(errors="ignore"))

    def span(node):
        return offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)

    def stands(node):
        start, end = span(node)
        try:
            return ast.dump(ast.parse(f"({source[start:end]}\n)", mode="eval").body) == ast.dump(node)
        except SyntaxError:
            return False

    def operator(left, op, right):
        """The operator has no position of its own: between its operands stand only it, brackets and comments."""
        old, new = SWAPS.get(type(op), ("@", None))
        start, end = span(left)[1], span(right)[0]
        gap = re.sub("#.*", lambda m: " " * len(m[0]), source[start:end])
        words = r"\s+".join(map(re.escape, old.split()))
        found = re.fullmatch(rf"[\s()\\]*({words})=?[\s()\\]*", gap)
        if new and found:
            yield start + found.start(1), start + found.end(1), new

    def exchange(a, b):
        if ast.dump(a) != ast.dump(b) and stands(a) and stands(b):
            (a0, a1), (b0, b1) = span(a), span(b)
            yield a0, b1, source[b0:b1] + source[a1:b0] + source[a0:a1]

    for node in _walk(ast.parse(source)):
        if isinstance(node, ast.BinOp):
            yield from operator(node.left, node.op, node.right)
        elif isinstance(node, ast.AugAssign):
            yield from operator(node.target, node.op, node.value)
        elif isinstance(node, ast.Compare):
            for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators):
                yield from operator(left, op, right)
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:]):
                yield from operator(left, node.op, right)
        elif isinstance(node, ast.UnaryOp) and type(node.op) in REMOVED:
            if found := re.compile(REMOVED[type(node.op)]).match(source, span(node)[0]):
                yield *found.span(), ""
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float) and stands(node):
            old = node.value
            for new in [not old] if isinstance(old, bool) else [old + 1, old - 1] if isinstance(old, int) else [2 * old or 1.0]:
                yield *span(node), repr(new)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
            names = [e for e in node.slice.elts if isinstance(e, ast.Name)]
            for a, b in zip(names, names[1:]):
                yield from exchange(a, b)
        elif isinstance(node, ast.Call):
            name, end = getattr(node.func, "id", getattr(node.func, "attr", "")), span(node.func)[1]
            if name in CALLS and source.endswith(name, 0, end):
                yield end - len(name), end, CALLS[name]
            if len(node.args) == 2 and not node.keywords and name not in SYMMETRIC \
                    and not any(isinstance(a, ast.Starred) for a in node.args):
                yield from exchange(*node.args)


def _walk(node):
    """The node and all below it, without raise statements, decorators and annotations."""
    yield node
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise) \
                    and field not in ("decorator_list", "annotation", "returns"):
                yield from _walk(child)


def sample(candidates, count, seed):
    """About `count` mutants of {path: all mutants}: each file's share, at least 3 (or all that it has)."""
    total, chosen = sum(map(len, candidates.values())), []
    for path, own in candidates.items():
        share = max(3, -(-count * len(own) // total))
        shuffled = random.Random(f"{seed} {path}").sample(own, len(own))
        chosen += sorted(shuffled[:share], key=own.index)
    return chosen


# Tests

def matching(root, path):
    """The test files of a source file that exist, in the order in which they run."""
    names = [name.format(stem=Path(path).stem) for name in MATCHING.get(path, OPS)]
    found = [name for name in names if (root / name).is_file()]
    if not found:
        raise Wrong(f"no test matches {path}: none of {', '.join(names)} exists")
    return found


def _environment(folder):
    """Modules come from the copy; one thread; no .pyc, which could outlive the source that it was made from."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "NUMBA_CACHE_DIR", "NUMBA_DISABLE_JIT")}
    threads = dict.fromkeys(("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    return {**environment, **threads, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def run_tests(folder, test, limit):
    """Run one test file in a copy. Returns "passed", "killed", "crash" or "timeout", and the output."""
    with subprocess.Popen([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test], cwd=folder,
                          env=_environment(folder), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          start_new_session=True) as process:
        if hasattr(resource, "prlimit"):                                # Linux
            resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY, MEMORY))
        try:
            output = process.communicate(timeout=limit)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "timeout", process.communicate()[0].decode(errors="replace")
    return outcome(process.returncode, output), output


def outcome(status, output):
    """What pytest's exit status means. Raises Wrong where no test ran, or pytest was called wrongly."""
    if status in (4, 5) and "while loading conftest" not in output:
        raise Wrong(f"pytest ended with status {status} (4: usage error, 5: no tests):\n{output}")
    if status == 1 and not re.search("^_+ ERROR collecting ", output, re.MULTILINE):
        return "killed"
    return "passed" if status == 0 else "crash"


def baseline(root, folder, tests):
    """Copy the tree and run the tests unmutated, which fills the Numba cache. Returns the time limit of each."""
    folder.mkdir()
    for name in TREE:
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (root / name).exists():
            shutil.copy2(root / name, folder / name)
    found = subprocess.run([sys.executable, "-c", "import tinydet; print(tinydet.__file__)"], cwd=folder, env=_environment(folder),
                           capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_relative_to(folder):
        raise Wrong(f"the tests must import tinydet from {folder}, got {found}")
    limits = {}
    for test in tests:
        start = time.monotonic()
        result, output = run_tests(folder, test, 3600)
        if result != "passed":
            raise Wrong(f"{test} must pass without any mutant, got {result}:\n{output}")
        limits[test] = max(LIMIT, TIMES * (time.monotonic() - start))
    return limits


def forget(folder, path):
    """Delete compiled functions of a file and of those that import it: they may hold its code, and Numba does not look there."""
    stale, before, package = {Path(path).stem}, set(), folder / "tinydet"
    code = {file.stem: file.read_text() for file in package.rglob("*.py")}
    while stale != before:
        before, imported = stale, rf"^ *(from|import) .*\b({'|'.join(stale)})\b"
        stale = stale | {stem for stem, text in code.items() if re.search(imported, text, re.MULTILINE)}
    for file in package.rglob("*.nb[ic]"):
        if file.name.split(".")[0] in stale:
            file.unlink()


def judge(mutant, base, folder, tests, limits):
    """Run the tests against a mutant, in a fresh copy of base. Returns its outcome."""
    start = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)                                       # with Numba's cache: the copies keep their time stamps
    forget(folder, mutant.path)
    (folder / mutant.path).write_bytes(mutant.source.encode())
    for test in tests:
        result, _ = run_tests(folder, test, limits[test])
        if result != "passed":
            break
    return {"outcome": "survived" if result == "passed" else result, "by": None if result == "passed" else test,
            "seconds": round(time.monotonic() - start, 1), "before": mutant.before, "after": mutant.after}


def run_all(chosen, root, results, keys, out, workers):
    """Judge the mutants that have no result yet; each result is written to `out` as it comes."""
    left = [m for m in chosen if keys[m.id] not in results]
    if not left:
        return
    tests = {path: matching(root, path) for path in {m.path for m in left}}
    with tempfile.TemporaryDirectory(prefix="mutation-") as temporary:
        base, folders = Path(temporary).resolve() / "base", queue.SimpleQueue()
        limits = baseline(root, base, sorted({t for names in tests.values() for t in names}))
        for k in range(workers):
            folders.put(base.with_name(f"worker{k}"))
        if any(keys[m.id] != key(base, m) for m in left):
            raise Wrong("a source or test file changed while it was copied; run again")
        control = left[0]._replace(source=(base / left[0].path).read_bytes().decode())
        if (got := judge(control, base, base.with_name("worker0"), tests[control.path], limits)["outcome"]) != "survived":
            raise Wrong(f"an unchanged {control.path} must survive, got {got}")

        def work(mutant):
            folder = folders.get()
            try:
                return judge(mutant, base, folder, tests[mutant.path], limits)
            finally:
                folders.put(folder)

        pool = ThreadPoolExecutor(workers)                              # the work is done by the pytest processes
        jobs = {pool.submit(work, m): m for m in left}
        bar = tqdm(total=len(chosen), initial=len(chosen) - len(left), unit="mutant", dynamic_ncols=True) if tqdm else None
        try:
            for job in as_completed(jobs):
                result = results[keys[jobs[job].id]] = job.result()
                _write(out, results)
                if result["outcome"] == "survived":
                    (tqdm.write if tqdm else print)(f"survived: {jobs[job].id}")
                if bar is not None:
                    known = [results[keys[m.id]]["outcome"] for m in chosen if keys[m.id] in results]
                    bar.set_postfix_str(f"{len(known) - known.count('survived')} killed, {known.count('survived')} survived")
                    bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
            if bar is not None:
                bar.close()


# Results

def key(root, mutant):
    """What a result is stored under: the mutant, a hash of its file, and one of its tests."""
    tests = [root / t for t in (*matching(root, mutant.path), "tests/conftest.py") if (root / t).exists()]
    hashes = [hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12] for files in ([root / mutant.path], tests)]
    return " ".join([mutant.id, *hashes])


def _write(out, results):
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    part.write_text(json.dumps(results, indent=1))
    os.replace(part, out)


def report(chosen, outcomes):
    """Print the table and the survivors. Returns the percentage killed of the mutants that are not equivalent."""
    columns = ("mutants", "killed", "crash", "timeout", "survived", "equivalent", "% raw", "% without")
    print(f"{'file':32}" + "".join(f"{c:>11}" for c in columns))
    same = {m.id for m in chosen if outcomes[m.id] == "survived" and m.change in EQUIVALENT}
    for path in [*dict.fromkeys(m.path for m in chosen), "all"]:
        own = [m for m in chosen if path in (m.path, "all")]
        count = [sum(outcomes[m.id] == k for m in own) for k in ("killed", "crash", "timeout", "survived")]
        equal, dead = sum(m.id in same for m in own), sum(count[:3])
        raw, without = 100 * dead / len(own), 100 - 100 * (count[3] - equal) / max(1, len(own) - equal)
        print(f"{path:32}" + "".join(f"{n:11}" for n in (len(own), *count, equal)) + f"{raw:11.1f}{without:11.1f}")
    print("\nkilled % counts crash and timeout; '% without' leaves the equivalent mutants out")
    for m in chosen:
        if outcomes[m.id] == "survived":
            print(f"\nsurvived: {m.id}\n  - {m.before}\n  + {m.after}")
        if m.change in EQUIVALENT:
            print(f"  equivalent: {EQUIVALENT[m.change]}" if m.id in same
                  else f"\nlisted as equivalent, but {outcomes[m.id]}: {m.id}")
    return without


def main(argv=None, root=ROOT):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mutants", type=int, default=240, help="how many in all, at least 3 a file (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--files", nargs="+", default=FILES, metavar="GLOB", help="relative to the repository")
    parser.add_argument("--list-only", action="store_true", help="print the sample, run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/mutation.json"))
    args = parser.parse_args(argv)
    paths = [p.relative_to(root).as_posix() for pattern in args.files for p in sorted(root.glob(pattern))]
    found = {path: mutants(path, (root / path).read_bytes().decode()) for path in dict.fromkeys(paths)}
    found = {path: own for path, own in found.items() if own}
    if not found or args.mutants < 1 or args.workers < 1:
        parser.error("needs files with something to mutate, and at least one mutant and one worker")
    chosen = sample(found, args.mutants, args.seed)
    print(f"{len(chosen)} of {sum(map(len, found.values()))} mutants in {len(found)} files, seed {args.seed}")
    if args.list_only:
        for m in chosen:
            print(f"{m.id}\n  - {m.before}\n  + {m.after}")
        return 0
    try:
        keys = {m.id: key(root, m) for m in chosen}
        results = json.loads(args.out.read_text()) if args.out.exists() else {}
        _write(args.out, results)                                       # a path that cannot be written fails here
        run_all(chosen, root, results, keys, args.out, args.workers)
    except Wrong as error:
        print(f"mutation: {error}")
        return 2
    return int(report(chosen, {m.id: results[keys[m.id]]["outcome"] for m in chosen}) < PASS)


if __name__ == "__main__":
    sys.exit(main())
