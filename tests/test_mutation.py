"""The mutation table (mutation.py): its mutants, its sample, and what counts as killed."""
import ast
import json

import pytest

import mutation

SOURCE = '''"""Docstring with 1 + 2."""
import numpy as np

LIMIT: tuple[1, 2] = -3


@np.vectorize(cache=True)
def é(x, n: 4 = 5, flag=True) -> 6:
    """x - 7, not x."""
    if not flag and (x[0, n]
                     # <= here it is not
                     < n):
        raise ValueError(f"{n + 8} - {x}" + "9")
    x[n, flag, 0, x] *= (x) // (n - 0.5) ** 2
    y = min(x, n) % np.maximum(0.0, x) @ f(x, n) / f(n, n) | f(x, key=n) << -x
    return ~y if n is not None or n == x else "é" + f"{np.argmax(x)}" in x
'''


def test_every_kind_of_mutant_and_no_other():
    assert [m.id.removeprefix("f.py:") for m in mutation.mutants("f.py", SOURCE)] == [
        "4:22 - removed", "4:23 3 -> 2", "4:23 3 -> 4", "8:17 5 -> 4", "8:17 5 -> 6", "8:25 True -> False",
        "10:8 not removed", "10:17 and -> or", "10:24 0 -> -1", "10:24 0 -> 1", "12:22 < -> <=",
        "14:7 n, flag -> flag, n", "14:10 flag, 0, x -> x, 0, flag", "14:16 0 -> -1", "14:16 0 -> 1", "14:22 * -> /", "14:29 // -> *",
        "14:35 - -> +", "14:37 0.5 -> 1.0", "14:42 ** -> *", "14:45 2 -> 1", "14:45 2 -> 3",
        "15:9 min -> max", "15:19 % -> *", "15:24 maximum -> minimum", "15:32 0.0 -> 1.0", "15:44 x, n -> n, x", "15:50 / -> *",
        "15:60 | -> &", "15:74 << -> >>", "15:77 - removed",
        "16:12 ~ removed", "16:20 is not -> is", "16:32 or -> and", "16:37 == -> !=", "16:51 + -> -", "16:59 argmax -> argmin",
        "16:71 in -> not in"]


def test_a_mutant_changes_one_place_and_nothing_else():
    m = {m.id: m for m in mutation.mutants("f.py", SOURCE)}["f.py:12:22 < -> <="]
    assert (m.before, m.after, m.change) == ("< n):", "<= n):", "f.py: < n): -> <= n):")
    assert m.source == SOURCE.replace(" < n", " <= n")
    assert mutation.mutants("f.py", "f(a,\n  b)  # why\n")[0].after == "f(b, a)  # why"


@pytest.mark.parametrize("path", ["tinydet/ops/boxes.py", "tinydet/ops/nms.py"])
def test_every_mutant_of_an_op_parses_and_differs(path):
    source = (mutation.ROOT / path).read_text()
    found, tree = mutation.mutants(path, source), ast.dump(ast.parse(source))
    assert len(found) > 50 and len({m.id for m in found}) == len(found)
    for m in found:
        assert ast.dump(ast.parse(m.source)) != tree, m.id


def test_the_sample_is_seeded_and_shared_out_and_grows():
    found = {path: mutation.mutants(path, source) for path, source in (("a", SOURCE * 10), ("b", SOURCE), ("c", "x = 1 + 2"))}
    chosen = mutation.sample(found, 40, seed=0)
    count = {path: sum(m.path == path for m in chosen) for path in found}
    assert count == {"a": 36, "b": 4, "c": 3}
    assert chosen == mutation.sample(found, 40, seed=0) != mutation.sample(found, 40, seed=1)
    assert set(chosen) < set(mutation.sample(found, 80, seed=0))
    assert {m.path for m in mutation.sample(found, 10**6, 0)} == set(found)
    assert len(mutation.sample(found, 10**6, 0)) == sum(map(len, found.values()))


@pytest.mark.parametrize("status, output, expected", [
    (0, "", "passed"), (1, "1 failed", "killed"), (1, "\n____ ERROR collecting tests/test_x.py ____\n", "crash"), (2, "", "crash"),
    (3, "", "crash"), (-11, "", "crash"), (4, "ImportError while loading conftest 'conftest.py'", "crash")])
def test_outcome_of_an_exit_status(status, output, expected):
    assert mutation.outcome(status, output) == expected


@pytest.mark.parametrize("status", [4, 5])
def test_a_usage_error_or_no_tests_is_never_a_kill(status):
    with pytest.raises(mutation.Wrong, match=f"pytest ended with status {status}"):
        mutation.outcome(status, "")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package of one op with tests, whose mutants are few. The tests run without plugins, which take time to load."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name, text in (("tinydet/__init__.py", ""), ("tinydet/ops/x.py", "def f(a, b):\n    return a + b\n"), ("pyproject.toml", ""),
                       ("tests/test_x.py", "from tinydet.ops.x import f\ndef test_f():\n    assert f(2, 2) == 4\n")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run(project, *more):
    return mutation.main(["--files", "tinydet/ops/*.py", "--out", str(project / "out.json"), *more], root=project)


def test_the_table_of_a_small_project(project, monkeypatch, capsys):
    op, test = project / "tinydet/ops/x.py", project / "tests/test_x.py"
    assert run(project) == 0                                            # + -> - is killed
    test.write_text(test.read_text().replace("f(2, 2) == 4", "f(2, 0) == 2"))
    assert run(project) == 1                                            # the test changed: tested anew, survives
    assert "survived: tinydet/ops/x.py:2:14 + -> -\n  - return a + b\n  + return a - b" in capsys.readouterr().out
    assert sorted(r["outcome"] for r in json.loads((project / "out.json").read_text()).values()) == ["killed", "survived"]
    monkeypatch.setattr(mutation, "EQUIVALENT", {"tinydet/ops/x.py: return a + b -> return a - b": "for this test"})
    monkeypatch.setattr(mutation, "judge", None)                        # nothing is run again
    assert run(project) == 0
    assert "equivalent: for this test" in capsys.readouterr().out
    assert op.read_text() == "def f(a, b):\n    return a + b\n"         # the checkout is never written to


def test_a_failing_test_without_mutants_stops_the_table(project, capsys):
    test = project / "tests/test_x.py"
    test.write_text(test.read_text().replace("== 4", "== 5"))
    assert run(project) == 2
    assert "tests/test_x.py must pass without any mutant, got killed" in capsys.readouterr().out
    test.unlink()
    assert run(project) == 2
    assert "no test matches tinydet/ops/x.py" in capsys.readouterr().out


def test_timeout_and_crash(project):
    test = project / "tests/test_x.py"
    test.write_text("def test_it():\n    while True:\n        pass\n")
    assert mutation.run_tests(project, "tests/test_x.py", 0.7)[0] == "timeout"
    test.write_text("import nonsense\ndef test_it():\n    pass\n")
    assert mutation.run_tests(project, "tests/test_x.py", 60)[0] == "crash"


def test_functions_compiled_from_the_mutated_file_are_forgotten(project):
    cache = project / "tinydet/ops/__pycache__"
    cache.mkdir()
    (project / "tinydet/ops/y.py").write_text("from tinydet.ops import x\n")
    (project / "tinydet/ops/z.py").write_text("from tinydet.ops.y import g\n")
    (project / "tinydet/ops/xx.py").write_text("import math\n")
    for stem in ("x", "y", "z", "xx"):
        (cache / f"{stem}.f-1.py311.nbi").touch()
    mutation.forget(project, "tinydet/ops/x.py")
    assert [f.name for f in cache.iterdir()] == ["xx.f-1.py311.nbi"]
