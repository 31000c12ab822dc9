"""The README tells the truth: its board is the committed one, its tree names what exists, its commands are the scripts.

Rewrite the board in the README after freezing a new one: `python tests/test_readme.py`
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MARKS = ("<!-- board -->\n", "<!-- /board -->")


def committed_table() -> str:
    lines = (ROOT / "leaderboard/phantom/README.md").read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if line.startswith("|"))


def test_the_board_is_the_committed_one() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.split(MARKS[0])[1].split(MARKS[1])[0] == committed_table()


def test_the_tree_names_what_exists() -> None:
    tree = README.read_text(encoding="utf-8").split("## Where things are")[1].split("## ")[0]
    named = re.findall(r"^      (\w+(?:/|\.py))", tree, flags=re.MULTILINE)
    package = ROOT / "ichbench"
    found = [f"{path.name}/" if path.is_dir() else path.name for path in package.iterdir() if not path.name.startswith("__")]
    assert sorted(named) == sorted(name for name in found if name != "py.typed")
    for folder in re.findall(r"^    (\w+)/ ", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir()


def test_ci_runs_the_readmes_test_command() -> None:
    assert "pip install tox && tox" in README.read_text(encoding="utf-8")
    assert 'stage "$tox"\n' in (ROOT / ".ci/run").read_text(encoding="utf-8")


def rewrite() -> None:
    text = README.read_text(encoding="utf-8")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    README.write_text(before + MARKS[0] + committed_table() + MARKS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    rewrite()
