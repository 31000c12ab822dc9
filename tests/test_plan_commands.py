"""`ichbench fingerprint` and `ichbench plan` as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import nibabel
import numpy as np
import pytest
from test_cli import call, one_line
from typer.testing import CliRunner

from ichbench.cases.cohort import read_cohort
from ichbench.cases.nifti import TURNING_READERS
from ichbench.cli import app
from ichbench.errors import InputError
from ichbench.prepare.fingerprint import STATISTICS, Fingerprint, combine, fingerprint, read_fingerprint
from ichbench.prepare.nnunet_files import check_expressible, dataset_table, reader_of, side_files
from ichbench.prepare.pipeline import flagged_case
from ichbench.prepare.plans_read import plans_of, read_plans
from ichbench.prepare.survey import cohort_fingerprint, cohort_plan, cohort_plans, label_counts
from ichbench.recipe import PlanRecipe, PrepareRecipe, Window


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's 1e8 draws take seconds; a thousandth of them shows the same."""
    monkeypatch.setattr("ichbench.prepare.survey.combine", lambda facts, sampled, workers: combine(facts, sampled, 10**5, workers))


def refused(*arguments: object) -> str:
    """The message of an `InputError`, which the command line prints alone; without starting a process."""
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert isinstance(done.exception, InputError), done.exception
    return str(done.exception)


def test_fingerprint_says_what_it_found_and_writes_nnunets_file(small_phantom: Path, tmp_path: Path) -> None:
    done = call("fingerprint", small_phantom, "--out", tmp_path / "pre")
    assert done.returncode == 0, done.stderr
    for words in ("over 4 cases", "channel 0 (CT): mean", "Computed from all voxels", "dataset_fingerprint.json (written)"):
        assert words in done.stdout
    assert sorted(files(tmp_path / "pre")) == ["dataset.json", "dataset_fingerprint.json"]
    cohort = read_cohort(small_phantom)
    read = read_fingerprint(tmp_path / "pre/dataset_fingerprint.json", 4)
    assert read == fingerprint(flagged_case(cohort.load(name), PrepareRecipe())[0] for name in cohort.train_ids)
    again = call("fingerprint", small_phantom, "--out", tmp_path / "pre")
    assert again.stdout.count("(unchanged)") == 2


def test_plan_explains_itself_and_writes_nnunets_files(small_phantom: Path, tmp_path: Path) -> None:
    done = call("plan", small_phantom, "--out", tmp_path / "pre", "--family", "resenc_m")
    assert done.returncode == 0, done.stderr
    wanted = (
        "planner resenc_m (nnU-Net's nnUNetPlannerResEncM)", "The median spacing of the cases is", "2d: why this patch and batch",
        "3d_fullres: why this patch and batch", "Low resolution and cascade", "Channel 0 (CT): clipped to", "configuration  spacing (mm)",
    )  # fmt: skip
    for words in wanted:
        assert words in done.stdout, done.stdout
    assert sorted(files(tmp_path / "pre")) == ["dataset.json", "dataset_fingerprint.json", "nnUNetResEncUNetMPlans.json"]
    dataset = json.loads((tmp_path / "pre/dataset.json").read_text())
    plans = plans_of(read_plans(tmp_path / "pre/nnUNetResEncUNetMPlans.json"), dataset)
    cohort = read_cohort(small_phantom)
    found = cohort_fingerprint(cohort, cohort.train_ids, PrepareRecipe())
    planned = cohort_plans(cohort, found, PrepareRecipe(), PlanRecipe(family="resenc_m"))
    assert plans == {name: sized.plan for name, sized in planned.configurations.items()}
    assert plans["3d_fullres"] == cohort_plan(cohort, found, PrepareRecipe(), PlanRecipe(family="resenc_m"))
    # from the file, without measuring again
    quick = call("plan", small_phantom, "--family", "resenc_m", "--fingerprint", tmp_path / "pre/dataset_fingerprint.json")
    assert quick.stdout in done.stdout


def test_what_was_there_is_never_lost(small_phantom: Path, tmp_path: Path) -> None:
    out = tmp_path / "pre"
    assert call("plan", small_phantom, "--out", out).returncode == 0
    path = out / "nnUNetPlans.json"
    edited = json.loads(path.read_text())
    edited["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 5}
    path.write_text(json.dumps(edited, indent=4))
    before = files(out)
    assert call("plan", small_phantom, "--out", out).stdout.count("(unchanged)") == 3  # a configuration of one's own stays
    assert files(out) == before
    message = one_line(call("plan", small_phantom, "--out", out, "--memory-gb", 0.5))
    assert "nnUNetPlans.json is there already and says something else" in message
    assert "--overwrite" in message
    assert files(out) == before
    assert call("plan", small_phantom, "--out", out, "--memory-gb", 0.5, "--overwrite").returncode == 0
    after = json.loads(path.read_text())["configurations"]
    assert after["mine"] == edited["configurations"]["mine"]
    assert after["3d_fullres"] != edited["configurations"]["3d_fullres"]
    path.write_text("no plans")
    assert "is not a plans file" in one_line(call("plan", small_phantom, "--out", out, "--overwrite"))


@pytest.mark.usefixtures("fewer_draws")
def test_the_switch_gives_nnunets_draw(small_phantom: Path) -> None:
    """Threads or not, the numbers are those of `sampled`, and they are near the law's."""
    cohort = read_cohort(small_phantom)
    ours = cohort_fingerprint(cohort, cohort.train_ids, PrepareRecipe(), workers=2)
    assert ours == cohort_fingerprint(cohort, cohort.train_ids, PrepareRecipe())
    theirs = cohort_fingerprint(cohort, cohort.train_ids, PrepareRecipe(compatibility="nnunet"), workers=2)
    assert theirs.spacings == ours.spacings
    for key, value in ours.intensities["0"].items():
        assert theirs.intensities["0"][key] == pytest.approx(value, rel=0.02)
    assert theirs.intensities != ours.intensities


def test_user_errors_are_one_line(small_phantom: Path, tmp_path: Path) -> None:
    cases = {
        ("--family", "resnet"): "plan.family = 'resnet' is not allowed",
        ("--spacing", "5,0.5"): "give three numbers in mm, z,y,x",
        ("--spacing", "5,0.5,0"): "plan.target_spacing_zyx_mm",
        ("--memory-gb", "0"): "plan.memory_gb",
        ("--memory-gb", "0.00001"): "no patch fits plan.memory_gb",
        ("--compatibility", "nnU-Net"): "prepare.compatibility = 'nnU-Net' is not allowed",
        ("--fingerprint", str(small_phantom / "dataset.json")): "not a dataset fingerprint",
        ("--fingerprint", str(tmp_path / "none.json")): "cannot be read",
        ("--recipe", "window_swapped", "--out", str(tmp_path / "x")): "cannot say prepare.window",
        ("--recipe", "nothing"): "there is no arm 'nothing'",
    }
    for arguments, message in cases.items():
        assert message in refused("plan", small_phantom, *arguments), arguments
    assert "no such folder or file" in one_line(call("fingerprint", tmp_path / "nowhere"))
    assert not (tmp_path / "x").exists()
    other = Fingerprint(((1.0,) * 3,), ((9,) * 3,), {"0": dict.fromkeys(STATISTICS, 1.0)}, 1.0)
    (tmp_path / "other.json").write_text(other.to_text())
    message = refused("plan", small_phantom, "--fingerprint", tmp_path / "other.json")
    assert "was taken of 1 cases, but there are 4 training cases" in message


def test_spacing_on_the_command_line_is_nnunets_override(small_phantom: Path) -> None:
    done = call("plan", small_phantom, "--spacing", "2,4,1")
    assert "The recipe fixes the working spacing: 2 x 4 x 1 mm (z, y, x)." in done.stdout
    assert "Axis y has the coarsest working spacing and comes first; all numbers below are in the order y, z, x." in done.stdout
    assert "3d_fullres     4 x 2 x 1" in done.stdout


def test_an_arms_flags_act_before_the_measure(small_phantom: Path) -> None:
    done = call("fingerprint", small_phantom, "--recipe", "window_swapped")
    cohort = read_cohort(small_phantom)
    recipe = PrepareRecipe(window=Window(level_hu=59.0, width_hu=96.0))
    facts = cohort_fingerprint(cohort, cohort.train_ids, recipe).intensities["0"]
    assert f"mean {facts['mean']:.5g}, sd {facts['std']:.5g}" in done.stdout


@pytest.mark.usefixtures("fewer_draws")
def test_files_whose_slices_lie_elsewhere_are_not_written_for_nnunet(small_phantom: Path, tmp_path: Path) -> None:
    """Sagittal files: ours takes z first, nnU-Net the file's last axis; files for it must be in its order."""
    turned = tmp_path / "turned"
    shutil.copytree(small_phantom, turned)
    for path in [*turned.glob("imagesT*/*.nii.gz"), *turned.glob("labelsT*/*.nii.gz")]:
        image = nibabel.load(path)
        data = np.asarray(image.dataobj).transpose(2, 0, 1)
        affine = image.affine[:, [2, 0, 1, 3]]
        nibabel.save(nibabel.Nifti1Image(data, affine), path)
    message = refused("plan", turned, "--out", tmp_path / "pre")
    assert "add --compatibility nnunet" in message
    assert not (tmp_path / "pre").exists()
    done = CliRunner().invoke(app, ["plan", str(turned), "--out", str(tmp_path / "pre"), "--compatibility", "nnunet"])
    assert done.exit_code == 0, done.exception
    plans = json.loads((tmp_path / "pre/nnUNetPlans.json").read_text())
    assert plans["transpose_forward"] == [2, 0, 1]


def test_the_ignore_label_counts_in_the_estimate_alone(small_phantom: Path, tmp_path: Path) -> None:
    shutil.copytree(small_phantom, tmp_path / "ignored")
    described = json.loads((small_phantom / "dataset.json").read_text())
    described["labels"]["ignore"] = 2
    (tmp_path / "ignored/dataset.json").write_text(json.dumps(described))
    plain, ignored = read_cohort(small_phantom), read_cohort(tmp_path / "ignored")
    assert (label_counts(plain), label_counts(ignored)) == ((2, 2), (3, 2))
    found = cohort_fingerprint(plain, plain.train_ids, PrepareRecipe())
    before, after = (cohort_plan(cohort, found, PrepareRecipe(), PlanRecipe()) for cohort in (plain, ignored))
    assert before.n_classes == after.n_classes == 2
    assert after.estimate - before.estimate == np.prod(after.patch_size)


def declaring(source: Path, folder: Path, **values: object) -> Path:
    """A copy of the cohort whose dataset.json says something else as well."""
    shutil.copytree(source, folder)
    described = json.loads((source / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(described | values))
    return folder


REGIONS = {"labels": {"background": 0, "whole": [1, 2, 3, 4, 5], "core": [2, 3]}, "regions_class_order": [1, 2]}


def test_a_region_counts_once_however_many_values_it_joins(small_phantom: Path, tmp_path: Path) -> None:
    """nnU-Net counts the names in dataset.json; its network has one output per region."""
    folder = declaring(small_phantom, tmp_path / "regions", **REGIONS)
    cohort = read_cohort(folder)
    assert label_counts(cohort) == (3, 2)
    assert cohort.rules.n_heads == 2
    found = cohort_fingerprint(cohort, cohort.train_ids, PrepareRecipe())
    planned = cohort_plan(cohort, found, PrepareRecipe(), PlanRecipe())
    plain = cohort_plan(read_cohort(small_phantom), found, PrepareRecipe(), PlanRecipe())
    assert (planned.n_classes, planned.estimate - plain.estimate) == (2, np.prod(planned.patch_size))
    done = CliRunner().invoke(app, ["plan", str(folder), "--out", str(tmp_path / "pre")])
    assert "with 3 labels" in done.stdout
    dataset = json.loads((tmp_path / "pre/dataset.json").read_text())
    assert plans_of(read_plans(tmp_path / "pre/nnUNetPlans.json"), dataset)["3d_fullres"] == planned


def test_regions_of_a_table_reach_nnunets_dataset_json(small_phantom: Path, tmp_path: Path) -> None:
    """A cohort.csv speaks for itself, also where an older dataset.json lies beside it."""
    table = ["id,image,mask,split"]
    for path in sorted((small_phantom / "labelsTr").glob("*.nii.gz")):
        name = path.name.removesuffix(".nii.gz")
        table.append(f"{name},{small_phantom}/imagesTr/{name}_0000.nii.gz,{path},train")
    (tmp_path / "cohort.csv").write_text("\n".join(table) + "\n")
    (tmp_path / "cohort.json").write_text(json.dumps(REGIONS))
    shutil.copy(small_phantom / "dataset.json", tmp_path)
    cohort = read_cohort(tmp_path / "cohort.csv")
    written = dataset_table(cohort)
    assert {key: written[key] for key in REGIONS} == REGIONS
    assert label_counts(cohort) == (3, 2)


@pytest.mark.usefixtures("fewer_draws")
def test_channels_out_of_order_are_refused_under_the_switch(small_phantom: Path, tmp_path: Path) -> None:
    """nnU-Net takes the first scheme for the files _0000, whatever number it has; otherwise the number counts."""
    folder = declaring(small_phantom, tmp_path / "two", channel_names={"1": "CT", "0": "T1"})
    for path in [*(folder / "imagesTr").iterdir(), *(folder / "imagesTs").iterdir()]:
        shutil.copyfile(path, path.with_name(path.name.replace("_0000", "_0001")))
    for command in (["plan"], ["prepare", "--out", tmp_path / "out"]):
        message = refused(*command, folder, "--compatibility", "nnunet", "--workers", "1")
        assert "channel_names are listed in the order 1, 0;" in message
        assert 'list them from "0" on' in message
    assert not (tmp_path / "out").exists()
    cohort = read_cohort(folder)
    found = cohort_fingerprint(cohort, cohort.train_ids, PrepareRecipe())
    assert cohort_plan(cohort, found, PrepareRecipe(), PlanRecipe()).normalization == ("ZScoreNormalization", "CTNormalization")
    declared = json.loads((folder / "dataset.json").read_text()) | {"channel_names": {"0": "T1", "1": "CT"}}
    (folder / "dataset.json").write_text(json.dumps(declared))
    as_nnunet = PrepareRecipe(compatibility="nnunet")
    assert cohort_plan(read_cohort(folder), found, as_nnunet, PlanRecipe()).normalization[1] == "CTNormalization"


@pytest.mark.parametrize("reader", ["MyIOWithReorient", "FooIO", 3])
def test_readers_that_read_other_voxels_are_refused(small_phantom: Path, tmp_path: Path, reader: object) -> None:
    folder = declaring(small_phantom, tmp_path / "turned", overwrite_image_reader_writer=reader)
    for arguments in (["--out", tmp_path / "pre"], ["--compatibility", "nnunet"]):
        for command in ("plan", "fingerprint"):
            message = refused(command, folder, *arguments)
            assert f"overwrite_image_reader_writer is '{reader}'" in message
            assert "SimpleITKIO, NibabelIO, NibabelIOWithReorient and SimpleITKIOWithReorient" in message
    assert not (tmp_path / "pre").exists()


@pytest.mark.parametrize(("reader", "expected"), [("None", "SimpleITKIO"), (None, "SimpleITKIO"), ("NibabelIO", "NibabelIO")])
def test_readers_that_are_obeyed(small_phantom: Path, tmp_path: Path, reader: str | None, expected: str) -> None:
    assert reader_of(read_cohort(declaring(small_phantom, tmp_path / "named", overwrite_image_reader_writer=reader))) == expected


def flipped(folder: Path, case: str) -> None:
    """Store a case's files back to front and upside down; they lie where they lay."""
    for path in (folder / f"imagesTr/{case}_0000.nii.gz", folder / f"labelsTr/{case}.nii.gz"):
        nibabel.save(nibabel.load(path).slicer[:, ::-1, ::-1], path)


@pytest.mark.usefixtures("fewer_draws")
@pytest.mark.parametrize("reader", TURNING_READERS)
def test_a_reader_that_turns_files_is_obeyed(small_phantom: Path, tmp_path: Path, reader: str) -> None:
    """One case is stored the other way round: the fingerprint does not change, and what is written names the reader."""
    folder = declaring(small_phantom, tmp_path / "turned", overwrite_image_reader_writer=reader)
    cohort = read_cohort(folder, reorient=reader)
    recipe = PrepareRecipe(compatibility="nnunet", reorient=reader)  # type: ignore[arg-type]
    before = cohort_fingerprint(cohort, cohort.train_ids, recipe).to_json()
    volume = cohort.load(cohort.train_ids[0], keep_file_order=True).image_czyx
    flipped(folder, cohort.train_ids[0])
    np.testing.assert_array_equal(cohort.load(cohort.train_ids[0], keep_file_order=True).image_czyx, volume)
    # without the switch the cohort is ours to read, and ours do not mix
    assert "must agree" in refused("plan", folder, "--workers", "1")
    for switch in (["--compatibility", "nnunet"], []):
        out = tmp_path / f"pre{len(switch)}"
        done = CliRunner().invoke(app, ["plan", str(folder), "--out", str(out), "--workers", "1", *switch])
        assert done.exit_code == 0, done.output
        assert f"dataset.json names {reader}: cases are turned as it turns them" in done.output
        assert json.loads((out / "nnUNetPlans.json").read_text())["image_reader_writer"] == reader
        if switch:
            assert json.loads((out / "dataset_fingerprint.json").read_text()) == json.loads(json.dumps(before))


def test_a_recipe_that_turns_otherwise_than_the_cohort_says(small_phantom: Path, tmp_path: Path) -> None:
    first, second = TURNING_READERS
    folder = declaring(small_phantom, tmp_path / "turned", overwrite_image_reader_writer=first)
    plain = declaring(small_phantom, tmp_path / "plain", overwrite_image_reader_writer="SimpleITKIO")
    assert reader_of(read_cohort(small_phantom, reorient=second)) == second
    assert side_files(read_cohort(small_phantom, reorient=second))["dataset.json"].count(second) == 1
    assert reader_of(read_cohort(folder, reorient=first)) == first
    for source, reorient, said in (
        (folder, False, f"is '{first}', but prepare.reorient is false, .*set prepare.reorient = '{first}'"),
        (folder, True, f"is '{first}', but prepare.reorient is true, .*set prepare.reorient = '{first}'"),
        (folder, second, f"is '{first}', but prepare.reorient is '{second}', .*set prepare.reorient = '{first}'"),
        (plain, first, f"is 'SimpleITKIO', but prepare.reorient is '{first}', .*name '{first}' there, or leave reorient out"),
    ):
        with pytest.raises(InputError, match=said):
            reader_of(read_cohort(source, reorient=reorient))  # type: ignore[arg-type]
    arm = tmp_path / "arm.toml"
    arm.write_text(f'why = "x"\n[prepare]\ncompatibility = "nnunet"\nreorient = "{second}"\n')
    assert "set prepare.reorient" in refused("plan", folder, "--recipe", arm, "--workers", "1")
    # training does not change a recipe: it must say so itself
    arm.write_text('why = "x"\n[prepare]\ncompatibility = "nnunet"\n')
    train = ["train", folder, "--recipe", arm, "--fold", "full", "--preset", "smoke", "--out", tmp_path / "out"]
    assert f"set prepare.reorient = '{first}'" in refused(*train)
    assert TURNING_READERS == get_args(get_args(PrepareRecipe.model_fields["reorient"].annotation)[1])


def test_a_label_map_cannot_be_said_to_nnunet(small_phantom: Path, tmp_path: Path) -> None:
    mapped = declaring(small_phantom, tmp_path / "mapped", label_map={"1": 1, "2": 1})
    for switch in ([], ["--compatibility", "nnunet"]):
        message = refused("fingerprint", mapped, "--out", tmp_path / "pre", *switch)
        assert "its label_map {2: 1} is not known to nnU-Net" in message
    assert not (tmp_path / "pre").exists()
    same = declaring(small_phantom, tmp_path / "same", label_map={"1": 1})
    check_expressible(read_cohort(same), PrepareRecipe())


def test_prepare_writes_every_case_as_training_sees_it(small_phantom: Path, tmp_path: Path) -> None:
    from ichbench.prepare.pipeline import prepare_case
    from ichbench.prepare.plan import Plan
    from ichbench.prepare.store import list_prepared, read_prepared
    from ichbench.recipe import Recipe

    out = tmp_path / "prepared"
    done = CliRunner().invoke(app, ["prepare", str(small_phantom), "--out", str(out), "--workers", "1"])
    assert done.exit_code == 0, done.output
    cohort = read_cohort(small_phantom)
    assert sorted(list_prepared(out / "cases")) == sorted(record.id for record in cohort.records)
    plan = Plan.from_json(json.loads((out / "plan.json").read_text()))
    for name in (cohort.train_ids[0], cohort.test_ids[0]):
        own, wanted = read_prepared(out / "cases", name, verify=True), prepare_case(cohort.load(name), Recipe().prepare, plan)
        np.testing.assert_array_equal(own.image_czyx, wanted.image_czyx)
        assert own.labels_zyx is not None
        np.testing.assert_array_equal(own.labels_zyx, wanted.labels_zyx)
    again = CliRunner().invoke(app, ["prepare", str(small_phantom), "--out", str(out)])
    assert "not an empty folder" in str(again.exception)


@pytest.mark.parametrize("there", [False, True])
def test_a_case_that_fails_leaves_no_half_made_folder(small_phantom: Path, tmp_path: Path, there: bool) -> None:
    """A damaged test image is read last, when all else is prepared; once it is replaced the same command goes through."""
    data, out = tmp_path / "data", tmp_path / "new/prepared"
    shutil.copytree(small_phantom, data)
    broken = sorted((data / "imagesTs").iterdir())[0]
    good = broken.read_bytes()
    broken.write_bytes(good[: len(good) // 2])
    if there:
        # what a killed process leaves
        (out / ".prepare-1/prepared").mkdir(parents=True)
    assert broken.name in refused("prepare", data, "--out", out, "--workers", "1")
    assert [path.name for path in (tmp_path / "new").rglob("*")] == (["prepared", ".prepare-1", "prepared"] if there else [])
    broken.write_bytes(good)
    done = CliRunner().invoke(app, ["prepare", str(data), "--out", str(out), "--workers", "1"])
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} - {".prepare-1"} == {"cases", "fingerprint.json", "plan.json"}
    assert len(list((out / "cases").iterdir())) == len(read_cohort(data).records)
