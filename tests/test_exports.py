"""summary.json as nnU-Net reads it, metrics.json as grand-challenge writes it, the protocol beside a CSV, and where they may go."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_score import SPACING, box_mask

from ichbench.errors import InputError
from ichbench.scoring import PROTOCOLS, Score, aggregate, read_scores, score_pairs
from ichbench.scoring.exports import Targets, case_counts, metrics_json, protocol_facts, protocol_json, protocol_path, summary_json
from ichbench.scoring.folders import score_each
from ichbench.scoring.pairs import Scored, Settings
from ichbench.scoring.score import Labels


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no standard JSON")


def strict(text: str) -> Any:
    """Parse standard JSON: no NaN, no Infinity."""
    return json.loads(text, parse_constant=refuse)


def scored(labels: Labels | None = None, protocol: str = "instance2022", only: str = "") -> list[Scored]:
    """A hit, a shifted one, an empty prediction, an empty reference, both empty, a missing prediction."""
    box, empty = box_mask().astype(int), np.zeros((8, 20, 20), dtype=int)
    box[3, 5:9, 5:9] = 2
    pairs = [
        ("hit", box, box),
        ("shifted", box, np.roll(box, 1, axis=2)),
        ("miss", box, empty),
        ("alarm", empty, box),
        ("calm", empty, empty),
    ]
    every = [(*pair, SPACING) for pair in [*pairs, ("lost", box, None)] if only in pair[0]]
    return list(score_each(every, Settings(PROTOCOLS[protocol], labels=labels, count_voxels=True)))


def from_files(every: list[Scored]) -> list[Scored]:
    """As if they had come from files."""
    return [
        dataclasses.replace(
            item, reference=Path(f"r/{item.case}.nii.gz"), prediction=Path(f"p/{item.case}.nii") if item.case != "lost" else None
        )
        for item in every
    ]


# --- summary.json ------------------------------------------------------------------------------------------------------


def test_summary_is_nnunets() -> None:
    labels: Labels = {"background": 0, "clot": 1, "whole": (1, 2), "core": (2,)}
    text = summary_json(from_files(scored(labels)), labels)
    found = json.loads(text)
    assert [case["reference_file"] for case in found["metric_per_case"]] == [
        f"r/{c}.nii.gz" for c in "hit shifted miss alarm calm lost".split()
    ]
    assert found["metric_per_case"][5]["prediction_file"] is None
    names = ["Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref"]
    for case in found["metric_per_case"]:
        assert list(case["metrics"]) == list(found["mean"]) == ["1", "(1, 2)", "(2,)"]
        assert all(list(values) == names for values in case["metrics"].values())
    total = 8 * 20 * 20
    by_case = {Path(case["reference_file"]).name.split(".")[0]: case["metrics"] for case in found["metric_per_case"]}
    assert by_case["hit"]["(1, 2)"] == {
        "Dice": 1.0, "IoU": 1.0, "FP": 0, "TP": 32, "FN": 0, "TN": total - 32, "n_pred": 32, "n_ref": 32,
    }  # fmt: skip
    # half of the box is label 1; one column of four lies outside on either side
    assert by_case["shifted"]["1"] == {"Dice": 0.75, "IoU": 0.6, "FP": 4, "TP": 12, "FN": 4, "TN": total - 20, "n_pred": 16, "n_ref": 16}
    assert (by_case["miss"]["1"]["Dice"], by_case["alarm"]["1"]["IoU"], by_case["lost"]["1"]["Dice"]) == (0.0, 0.0, 0.0)
    assert math.isnan(by_case["calm"]["1"]["Dice"])
    assert math.isnan(by_case["calm"]["1"]["IoU"])
    # nanmean over cases, plain mean over labels
    assert found["mean"]["1"]["Dice"] == pytest.approx((1 + 0.75 + 0 + 0 + 0) / 5, rel=1e-15)
    assert found["mean"]["1"]["TP"] == (16 + 12) / 6
    assert found["foreground_mean"]["Dice"] == pytest.approx(np.mean([values["Dice"] for values in found["mean"].values()]), rel=1e-15)
    assert list(found["foreground_mean"]) == names
    assert found["ichbench"]["cases"] == {"n": 6, "n_missing": 1, "n_empty_prediction": 3, "n_empty_reference": 2}
    assert found["ichbench"]["labels"]["1"] == {"n": 5, "n_empty_prediction": 3, "n_empty_reference": 2, "n_both_empty": 1}
    assert set(found["ichbench"]["empty_masks"]) == {"Dice", "IoU"}
    assert found["ichbench"]["missing"] == ["lost"]


def test_summary_spells_nan_as_nnunet_does() -> None:
    """batchgenerators' save_json is Python's json with its defaults: NaN, which json.load reads and strict parsers refuse."""
    calm = [item for item in scored() if item.case == "calm"]
    text = summary_json(calm, None)
    assert '"Dice": NaN' in text
    found = json.loads(text)
    # a label that is nowhere makes its mean nan, and with it the mean over labels
    assert math.isnan(found["mean"]["1"]["Dice"])
    assert math.isnan(found["foreground_mean"]["Dice"])
    assert found["foreground_mean"]["n_ref"] == 0
    labels: Labels = {"background": 0, "clot": 1, "never": 3, "other": 2}
    found = json.loads(summary_json(scored(labels), labels))
    assert found["mean"]["1"]["Dice"] > 0
    assert math.isnan(found["mean"]["3"]["Dice"])
    assert math.isnan(found["foreground_mean"]["Dice"])
    with pytest.raises(AssertionError, match="NaN"):
        strict(text)


def test_summary_without_declared_labels_has_one() -> None:
    found = json.loads(summary_json(scored(), None))
    assert list(found["mean"]) == ["1"]
    assert found["metric_per_case"][0]["metrics"]["1"]["TP"] == 32
    # labels looked for in masks without any
    calm = scored({"background": 0}, only="calm")
    assert list(json.loads(summary_json(calm, {"background": 0}))["mean"]) == ["1"]
    assert found["metric_per_case"][0]["reference_file"] is None


def test_summary_leaves_ignored_voxels_out() -> None:
    labels: Labels = {"background": 0, "clot": 1, "ignore": 2}
    found = json.loads(summary_json(scored(labels, only="hit"), labels))
    first = found["metric_per_case"][0]["metrics"]
    assert list(first) == ["1"]
    assert first["1"]["TP"] + first["1"]["TN"] == 8 * 20 * 20 - 16


# --- metrics.json ------------------------------------------------------------------------------------------------------

#: facts, A2: a metrics.json as the INSTANCE 2022 site showed it (screenshot of 29 July 2022), one metric; order and names count
SITE = {
    "max": 0.93208989, "min": 1.93836e-9, "std": 0.31546329, "25pc": 0.61506936, "50pc": 0.81275816, "75pc": 0.87326862,
    "mean": 0.66928388, "count": 30.0,
}  # fmt: skip


def test_metrics_json_has_the_form_of_the_site() -> None:
    found = strict(metrics_json(from_files(scored()), PROTOCOLS["instance2022"]))
    assert list(found) == ["case", "aggregates", "ichbench"]
    assert list(found["aggregates"])[:4] == ["DiceCoefficient", "SurfaceDice", "RelativeVolumeDifference", "HausdorffDistance"]
    for sums in found["aggregates"].values():
        assert list(sums)[: len(SITE)] == list(SITE)
        assert isinstance(sums["count"], float)
        assert [sums[f"n_{mark}"] for mark in ("empty_prediction", "empty_reference", "missing")] == [3, 2, 1]
    assert list(found["case"]["DiceCoefficient"]) == [str(index) for index in range(6)]
    assert found["case"]["pred_fname"] == {
        "0": "hit.nii",
        "1": "shifted.nii",
        "2": "miss.nii",
        "3": "alarm.nii",
        "4": "calm.nii",
        "5": None,
    }
    assert found["case"]["gt_fname"]["5"] == "lost.nii.gz"
    assert found["ichbench"]["case_ids"] == ["hit", "shifted", "miss", "alarm", "calm", "lost"]


def test_metrics_json_says_null_where_the_site_did() -> None:
    found = strict(metrics_json(scored(), PROTOCOLS["instance2022"]))
    cases, sums = found["case"]["HausdorffDistance"], found["aggregates"]["HausdorffDistance"]
    assert list(cases.values()) == [0.0, 0.45, None, None, None, None]
    assert (sums["mean"], sums["max"], sums["std"], sums["count"], sums["min"]) == (None, None, None, 6.0, 0.0)
    assert (sums["n_infinite"], sums["n_undefined"]) == (4, 0)
    nsd = found["aggregates"]["SurfaceDice"]
    assert (nsd["n_infinite"], nsd["n_undefined"], nsd["count"]) == (0, 1, 5.0)
    dice = found["aggregates"]["DiceCoefficient"]
    values = list(found["case"]["DiceCoefficient"].values())
    assert dice["std"] == pytest.approx(np.std(values, ddof=1), rel=1e-13)
    assert [dice[f"{p}pc"] for p in (25, 50, 75)] == pytest.approx(np.percentile(values, (25, 50, 75)), rel=1e-15)
    assert dice["min"] == pytest.approx(1e-5 / 32, rel=1e-5)


def test_metrics_json_has_the_numbers_of_real_files() -> None:
    """Facts, A2: the site's smallest Dice is a miss of 5159 voxels in all; std has divisor n - 1, as AutoNNUNet's 32 cases."""
    box, other = np.zeros((2, 8, 30, 40), dtype=bool)
    box.reshape(-1)[:3000], other.reshape(-1)[3000:5159] = True, True
    every = score_each([("miss", box, other, SPACING), ("hit", box, box, SPACING)], Settings(PROTOCOLS["instance2022"]))
    found = strict(metrics_json(list(every), PROTOCOLS["instance2022"]))["aggregates"]
    assert found["DiceCoefficient"]["min"] == pytest.approx(SITE["min"], rel=1e-5)
    rows = tuple(Score("a", "-", "-", str(n), "dice", (7 * n * n % 31) / 32) for n in range(32))
    (sums,) = aggregate(rows)
    assert sums.sd / np.std([row.value for row in rows]) == pytest.approx(0.30552 / 0.30071, rel=3e-5)


def test_metrics_json_of_labels_and_other_metrics() -> None:
    labels: Labels = {"background": 0, "a": 1, "b": 2, "whole": (1, 2)}
    names = set(strict(metrics_json(scored(labels), PROTOCOLS["strict"]))["aggregates"])
    assert {"DiceCoefficient", "DiceCoefficient/2", "HausdorffDistance/whole", "hd95", "reference_ml/1"} <= names
    assert not {"missing", "empty_prediction", "empty_reference/2"} & names


# --- the policy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_every_json_holds_the_policy_of_every_metric(protocol: str) -> None:
    rules = PROTOCOLS[protocol]
    every = scored(None, protocol)
    rows = [row for item in every for row in item.rows]
    expected = strict(json.dumps(protocol_facts(rules)))
    assert strict(metrics_json(every, rules))["ichbench"]["protocol"] == expected
    beside = strict(protocol_json(rules, rows))
    assert beside["protocol"] == expected
    assert beside["cases"] == {"n": 6, "n_missing": 1, "n_empty_prediction": 3, "n_empty_reference": 2}
    assert list(expected["metrics"]) == list(rules.metrics)
    for metric, about in expected["metrics"].items():
        rule = rules.empty_rule(metric)
        for field, value in about["empty_masks"].items():
            declared = getattr(rule, field)
            assert value == (
                "formula"
                if declared is None
                else repr(declared)
                if isinstance(declared, float) and not math.isfinite(declared)
                else declared
            )


def test_the_policy_of_instance2022() -> None:
    found = protocol_facts(PROTOCOLS["instance2022"])
    assert found["name"] == "instance2022"
    assert found["metrics"]["rvd"]["empty_masks"] == {"empty_prediction": 1.0, "empty_reference": "inf", "both_empty": "nan"}
    assert found["metrics"]["dice"]["empty_masks"]["both_empty"] == "formula"
    assert found["metrics"]["hd"]["unit"] == "mm"


def test_counts_without_cases() -> None:
    assert case_counts([]) == {"n": 0, "n_missing": 0, "n_empty_prediction": 0, "n_empty_reference": 0}
    rows = [Score("a", "-", "-", "c", "missing", 1.0), Score("a", "-", "-", "d", "missing", 0.0)]
    assert case_counts(rows)["n_missing"] == 1


# --- where they go -----------------------------------------------------------------------------------------------------


def test_everything_is_written(tmp_path: Path) -> None:
    every = scored()
    targets = Targets(tmp_path / "x" / "scores.csv", tmp_path / "w.csv", tmp_path / "summary.json", tmp_path / "metrics.json")
    targets.check([])
    written = targets.write(every, PROTOCOLS["instance2022"], None)
    assert sorted(written) == sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(targets.paths())
    assert [path.name for path in written] == [
        "scores.csv",
        "w.csv",
        "summary.json",
        "metrics.json",
        "scores.protocol.json",
        "w.protocol.json",
    ]
    assert sorted(map(repr, read_scores(written[0]))) == sorted(repr(row) for item in every for row in item.rows)
    assert written[2].read_text() == summary_json(every, None)
    assert written[3].read_text() == metrics_json(every, PROTOCOLS["instance2022"])
    before = {path: path.read_bytes() for path in written}
    assert targets.write(every, PROTOCOLS["instance2022"], None) == written
    assert {path: path.read_bytes() for path in written} == before
    assert protocol_path(Path("a/my.scores.csv")) == Path("a/my.scores.protocol.json")
    assert Targets().paths() == []


def test_nothing_is_written_where_one_output_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    mask = tmp_path / "mask.nii.gz"
    for targets, words in (
        (Targets(tmp_path / "a.csv", summary=tmp_path / "folder"), "folder is a folder; give the path of a file"),
        (Targets(tmp_path / "a.csv", metrics=tmp_path / "file" / "x.json"), "file is not a folder that may be written to"),
        (Targets(tmp_path / "a.csv", wide=tmp_path / "folder" / ".." / "a.csv"), "would be written twice"),
        (Targets(tmp_path / "a.csv", metrics=tmp_path / "a.protocol.json"), "would be written twice"),
        (Targets(tmp_path / "a.csv", summary=mask), "mask.nii.gz is one of the files to be read"),
    ):
        with pytest.raises(InputError, match=words):
            targets.check([mask])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    # a name that no table can hold is found before the first file appears
    (odd,) = score_each([("a\nb", box_mask(), box_mask(), SPACING)], Settings(PROTOCOLS["strict"], count_voxels=True))
    for targets in (
        Targets(tmp_path / "a.csv", summary=tmp_path / "s.json"),
        Targets(wide=tmp_path / "w.csv", metrics=tmp_path / "m.json"),
    ):
        with pytest.raises(InputError, match="not printable"):
            targets.write([odd], PROTOCOLS["strict"], None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_real_labels_against_themselves_and_against_a_neighbour(shared_data: Path) -> None:
    """Hippocampus, two labels: the summary's Dice is the strict protocol's, label by label."""
    folder = shared_data / "Dataset004_Hippocampus" / "labelsTr"
    files = sorted(folder.glob("*.nii.gz"))[:3]
    labels: Labels = {"background": 0, "anterior": 1, "posterior": 2}
    settings = Settings(PROTOCOLS["strict"], labels=labels, count_voxels=True)
    every = list(score_each([(path.name, path, path) for path in files], settings))
    found = json.loads(summary_json(every, labels))
    assert found["mean"]["1"]["Dice"] == found["mean"]["2"]["Dice"] == found["foreground_mean"]["Dice"] == 1.0
    rows = [row for item in every for row in item.rows]
    assert [repr(row) for row in rows] == [repr(row) for row in score_pairs([(p.name, p, p) for p in files], "strict", labels=labels)]
