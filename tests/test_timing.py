"""examples/timing.py, which the benchmarks share: turns, ratios and memory by hand."""
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
timing = importlib.import_module("timing")


def test_ratios_by_hand():
    told = timing.told({"ours": [1.0, 2.0, 4.0], "loop": [2.0, 6.0, 4.0]}, [("loop", "ours")])
    assert told == {"seconds": {"ours": 2.0, "loop": 4.0}, "ratio": {"loop / ours": 2.0}, "quartiles": {"loop / ours": [1.5, 2.5]}}


def test_sides_take_turns_in_going_first(monkeypatch):
    monkeypatch.setattr(timing, "SHORT", 0)                         # nothing runs untimed
    order = []
    times = timing.measure({k: lambda k=k: order.append(k) for k in "abc"}, 2, lambda: order.append("."))
    assert "".join(order) == "".join(f".{k}." for k in "abcbcacab") and all(len(t) == 2 and min(t) > 0 for t in times.values())
    monkeypatch.setattr(timing, "SHORT", 9)
    order.clear()
    timing.measure({"a": lambda: order.append("a")}, 2)
    assert len(order) == 5                                          # twice in every turn but the first


def test_memory_counts_what_is_held_and_the_result():
    def run():
        first = np.ones(3 * 2**17)                                  # 3 MB
        return first[:1] + np.ones(2**17)

    found = timing.memory(run, np.zeros(1))
    assert 5 < found["traced"] < 5.1 and found["resident"] >= 0     # 3 MB, 1 MB and their sum


def test_a_process_of_its_own(tmp_path):
    program = tmp_path / "p.py"
    program.write_text("import json, sys\nprint('a line before')\nprint(json.dumps(sys.argv[1:]))\nsys.exit(sys.argv[1] == 'fail')\n")
    assert timing.fresh(program, ["--probe", 3]) == ["--probe", "3"]
    program.write_text("import sys\nsys.exit('no memory')\n")
    with pytest.raises(ValueError, match="p.py --probe must end well, got: no memory"):
        timing.fresh(program, ["--probe"])


def test_the_machine_is_told(monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "7")
    told = timing.settings(("NUMBA_NUM_THREADS", "NO_SUCH_VARIABLE"))
    assert told["environment"] == {"NUMBA_NUM_THREADS": "7", "NO_SUCH_VARIABLE": None} and told["versions"]["numpy"] == np.__version__
