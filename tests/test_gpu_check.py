"""The script for a GPU, without one: each step has its limit, and what was done is on disk after each."""
import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "examples" / "gpu_check.py")
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


def arguments(out, **changed):
    return Namespace(**{"out": out, "only": None, "quick": False, "dry_run": False, **changed})


def program(code):
    return [sys.executable, "-c", code]


def test_a_step_that_fails_hangs_or_is_missing_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    seen = f"import json; print(sorted(json.load(open({str(tmp_path / 'steps.json')!r}))['steps']))"
    monkeypatch.setattr(check, "steps", lambda args: {
        "a": (program("print('fine')"), 60, {}), "b, wrong": (program("print('x' * 9); raise SystemExit(3)"), 60, {}),
        "c": (program("import time; print('begun'); time.sleep(60)"), 1.5, {}), "d": (None, "a reason", {}), "e": (["no such program"], 5, {}),
        "f": (program(seen + "; import os; print(os.environ['X'])"), 60, {"X": "given"})})
    assert check.main(arguments(tmp_path)) == 1
    steps = json.loads((tmp_path / "steps.json").read_text())["steps"]
    assert {k: v["status"] for k, v in steps.items()} == {"a": 0, "b, wrong": 3, "c": "stopped after 1.5 s", "d": "skipped", "f": 0,
                                                          "e": steps["e"]["status"]} and "no such program" in steps["e"]["status"]
    assert steps["a"]["tail"] == ["fine"] and steps["c"]["tail"] == ["begun"] and steps["d"]["reason"] == "a reason"
    assert steps["f"]["tail"] == ["['a', 'b, wrong', 'c', 'd', 'e']", "given"]
    assert (tmp_path / "b-wrong.log").read_text() == "x" * 9 + "\n"
    assert "failed: b, wrong, c, e" in capsys.readouterr().out


@pytest.mark.parametrize("dry", [False, True])
def test_the_steps_and_their_limits(tmp_path, dry, monkeypatch):
    monkeypatch.setattr(check.shutil, "which", lambda name: f"/bin/{name}")
    found = check.steps(arguments(tmp_path, dry_run=dry))
    kinds = {name.split(",")[0] for name in found}
    assert kinds == {"versions", "tests", "sanitizer", "bench", "example"} and sum(limit for _, limit, _ in found.values()) <= 570
    assert dry or [name for name in found if "sanitizer" in name] == [f"sanitizer, {tool}" for tool in check.TOOLS]
    for command, *_ in found.values():                                  # what they run is there
        assert all((ROOT / word).exists() for word in command if word.startswith(("tests", "examples/")))
    monkeypatch.setattr(check.shutil, "which", lambda name: None)
    assert dry or check.steps(arguments(tmp_path))["sanitizer, memcheck"][:2] == (None, "compute-sanitizer is not on the PATH")


def test_a_dry_run_of_a_step(tmp_path):
    assert check.main(arguments(tmp_path, dry_run=True, only=["versions"])) == 0
    assert json.loads((tmp_path / "steps.json").read_text())["dry_run"]
