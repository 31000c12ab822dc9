"""Protocols are data: complete, consistent, and with the empty conventions that the facts give."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest

from ichbench.errors import InputError
from ichbench.scoring.protocol import MARKS, METRICS, PARAMETERS, PROTOCOLS, EmptyRule, get_protocol, split_metric
from ichbench.scoring.score import FORMULAS

#: metric -> (empty prediction, empty reference, both empty); None is "by formula".
#: instance2022: measured with the official functions (facts, A1), and for RVD what stands in where they raise.
DECLARED = {
    "instance2022": {
        "dice": (None, None, None),
        "nsd": (0.0, 0.0, math.nan),
        "rvd": (1.0, math.inf, math.nan),
        "hd": (math.inf, math.inf, math.inf),
        "hd95": (math.inf, math.inf, math.inf),
        "assd": (math.inf, math.inf, math.nan),
    },
    "strict": {
        "dice": (0.0, 0.0, 1.0),
        "nsd": (0.0, 0.0, 1.0),
        "rvd": (1.0, math.inf, 0.0),
        "hd": (math.inf, math.inf, 0.0),
        "hd95": (math.inf, math.inf, 0.0),
        "assd": (math.inf, math.inf, 0.0),
    },
    # facts, C3
    "kits": {"dice": (0.0, 0.0, 1.0), "nsd": (0.0, 0.0, 1.0)},
    "brats": {"dice": (0.0, 0.0, 1.0), "hd95": (374.0, 374.0, 0.0)},
    "toothfairy": {"dice": (0.0, 0.0, 1.0), "hd95": ("diagonal", "diagonal", 0.0)},
    "monai": {
        "dice": (0.0, "drop", "drop"),
        "nsd_voxels": (0.0, 0.0, "drop"),
        "hd_directional": (math.inf, math.inf, "drop"),
        "hd_directional@95": ("drop", "drop", "drop"),
    },
    "nnunet": {"dice": (0.0, 0.0, math.nan), "iou": (0.0, 0.0, math.nan)},
}
TOLERANCES_MM = {"instance2022": 0.42, "strict": 0.42, "kits": 1.033, "monai": 0.42}


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_empty_rules_are_the_declared_ones(name: str) -> None:
    for metric, expected in DECLARED[name].items():
        rule = PROTOCOLS[name].empty_rule(metric)
        found = (rule.value(5, 0), rule.value(0, 5), rule.value(0, 0))
        assert [repr(value) for value in found] == [repr(value) for value in expected], metric
        assert rule.value(5, 5) is None
    assert PROTOCOLS[name].empty_rule("nsd@1.0") == PROTOCOLS[name].empty_rule("nsd")


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_a_protocol_names_known_metrics_and_says_what_it_is(name: str) -> None:
    protocol = PROTOCOLS[name]
    assert protocol.name == name
    assert protocol.text
    least = {"dice", "reference_ml", "predicted_ml"}
    if name in ("instance2022", "strict"):
        least |= {"nsd", "rvd", "hd", "hd95", "assd"}
    assert set(protocol.metrics) >= least
    assert {split_metric(metric)[0] for metric in protocol.metrics} <= set(FORMULAS)
    assert len(set(rule.metric for rule in protocol.empties)) == len(protocol.empties)
    assert {split_metric(rule.metric)[0] for rule in protocol.empties} <= set(FORMULAS)
    assert protocol.tolerance_mm == TOLERANCES_MM.get(name, protocol.tolerance_mm)
    travelled = pickle.loads(pickle.dumps(protocol))  # noqa: S301  (as it goes to worker processes; nan keeps == from holding)
    assert repr(travelled) == repr(protocol)
    assert hash(protocol) == hash(get_protocol(name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        protocol.tolerance_mm = 1.0  # type: ignore[misc]


def test_smoothing_is_the_official_one_and_strict_has_none() -> None:
    assert PROTOCOLS["instance2022"].dice_smooth == 1e-5
    assert PROTOCOLS["strict"].dice_smooth == 0.0


def test_monai_is_not_said_to_have_a_tolerance_of_its_own() -> None:
    assert "0.42 mm is ours" in PROTOCOLS["monai"].text
    assert PROTOCOLS["monai"].tolerance_mm == PROTOCOLS["instance2022"].tolerance_mm


def test_metric_table_is_complete_and_its_directions_are_right() -> None:
    assert set(METRICS) == set(FORMULAS) | set(MARKS)
    assert set(PARAMETERS) <= set(FORMULAS)
    assert all(metric.name == name and metric.text for name, metric in METRICS.items())
    assert {name for name, metric in METRICS.items() if metric.better == "lower"} == {
        *("rvd", "hd", "hd95", "assd", "missing", "hd_directional", "hd_pooled", "lesion_fp", "lesionwise_hd95"),
    }
    assert {name for name, metric in METRICS.items() if metric.better == "none"} == {
        *("reference_ml", "predicted_ml", "volume_bias_ml", "rvd_signed", "empty_prediction", "empty_reference"),
    }
    assert {name for name, metric in METRICS.items() if metric.unit == "mm"} == {
        *("hd", "hd95", "assd", "hd_directional", "hd_pooled", "lesionwise_hd95"),
    }


def test_metric_names() -> None:
    assert split_metric("dice") == ("dice", None)
    assert split_metric("nsd@1.0") == ("nsd", 1.0)
    assert split_metric("nsd@0.42/2") == ("nsd", 0.42)
    assert split_metric("hd@90") == ("hd", 90.0)
    for wrong, words in (("dize", "no metric 'dize'"), ("nsd@", "must be a number"), ("nsd@x", "tolerance"), ("dice@1", "no parameter")):
        with pytest.raises(InputError, match=words):
            split_metric(wrong)


def test_lookup() -> None:
    assert get_protocol("strict") is PROTOCOLS["strict"]
    own = dataclasses.replace(PROTOCOLS["strict"], name="own", tolerance_mm=2.0)
    assert get_protocol(own) is own
    assert own.empty_rule("iou") == EmptyRule("iou", 0.0, 0.0, 1.0)
    assert dataclasses.replace(own, empties=()).empty_rule("iou") == EmptyRule("iou", None, None, None)
    with pytest.raises(InputError, match=r"'isles'.*instance2022, strict"):
        get_protocol("isles")
