"""A whole study on six small phantoms with a network of a few channels: facts, resuming, folders, warnings, factorial and folds."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ichbench.ablation.engine import Event
from ichbench.ablation.run import Finished, Planned, claim, phantom_cohort, plan_run, run_study
from ichbench.ablation.settings import settle
from ichbench.ablation.study import RunDefaults
from ichbench.cases.cohort import read_cohort
from ichbench.cases.images import read_labels, write_labels
from ichbench.cases.phantom import write_phantom
from ichbench.errors import InputError
from ichbench.inference.model import load_model, predict_path
from ichbench.inference.postprocess import read_postprocessing
from ichbench.scoring.tables import read_scores

STUDY = 'why = "a small study"\n[factors]\nwindow = ["window_literal"]\ndims = ["unet25d"]\n'


def run(
    folder: Path, preset: Path, out: Path, study: str = STUDY, predictions: dict[str, Path] | None = None, **given: str
) -> tuple[Finished, list[Event]]:
    path = out.parent / "study.toml"
    path.write_text(study)
    settings = settle(
        {"study": str(path), "cohort": str(folder), "out": str(out), "preset": str(preset), "device": "cpu"} | given, RunDefaults(), {}
    )
    events: list[Event] = []
    return run_study(plan_run(settings, predictions or {}), events.append), events


@pytest.fixture(scope="module")
def finished(small_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path, Path]:
    from conftest import TINY

    folder = tmp_path_factory.mktemp("study")
    preset = folder / "tiny.toml"
    preset.write_text(TINY)
    theirs = folder / "theirs"
    shutil.copytree(small_phantom / "labelsTs", theirs)
    next(theirs.iterdir()).unlink()
    done, _ = run(small_phantom, preset, folder / "out", predictions={"theirs": theirs})
    return done, folder / "out", preset


def test_every_arm_is_scored_on_every_test_case(finished: tuple[Finished, Path, Path], small_phantom: Path) -> None:
    done, out, _ = finished
    assert (done.failed, done.code) == ({}, 0)
    rows = read_scores(out / "scores.csv")
    arms = ["base", "ceiling_base", "ceiling_unet25d", "ceiling_window_literal", "floor_threshold", "theirs", "unet25d", "window_literal"]
    assert sorted({row.arm for row in rows}) == arms
    for arm in arms:
        assert {row.case for row in rows if row.arm == arm} == set(read_cohort(small_phantom).test_ids)
    trained = {(row.fold, row.seed) for row in rows if row.arm in ("base", "unet25d", "window_literal")}
    untrained = {(row.fold, row.seed) for row in rows if row.arm not in ("base", "unet25d", "window_literal")}
    assert (trained, untrained) == ({("full", "0")}, {("-", "-")})


def test_a_missing_prediction_is_a_row(finished: tuple[Finished, Path, Path]) -> None:
    rows = read_scores(finished[1] / "scores.csv")
    missing = {row.case: row.value for row in rows if row.arm == "theirs" and row.metric == "missing"}
    assert sorted(missing.values()) == [0.0, 1.0]
    dice = {row.case: row.value for row in rows if row.arm == "theirs" and row.metric == "dice"}
    assert [dice[case] == 1.0 for case in sorted(missing)] == [missing[case] == 0.0 for case in sorted(missing)]


def test_the_facts_are_complete(finished: tuple[Finished, Path, Path], small_phantom: Path) -> None:
    _, out, _ = finished
    about = json.loads((out / "run.json").read_text())
    cohort = read_cohort(small_phantom)
    assert about["cohort_digest"] == cohort.digest()
    assert {"versions", "python", "commit", "device", "threads", "seconds", "preset", "notes"} <= about.keys()
    cases = list(csv.DictReader((out / "cases.csv").open()))
    assert [line["case"] for line in cases] == list(cohort.test_ids)
    assert all(float(line["spacing_z_mm"]) > 4 for line in cases)
    assert sorted(path.stem for path in (out / "recipes").iterdir()) == sorted(about["arms"])
    log = (out / "models/base-foldfull-seed0/log.jsonl").read_text().splitlines()
    assert {"train_loss", "val_loss", "pseudo_dice", "moving_average", "learning_rate"} <= json.loads(log[0]).keys()


def test_a_window_that_erases_everything_is_a_named_warning(finished: tuple[Finished, Path, Path]) -> None:
    # the literal window keeps dense clots, so on the phantom it need not be constant; a window far away is
    _, out, preset = finished
    path = out.parent / "nothing.toml"
    path.write_text('why = "air only"\n[prepare]\nwindow = { level_hu = -3000, width_hu = 10 }\n')
    study = 'why = "x"\nfloor = false\nceilings = false\n[factors]\nwindow = ["nothing.toml"]\n'
    cohort = Path(json.loads(next((out / "steps").glob("score-*/step.json")).read_text())["where"]["cohort"])
    other, _ = run(cohort, preset, out.parent / "out2", study)
    assert (other.failed, other.code) == ({}, 0)
    assert any("ConstantImageWarning" in note for note in other.notes["nothing"])
    rows = read_scores(out.parent / "out2/scores.csv")
    assert all(np.isfinite(row.value) for row in rows if row.metric == "dice")


def test_running_again_changes_nothing_and_computes_nothing(finished: tuple[Finished, Path, Path], small_phantom: Path) -> None:
    _, out, preset = finished
    before = {name: (out / name).read_bytes() for name in ("scores.csv", "cases.csv", "board.csv", "board.md")}
    again, events = run(small_phantom, preset, out, predictions={"theirs": out.parent / "theirs"})
    assert {event.kind for event in events} == {"found"}
    assert {name: (out / name).read_bytes() for name in before} == before
    assert again.code == 0


def test_a_fresh_folder_gives_the_same_scores(finished: tuple[Finished, Path, Path], small_phantom: Path) -> None:
    _, out, preset = finished
    run(small_phantom, preset, out.parent / "fresh", predictions={"theirs": out.parent / "theirs"}, workers="1")
    assert (out.parent / "fresh/scores.csv").read_bytes() == (out / "scores.csv").read_bytes()


def test_it_resumes_at_the_last_finished_step(finished: tuple[Finished, Path, Path], small_phantom: Path) -> None:
    _, out, preset = finished
    half = out.parent / "half"
    shutil.copytree(out, half)
    for path in half.glob("steps/score-*/result.json"):
        path.unlink()
    _, events = run(small_phantom, preset, half, predictions={"theirs": out.parent / "theirs"})
    assert {event.step.kind for event in events if event.kind == "ended" and event.step} == {"score"}
    assert (half / "scores.csv").read_bytes() == (out / "scores.csv").read_bytes()


def test_another_studys_folder_is_refused_and_left_alone(
    finished: tuple[Finished, Path, Path], small_phantom: Path, tmp_path: Path
) -> None:
    _, out, preset = finished
    before = (out / "scores.csv").read_bytes()
    with pytest.raises(InputError, match="belongs to another study: its seeds is"):
        run(small_phantom, preset, out, predictions={"theirs": out.parent / "theirs"}, seeds="1")
    assert (out / "scores.csv").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="is not a study's folder"):
        run(small_phantom, preset, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_auto_and_what_it_comes_to_are_one_study(small_phantom: Path, tmp_path: Path) -> None:
    """`inference.mirror = "auto"` and the axes of the training; also in the folder of a version that wrote "auto" down."""
    from conftest import TINY

    def planned(mirror: str) -> Planned:
        (tmp_path / "preset.toml").write_text(
            TINY.replace("mirror = false", f"mirror = {mirror}") + "[training.augment]\nmirror = [0, 1]\n"
        )
        (tmp_path / "study.toml").write_text(STUDY)
        given = {"study": "study.toml", "cohort": str(small_phantom), "out": "out", "preset": "preset.toml", "device": "cpu"}
        paths = {name: str(tmp_path / given[name]) for name in ("study", "out", "preset")}
        return plan_run(settle(given | paths, RunDefaults(), {}), {})

    first = planned('"auto"')
    claim(first)
    path = tmp_path / "out/study.json"
    written = path.read_text()
    assert planned("[0, 1]").dag.steps.keys() == first.dag.steps.keys()
    claim(planned("[0, 1]"))
    assert path.read_text() == written
    table = json.loads(written)
    for recipe in table["arms"].values():
        recipe["inference"]["mirror"] = "auto"
    for older in (table, table | {"arms": table["arms"] | {"base": None}}):
        path.write_text(json.dumps(older))
        if older["arms"]["base"] is None:
            with pytest.raises(InputError, match="arms that differ: base"):
                planned('"auto"')
            continue
        for same in ("[0, 1]", '"auto"'):
            claim(planned(same))
            path.write_text(json.dumps(older))
        for other in ("true", "false", "[0]"):
            with pytest.raises(InputError, match="belongs to another study: arms that differ: base"):
                planned(other)


def test_a_precision_for_gpus_is_refused_before_training(small_phantom: Path, tmp_path: Path) -> None:
    from conftest import TINY

    (tmp_path / "half.toml").write_text(TINY + 'precision = "fp16"\n')
    with pytest.raises(InputError, match=r"arm base: inference.precision = 'fp16' is for GPUs"):
        run(small_phantom, tmp_path / "half.toml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_predict_gives_the_mask_of_the_study(finished: tuple[Finished, Path, Path], small_phantom: Path, tmp_path: Path) -> None:
    _, out, _ = finished
    tools = load_model(out / "models/base-foldfull-seed0")
    image = sorted((small_phantom / "imagesTs").iterdir())[0]
    case = image.name.removesuffix("_0000.nii.gz")
    (done,) = predict_path(tools, image, tmp_path / "mask.nii.gz")
    labels, grid = read_labels(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(labels, read_labels(out / f"predictions/base-foldfull-seed0/{case}.nii.gz")[0])
    assert done.volume_ml == pytest.approx(labels.astype(bool).sum() * grid.voxel_ml)
    for name in ("flipped", "permuted"):
        turned = nibabel.load(image)
        turned = turned.slicer[::-1, :, ::-1] if name == "flipped" else turned.as_reoriented(np.array([[2, 1], [0, 1], [1, 1]]))
        turned.to_filename(tmp_path / f"{name}_0000.nii.gz")
        (other,) = predict_path(tools, tmp_path / f"{name}_0000.nii.gz", tmp_path / "masks")
        assert other.path.name == f"{name}.nii.gz"
        # the same head lying another way: the network sees it as it saw its training cases
        assert other.volume_ml == pytest.approx(done.volume_ml, rel=1e-6)
        assert nibabel.load(other.path).shape == turned.shape
    with pytest.raises(InputError, match="would overwrite"):
        list(predict_path(tools, image, image))
    with pytest.raises(InputError, match="not a model folder"):
        load_model(tmp_path)


def test_folds_score_every_training_case_once(small_phantom: Path, tmp_path: Path) -> None:
    from conftest import TINY

    folder = tmp_path / "cohort"
    shutil.copytree(small_phantom, folder)
    preset = tmp_path / "tiny.toml"
    preset.write_text(TINY)
    train = list(read_cohort(folder).train_ids)
    splits = [{"train": train[2:], "val": train[:2]}, {"train": train[:2], "val": train[2:]}]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    study = 'why = "x"\nceilings = false\n'
    done, _ = run(folder, preset, tmp_path / "out", study, folds="0,1")
    assert done.code == 0
    rows = [row for row in read_scores(tmp_path / "out/scores.csv") if row.metric == "dice"]
    assert sorted(row.case for row in rows if row.arm == "base") == sorted(train)
    assert {(row.case, row.fold) for row in rows if row.arm == "base"} == {(case, str(k)) for k in (0, 1) for case in splits[k]["val"]}
    assert sorted(row.case for row in rows if row.arm == "floor_threshold") == sorted(train)


def test_a_csv_cohort_is_read_from_the_csv(small_phantom: Path, tmp_path: Path, tiny_preset: Path) -> None:
    # beside an nnU-Net folder of the same images, with other masks: the csv must win in every step
    folder = tmp_path / "cohort"
    shutil.copytree(small_phantom, folder)
    (folder / "rater2").mkdir()
    lines = ["id,image,mask,split"]
    for record in read_cohort(folder).records:
        assert record.label is not None
        labels, grid = read_labels(record.label)
        write_labels(folder / "rater2" / record.label.name, (labels * (np.arange(labels.shape[0]) % 2 == 0)[:, None, None]), grid)
        lines.append(f"{record.id},{record.images[0].relative_to(folder)},rater2/{record.label.name},{record.split}")
    (folder / "mine.csv").write_text("\n".join(lines) + "\n")
    study = 'why = "x"\nbase = "ceiling_roundtrip"\nfloor = false\nceilings = false\n'
    done, _ = run(folder / "mine.csv", tiny_preset, tmp_path / "out", study)
    assert done.code == 0
    measured = {row.case: row.value for row in read_scores(tmp_path / "out/scores.csv") if row.metric == "reference_ml"}
    for name, value in measured.items():
        labels, grid = read_labels(folder / "rater2" / f"{name}.nii.gz")
        assert value == pytest.approx(np.count_nonzero(labels) * grid.voxel_ml)


def test_cases_that_change_after_planning_are_noticed(small_phantom: Path, tmp_path: Path, tiny_preset: Path) -> None:
    folder = tmp_path / "cohort"
    shutil.copytree(small_phantom, folder)
    path = tmp_path / "study.toml"
    path.write_text('why = "x"\nbase = "ceiling_roundtrip"\nfloor = false\nceilings = false\n')
    given = {"study": str(path), "cohort": str(folder), "out": str(tmp_path / "out"), "preset": str(tiny_preset), "device": "cpu"}
    planned = plan_run(settle(given, RunDefaults(), {}), {})
    record = read_cohort(folder).records[0]
    assert record.label is not None
    labels, grid = read_labels(record.label)
    write_labels(record.label, 1 - labels, grid)
    done = run_study(planned, lambda event: None)
    assert done.code == 2
    assert "changed since the study was planned" in " ".join(done.failed.values())


def with_regions(source: Path, folder: Path) -> Path:
    """The phantom with two labels by slice parity, two regions, and every seventh column not annotated."""
    shutil.copytree(source, folder)
    table = json.loads((folder / "dataset.json").read_text())
    table |= {"labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, "regions_class_order": [1, 2]}
    for record in read_cohort(source).records:
        assert record.label is not None
        labels, grid = read_labels(record.label)
        odd = (np.arange(len(labels)) % 2).astype(labels.dtype)
        labels = labels * (1 + odd[:, None, None])
        labels[:, :, ::7] = 3
        write_labels(folder / record.label.relative_to(source), labels, grid)
    (folder / "dataset.json").write_text(json.dumps(table))
    return folder


def test_regions_and_an_ignore_label_go_through_the_whole_line(small_phantom: Path, tmp_path: Path, tiny_preset: Path) -> None:
    """Prepare, train, predict, score and the published model: a network of two regions, its floor and its ceiling."""
    folder = with_regions(small_phantom, tmp_path / "cohort")
    done, _ = run(folder, tiny_preset, tmp_path / "out", 'why = "x"\nbase = "base"\n')
    assert (done.failed, done.code) == ({}, 0)
    rows = read_scores(tmp_path / "out/scores.csv")
    assert {row.metric for row in rows if row.metric.startswith("dice")} == {"dice", "dice/core", "dice/whole"}
    value = {(row.arm, row.case, row.metric): row.value for row in rows}
    for (arm, case, metric), found in value.items():
        if metric == "dice":
            assert found == value[arm, case, "dice/whole"], "the union of all labels is the region of all labels"
        if metric == "reference_ml" and arm == "base":
            labels, grid = read_labels(read_cohort(folder).record(case).label or Path())
            assert found == pytest.approx(np.count_nonzero((labels == 1) | (labels == 2)) * grid.voxel_ml)
    assert min(found for (arm, _, metric), found in value.items() if arm == "ceiling_base" and metric == "dice/core") > 0.9
    model = load_model(tmp_path / "out/models/base-foldfull-seed0")
    assert model.tools.rules == read_cohort(folder).rules
    written = list(predict_path(model, folder / "imagesTs", tmp_path / "masks"))
    assert {one.path.name for one in written} == {f"{case}.nii.gz" for case in read_cohort(folder).test_ids}
    for one in written:
        assert set(np.unique(read_labels(one.path)[0])) <= {0, 1, 2}


def test_a_loss_that_does_not_fit_the_labels_is_refused_before_anything_runs(
    small_phantom: Path, tmp_path: Path, tiny_preset: Path
) -> None:
    folder = with_regions(small_phantom, tmp_path / "cohort")
    tiny_preset.write_text(tiny_preset.read_text().replace("[training]", '[training]\nloss = "dice_topk"'))
    with pytest.raises(InputError, match=r"arm base: training\.loss = 'dice_topk' needs labels that exclude each other"):
        run(folder, tiny_preset, tmp_path / "out")


def test_a_foreign_phantom_is_not_taken_for_the_embedded_one(small_phantom: Path, tmp_path: Path) -> None:
    shutil.copytree(small_phantom, tmp_path / "cohort")
    with pytest.raises(InputError, match="the embedded one is"):
        phantom_cohort(tmp_path / "cohort")


def test_post_processing_in_a_study(tmp_path: Path, tiny_preset: Path) -> None:
    """The threshold floor of eight phantoms, with and without: the rule comes from the training cases, and the masks obey it."""
    write_phantom(tmp_path / "cohort", 8, "small", 5, n_test=2)
    for name, postprocess in (("plain", "off"), ("tidy", "cross-validate")):
        text = f'why = "x"\n[inference]\npredictor = "threshold"\npostprocess = "{postprocess}"\n'
        (tmp_path / f"{name}.toml").write_text(text)
    study = 'why = "x"\nbase = "plain.toml"\nfloor = false\nceilings = false\n[factors]\ntidy = ["tidy.toml"]\n'
    done, _ = run(tmp_path / "cohort", tiny_preset, tmp_path / "out", study)
    assert (done.failed, done.code) == ({}, 0)
    rule = read_postprocessing(tmp_path / "out/predictions/tidy/postprocessing.json")
    assert rule.cases == 6
    assert rule.steps == ((1,),)
    for name in read_cohort(tmp_path / "cohort").test_ids:
        plain, tidy = (read_labels(tmp_path / f"out/predictions/{arm}/{name}.nii.gz")[0] for arm in ("plain", "tidy"))
        np.testing.assert_array_equal(tidy, rule.apply(plain))
        assert (tidy > 0).sum() < (plain > 0).sum()
