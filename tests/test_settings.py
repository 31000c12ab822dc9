"""Settings: command line, then ICHBENCH_* variables, then the study file, then defaults; each value knows its source."""

from __future__ import annotations

import pytest

from ichbench.ablation.folds import parse_folds
from ichbench.ablation.settings import settle, settle_study
from ichbench.ablation.study import RunDefaults
from ichbench.errors import InputError


def test_precedence_and_sources() -> None:
    study_file = RunDefaults(preset="full", seeds=(4, 5), cohort="somewhere", folds="cv")
    environment = {"ICHBENCH_PRESET": "small", "ICHBENCH_COHORT": "elsewhere"}
    settings = settle({"cohort": "here", "device": "cpu"}, study_file, environment)
    assert (settings.cohort, settings.preset, settings.seeds, settings.folds) == ("here", "small", (4, 5), "cv")
    sources = settings.sources
    assert (sources["cohort"], sources["preset"], sources["seeds"], sources["protocol"]) == (
        "command line", "ICHBENCH_PRESET", "study file", "default",
    )  # fmt: skip
    assert any(line.startswith("preset") and "ICHBENCH_PRESET" in line for line in settings.lines())


def test_defaults() -> None:
    settings = settle({"device": "cpu"}, RunDefaults(), {})
    assert (settings.study, settings.cohort, settings.preset, settings.seeds, settings.folds) == (
        "preprocessing",
        "phantom",
        "smoke",
        (0,),
        None,
    )
    assert str(settings.out).replace("\\", "/") == "runs/preprocessing-phantom-smoke"
    assert settings.compute.threads == 1
    assert settings.workers >= 1


def test_the_study_follows_the_same_precedence() -> None:
    assert settle_study(None, {}) == "preprocessing"
    assert settle_study(None, {"ICHBENCH_STUDY": "phe"}) == "phe"
    assert settle_study("superembrace", {"ICHBENCH_STUDY": "phe"}) == "superembrace"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seeds": "0,0"}, "--seeds '0,0'"),
        ({"seeds": "-1"}, "--seeds '-1'"),
        ({"seeds": "a"}, "whole numbers"),
        ({"preset": "huge"}, "give one of full, small, smoke"),
        ({"workers": "0"}, "--workers '0'"),
        ({"threads": "two"}, "--threads 'two'"),
        ({"protocol": "bogus"}, "bogus"),
        ({"seeds": "99999999999999999999"}, "below 2"),
        ({"device": "tpu"}, "give auto, cpu, cuda"),
        ({"device": "cuda:x"}, "give auto, cpu, cuda"),
        ({"deterministic": "perhaps"}, "give yes or no"),
        ({"compile": "perhaps"}, "give auto, yes or no"),
    ],
)
def test_bad_settings(given: dict[str, str | None], said: str) -> None:
    with pytest.raises(InputError, match=said):
        settle({"device": "cpu"} | given, RunDefaults(), {})


def test_folds() -> None:
    assert parse_folds("full") == ("full",)
    assert parse_folds("cv") == ("0", "1", "2", "3", "4")
    assert parse_folds("0, 2") == ("0", "2")
    with pytest.raises(InputError, match="give full"):
        parse_folds("first")
