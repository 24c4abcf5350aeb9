"""README is true: its code prints what it says, its files exist."""
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


PROGRAMS = re.findall(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code, output", PROGRAMS, ids=["own gradient", "a kernel on the CPU", "ten lines"])
def test_programs_print_what_readme_says(code, output):
    assert README.count("```python") == len(PROGRAMS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout == output, done.stderr[-2000:]


def test_files_that_readme_names_exist():
    named = set(re.findall(r"\]\(([\w./-]+)\)", README)) | {
        p for p in re.findall(r"(?<![\w/])((?:tinydet|examples|kernels|tests)/[\w./-]*[\w/])", README)}
    named |= {f"tinydet/{p}" for p in re.findall(r"`(ops/\w+\.py)`", README)}
    assert len(named) > 8
    for name in sorted(named):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("program", sorted(p.name for p in (ROOT / "examples").glob("*.py") if "__main__" in p.read_text()))
def test_every_example_tells_how_it_is_used(program, monkeypatch, capsys, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not here: its threads')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")                      # as Python does for a file that it is called with
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "examples" / program), run_name="__main__")
    assert not stop.value.code and f"python examples/{program}" in capsys.readouterr().out and f"examples/{program}" in README


def test_links_to_sections_lead_there():
    """As GitHub makes anchors: lower case, spaces to hyphens, other marks dropped."""
    headings = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", README, flags=re.S), re.M)}
    linked = set(re.findall(r"\]\(#([^)]+)\)", README))
    assert len(linked) >= 5 and linked <= headings, linked - headings


def places(text):
    """(file, name) of every place that a table's cell names: `file.py`: `name`, `Class.name`, ..., also of several files in a row."""
    found, file = [], None
    for quoted in re.findall(r"`([^`]+)`", text):
        if re.fullmatch(r"[\w/.]+\.(py|cu)", quoted):
            file = next((p for p in (quoted, f"tinydet/{quoted}", f"tinydet/models/{quoted}") if (ROOT / p).is_file()), quoted)
        elif file and re.fullmatch(r"[A-Za-z_][\w.]*(\[\"\w+\"\])?", quoted):
            found.append((file, re.sub(r"\[.*", "", quoted)))
    return found


def test_the_steps_of_the_papers_are_where_readme_says():
    """Every function, class, method, field or constant of the tables "step | ... | code | whose" and "part | ... | code" is defined in its file."""
    tables = re.findall(r"^\| (?:step|part) \|.*\| code \|.*\n(?:\|.*\n)+", README, re.M)
    rows = [row.replace(r"\|", "") for table in tables for row in table.splitlines()[2:]]
    named = {place for row in rows for place in places(row.split(" | ")[2])}
    assert len(tables) == 6 and len(rows) > 90 and len(named) > 150
    for file, name in sorted(named):
        text = (ROOT / file).read_text()
        for part in name.split("."):
            assert re.search(rf"(def|class|void|real|int|double) {part}\b|^\s*{part}\b[^=(\n]*=[^=]|^\s*{part}: |self\.{part}\b.*=|[(,] *{part}=", text, re.M), (file, name)
