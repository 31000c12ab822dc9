"""The step graph: what is shared, what is not, and that a step's name depends on all that its result depends on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ichbench.ablation import dag as dag_module
from ichbench.ablation.dag import Dag, make_dag, sources_digest
from ichbench.ablation.folds import make_part
from ichbench.ablation.study import make_study
from ichbench.cases.cohort import Cohort, read_cohort
from ichbench.cases.phantom import write_phantom
from ichbench.compute import ONE_CORE, Compute
from ichbench.errors import InputError


@pytest.fixture(scope="module")
def cohort(small_phantom: Path) -> Cohort:
    return read_cohort(small_phantom)


def graph(cohort: Cohort, study: str = "preprocessing", seeds: tuple[int, ...] = (0,), **changes: object) -> Dag:
    settings: dict[str, object] = {"folds": ("full",), "compute": ONE_CORE, "protocol": "instance2022"} | changes
    return make_dag(make_study(study, "smoke"), cohort, seeds, **settings)  # type: ignore[arg-type]


def kinds(dag: Dag) -> dict[str, int]:
    found = [step.kind for step in dag.steps.values()]
    return {kind: found.count(kind) for kind in dict.fromkeys(found)}


def test_steps_come_after_their_inputs(cohort: Cohort) -> None:
    dag = graph(cohort)
    seen: set[str] = set()
    for name, step in dag.steps.items():
        assert set(step.inputs.values()) <= seen
        assert step.id == name
        seen.add(name)


def test_seeds_share_prepared_data_and_untrained_arms(cohort: Cohort) -> None:
    one, three = kinds(graph(cohort)), kinds(graph(cohort, seeds=(0, 1, 2)))
    assert one == {"prepare": 7, "train": 7, "predict": 15, "score": 15}
    assert three == {"prepare": 7, "train": 21, "predict": 29, "score": 29}


def test_arms_with_the_same_preparation_share_it(cohort: Cohort, tmp_path: Path) -> None:
    path = tmp_path / "loss.toml"
    path.write_text('why = "x"\nfloor = false\nceilings = true\n[factors]\nstop = ["early_stopping"]\n')
    assert kinds(graph(cohort, str(path))) == {"prepare": 1, "train": 2, "predict": 3, "score": 3}


def test_ids_do_not_depend_on_where_things_lie(cohort: Cohort) -> None:
    moved = replace(cohort, root=Path("elsewhere"))
    assert graph(moved).steps.keys() == graph(cohort).steps.keys()


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"compute": Compute(threads=2)}, {"prepare"}),
        ({"compute": Compute("cuda")}, {"prepare"}),
        ({"compute": Compute("cuda", deterministic=True)}, {"prepare"}),
        ({"protocol": "strict"}, {"prepare", "train", "predict"}),
        ({"seeds": (1,)}, {"prepare"}),
    ],
)
def test_what_changes_a_result_changes_its_name(cohort: Cohort, changes: dict[str, object], kept: set[str]) -> None:
    before, after = graph(cohort), graph(cohort, **changes)  # type: ignore[arg-type]
    trained = {
        step_id for result in before.results if result.train_step for step_id in (result.score_step, *before.needed_by(result.score_step))
    }
    for step_id in trained:
        kind = before.steps[step_id].kind
        assert (step_id in after.steps) == (kind in kept), kind


def test_a_changed_case_changes_every_name(small_phantom: Path, cohort: Cohort) -> None:
    other = read_cohort(small_phantom)
    for name in other.train_ids[:1]:
        other._cache[name] = "0" * 64
    assert not {name for name in graph(other).steps if name.startswith(("prepare", "train"))} & graph(cohort).steps.keys()


def test_sources_are_part_of_the_name(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    before = graph(cohort)
    monkeypatch.setattr(dag_module, "sources_digest", lambda kind: "changed" if kind == "score" else sources_digest(kind))
    after = graph(cohort)
    gone = before.steps.keys() - after.steps.keys()
    assert {before.steps[name].kind for name in gone} == {"score"}


def test_scoring_does_not_depend_on_training_sources() -> None:
    assert len({sources_digest(kind) for kind in ("prepare", "train", "predict", "score")}) == 4


def test_a_step_hangs_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ beside a module is part of it."""
    sources_digest.cache_clear()
    before, read = {kind: sources_digest(kind) for kind in ("predict", "score")}, Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"// changed" * (path.name == "native_winograd.h"))
    sources_digest.cache_clear()
    assert sources_digest("predict") != before["predict"]
    assert sources_digest("score") == before["score"]
    sources_digest.cache_clear()


def test_folds_evaluate_on_validation_cases(tmp_path: Path, cohort: Cohort) -> None:
    part = make_part(cohort, "full")
    assert part.train == cohort.train_ids
    assert part.evaluate == cohort.test_ids
    (cohort.root / "splits_final.json").write_text(
        f'[{{"train": {list(cohort.train_ids[:3])}, "val": {list(cohort.train_ids[3:])}}}]'.replace("'", '"')
    )
    try:
        part = make_part(cohort, "0")
    finally:
        (cohort.root / "splits_final.json").unlink()
    assert part.train == cohort.train_ids[:3]
    assert part.evaluate == part.validate == cohort.train_ids[3:]


def test_full_needs_labelled_test_cases(cohort: Cohort) -> None:
    bare = replace(cohort, records=tuple(record for record in cohort.records if record.split == "train"))
    with pytest.raises(InputError, match="use --folds cv"):
        make_part(bare, "full")


def test_folder_arms_need_their_folder(cohort: Cohort, tmp_path: Path) -> None:
    study = make_study("preprocessing", "smoke", {"theirs": tmp_path / "absent"})
    with pytest.raises(InputError, match="does not exist"):
        make_dag(study, cohort, (0,), ("full",), ONE_CORE, "instance2022")
    study = make_study("preprocessing", "smoke", {"theirs": tmp_path})
    with pytest.raises(InputError, match="holds no mask"):
        make_dag(study, cohort, (0,), ("full",), ONE_CORE, "instance2022")


def test_folds_that_share_cases_are_refused(cohort: Cohort) -> None:
    ids = cohort.train_ids
    path = cohort.root / "splits_final.json"
    path.write_text(json.dumps([{"train": ids[2:], "val": ids[:2]}, {"train": ids[:1], "val": ids[1:]}]))
    try:
        with pytest.raises(InputError, match="folds 0 and 1 both score case"):
            graph(cohort, folds=("0", "1"))
    finally:
        path.unlink()


def test_a_patient_on_both_sides_is_refused(cohort: Cohort) -> None:
    same = replace(cohort, records=tuple(replace(record, group="one patient") for record in cohort.records))
    path = cohort.root / "splits_final.json"
    path.write_text(json.dumps([{"train": cohort.train_ids[2:], "val": cohort.train_ids[:2]}]))
    try:
        with pytest.raises(InputError, match="keep all cases of a patient on one side"):
            make_part(same, "0")
    finally:
        path.unlink()


def tidy_study(folder: Path, predictor: str) -> str:
    (folder / "tidy.toml").write_text(f'why = "x"\n[inference]\npredictor = "{predictor}"\npostprocess = "cross-validate"\n')
    path = folder / "study.toml"
    path.write_text('why = "x"\nfloor = false\nceilings = false\n[factors]\ntidy = ["tidy.toml"]\n')
    return str(path)


def test_post_processing_waits_for_five_folds_and_shares_their_masks(tmp_path: Path) -> None:
    write_phantom(tmp_path / "cohort", 8, "small", 5, n_test=2)
    cohort = read_cohort(tmp_path / "cohort")
    full = graph(cohort, tidy_study(tmp_path, "unet"))
    assert kinds(full) == {"prepare": 1, "train": 6, "predict": 6, "score": 2, "postprocess": 1}
    step = next(step for step in full.steps.values() if step.kind == "postprocess")
    assert sorted(step.inputs) == ["fold 0", "fold 1", "fold 2", "fold 3", "fold 4", "predict"]
    assert sorted(name for names in step.spec["folds"].values() for name in names) == sorted(cohort.train_ids)
    by_fold = graph(cohort, tidy_study(tmp_path, "unet"), folds=tuple("01234"))
    assert kinds(by_fold) == {"prepare": 1, "train": 5, "predict": 5, "score": 10, "postprocess": 5}
    with pytest.raises(InputError, match="needs a predictor with folds"):
        graph(cohort, tidy_study(tmp_path, "roundtrip"))
