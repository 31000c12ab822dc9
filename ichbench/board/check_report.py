"""The outcome of a check as text, JSON and JUnit XML, which is what CI servers show."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from xml.etree import ElementTree

from ichbench.board.check import Difference
from ichbench.board.summary import listed

#: How many differences the readable table spells out; JSON has all of them.
SHOWN = 40
#: Values are cut to this many characters in the readable table.
SHOWN_CHARACTERS = 34
#: The test cases of the JUnit file, and what each holds.
SUITES = {
    "recipes": "every arm has the recipe that the board was made with",
    "phantom": "the cases are the same, voxel by voxel",
    "scores": "what is not learned scores the same, bit for bit; what is learned, within the tolerance",
    "board": "the same board follows from the scores",
}


def render_check(differences: Sequence[Difference], n_compared: int) -> str:
    """The outcome as plain text; without differences one line. `n_compared` is the number of facts that were looked at: with
    none, nothing was checked, and that is not a pass."""
    if not differences and n_compared < 1:
        return "check FAILED: nothing was compared\n"
    if not differences:
        return f"check passed: {n_compared} facts compared, none differs\n"
    counts = Counter(difference.kind for difference in differences)
    summary = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    lines = [f"check FAILED: {len(differences)} differences in {n_compared} facts compared ({summary})", ""]
    table = [("kind", "where", "committed", "fresh", "what")]
    table += [(d.kind, d.where, _short(d.committed), _short(d.fresh), d.text) for d in differences[:SHOWN]]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for row in table:
        lines.append("  ".join([*(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)), row[4]]).rstrip())
    if len(differences) > SHOWN:
        rest = Counter(d.where.split("/")[0].split(":")[0] for d in differences[SHOWN:])
        lines.append(f"... and {len(differences) - SHOWN} more: " + listed(f"{count} in {name}" for name, count in sorted(rest.items())))
    return "\n".join(lines) + "\n"


def check_json(differences: Sequence[Difference], n_compared: int) -> str:
    """The outcome as JSON: passed, n_compared, differences; values as strings, because JSON has no inf and no nan."""
    outcome = {"passed": not differences and n_compared > 0, "n_compared": n_compared, "differences": [asdict(d) for d in differences]}
    return json.dumps(outcome, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_junit(differences: Sequence[Difference], n_compared: int, name: str) -> str:
    """The outcome as JUnit XML: one test case for each of `SUITES`, with its differences as the failure. `name` is the board's."""
    name = _xml_text(name)
    by_suite: dict[str, list[Difference]] = {suite: [] for suite in SUITES}
    for difference in differences:
        by_suite[_suite_of(difference)].append(difference)
    failed = sum(bool(found) for found in by_suite.values()) if n_compared > 0 else len(SUITES)
    counts = {"name": f"ichbench check {name}", "tests": str(len(SUITES)), "failures": str(failed), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", {key: value for key, value in counts.items() if key != "skipped"})
    suite = ElementTree.SubElement(root, "testsuite", counts)
    for title, text in SUITES.items():
        case = ElementTree.SubElement(suite, "testcase", {"classname": f"ichbench.check.{name}", "name": f"{title}: {text}"})
        found = by_suite[title]
        if found or n_compared < 1:
            message = f"{len(found)} differences" if found else "nothing was compared"
            failure = ElementTree.SubElement(case, "failure", {"message": message, "type": title})
            failure.text = "\n".join(_xml_text(_line(difference)) for difference in found) or message
    ElementTree.SubElement(suite, "system-out").text = f"{n_compared} facts compared"
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suite_of(difference: Difference) -> str:
    if difference.where.startswith("recipes/"):
        return "recipes"
    if "digest" in difference.kind:
        return "phantom"
    return "board" if difference.kind == "text" else "scores"


def _line(difference: Difference) -> str:
    return f"{difference.where}: {difference.text} (committed {_short(difference.committed)}, fresh {_short(difference.fresh)})"


def _xml_text(text: str) -> str:
    """XML 1.0 has no control characters, escaped or not."""
    return "".join(character if character.isprintable() or character in "\n\t" else repr(character)[1:-1] for character in text)


def _short(value: str | None) -> str:
    if value is None:
        return "-"
    text = value if value.isprintable() else repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
