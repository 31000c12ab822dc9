"""What must come out on the phantom, and of the simulation: a board that claimed otherwise would be wrong about something known."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import nibabel
import numpy as np
import pytest
from conftest import ROOT

from ichbench.ablation.run import Finished, phantom_cohort, plan_run, run_study
from ichbench.ablation.settings import settle
from ichbench.ablation.study import RunDefaults
from ichbench.board.effects import paired_effects
from ichbench.board.summary import case_table
from ichbench.scoring.score import Score
from ichbench.scoring.tables import read_scores

BOARD = ROOT / "leaderboard" / "phantom"
STUDY = 'why = "base alone beside its floor"\nceilings = false\n'


def mean_dice(rows: list[Score], arm: str) -> float:
    return float(np.mean([row.value for row in rows if (row.arm, row.metric) == (arm, "dice")]))


def test_the_literal_window_hurts() -> None:
    found = {effect.arm: effect for effect in paired_effects(case_table(read_scores(BOARD / "scores.csv"), ("dice",)))}
    assert found["window_literal"].verdict == "worse"
    assert found["window_literal"].upper < -0.2


def test_each_ceiling_is_above_every_arm_of_its_preparation() -> None:
    rows = read_scores(BOARD / "scores.csv")
    recipes = {path.stem: json.loads(path.read_text())["recipe"] for path in (BOARD / "recipes").glob("*.json")}
    prepared = {arm: json.dumps([recipe["prepare"], recipe["plan"]], sort_keys=True) for arm, recipe in recipes.items()}
    trained = [arm for arm, recipe in recipes.items() if recipe["inference"]["predictor"] == "unet"]
    ceilings = [arm for arm, recipe in recipes.items() if recipe["inference"]["predictor"] == "roundtrip"]
    pairs = [(ceiling, arm) for ceiling in ceilings for arm in trained if prepared[ceiling] == prepared[arm]]
    assert {arm for _, arm in pairs} == set(trained)
    for ceiling, arm in pairs:
        assert mean_dice(rows, ceiling) > mean_dice(rows, arm), (ceiling, arm)


def run(cohort: str, out: Path, seeds: str) -> Finished:
    study = out.parent / "study.toml"
    study.write_text(STUDY)
    settings = settle({"study": str(study), "cohort": cohort, "out": str(out), "seeds": seeds, "device": "cpu"}, RunDefaults(), {})
    done = run_study(plan_run(settings, {}), lambda event: None)
    assert done.failed == {}
    return done


@pytest.mark.slow
def test_the_same_recipe_is_not_separable_from_itself_and_permuted_masks_teach_nothing(tmp_path: Path) -> None:
    run("phantom", tmp_path / "intact", "0,1")
    rows = read_scores(tmp_path / "intact" / "scores.csv")
    # A/A: seed 1 of base as an arm of its own
    again = [row._replace(arm="again") if (row.arm, row.seed) == ("base", "1") else row for row in rows]
    effects = {(effect.arm, effect.metric): effect for effect in paired_effects(case_table(again))}
    for metric in ("dice", "nsd", "rvd", "hd", "hd95"):
        assert effects["again", metric].verdict in ("not separable", "equivalent"), effects["again", metric]
        assert effects["again", metric].single_seed

    # the next training case's mask on every training image: heads and bleeds as before, but they do not belong together
    phantom_cohort(tmp_path / "permuted")
    labels = sorted((tmp_path / "permuted" / "labelsTr").iterdir())
    originals = [nibabel.load(path) for path in labels]
    arrays = [np.asarray(image.dataobj) for image in originals]
    for number, (path, image) in enumerate(zip(labels, originals, strict=True)):
        other = arrays[(number + 7) % len(arrays)]
        places = [np.arange(size) * theirs // size for size, theirs in zip(image.shape, other.shape, strict=True)]
        nibabel.save(nibabel.Nifti1Image(other[np.ix_(*places)].astype(np.uint8), image.affine, image.header), path)
    run(str(tmp_path / "permuted"), tmp_path / "shuffled", "0")
    taught = [row._replace(arm="permuted") for row in read_scores(tmp_path / "shuffled" / "scores.csv") if row.arm == "base"]
    floor = [row for row in rows if row.arm == "floor_threshold"]
    (effect,) = paired_effects(case_table([*floor, *taught], ("dice",)), base="floor_threshold")
    assert effect.verdict != "better"
    assert effect.difference < 0
    assert mean_dice(rows, "base") > mean_dice(taught, "permuted") + 0.2


@pytest.fixture(scope="module")
def honesty() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("honesty")


@pytest.mark.parametrize("n", [13, 30])
def test_a_a_studies_and_planted_effects_on_the_phantom_spread(honesty: ModuleType, n: int) -> None:
    # 400 studies of the table's 5,000: 5.8 % + 2.3 standard errors
    population = honesty.populations()[0]
    rng = np.random.default_rng(1)
    differences = honesty.shuffled_studies(population, n, 400, rng)
    verdicts, unadjusted = honesty.verdicts_of(differences)
    assert np.mean((verdicts != 0).any(axis=1)) <= 0.085
    assert np.mean((unadjusted != 0).any(axis=1)) > np.mean((verdicts != 0).any(axis=1))
    planted = honesty.detectable(honesty.exchangeable_sd(population.scores) / math.sqrt(n), n, 4)
    differences[:, :, 0] += planted
    found = honesty.verdicts_of(differences)[0][:, 0]
    assert 0.7 <= np.mean(found > 0) <= 0.88
    assert not (found < 0).any()


def test_coverage_on_the_phantom_spread(honesty: ModuleType) -> None:
    scores = honesty.populations()[0].scores[0]
    drawn = scores[np.random.default_rng(2).integers(0, len(scores), (30, 600))]
    assert 0.92 <= honesty.covered(drawn, np.ones(30), float(scores.mean()), "outer") <= 0.98
    assert honesty.covered(drawn, np.ones(30), float(scores.mean()) + 0.15, "outer") < 0.6


def test_the_committed_table_says_what_is_claimed() -> None:
    text = (ROOT / "benchmarks" / "results" / "honesty.md").read_text(encoding="utf-8")
    false_claims = text.split("## A/A studies")[1].split("\n## ")[0]
    lines = [line.split("|")[1:-1] for line in false_claims.splitlines() if line.startswith("| ") and "%" in line]
    assert len(lines) >= 6
    for line in lines:
        assert float(line[2].strip(" %")) <= 5.8, line
    planted = text.split("## Planted effects")[1].split("\n## ")[0]
    shares = [float(line.split("|")[5].strip(" %")) for line in planted.splitlines() if line.startswith("| ") and "%" in line]
    assert len(shares) >= 12
    assert min(shares) >= 74  # stated 80
    covered = text.split("## Coverage")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in covered.splitlines() if line.startswith(("| phantom", "| real"))]
    default = [float(row[3].rstrip(" !")) for row in rows if int(row[2]) >= 30 and "(lone case)" not in row[1]]
    assert len(default) >= 18
    assert min(default) >= 93
    assert max(default) <= 97
