"""The local engine: order, failures, resuming, ETA. Steps here are cheap stand-ins written as score steps on real files."""

from __future__ import annotations

from pathlib import Path

from ichbench.ablation.dag import Dag, Result, make_dag
from ichbench.ablation.engine import Event, _most_urgent_first, run_dag
from ichbench.ablation.step import result_of
from ichbench.ablation.study import make_study
from ichbench.cases.cohort import read_cohort
from ichbench.compute import ONE_CORE


def untrained(cohort_folder: Path, tmp_path: Path) -> Dag:
    """Floor and one ceiling: a real graph of steps that takes seconds."""
    path = tmp_path / "untrained.toml"
    path.write_text('why = "no training"\nbase = "ceiling_roundtrip"\nfloor = "floor_threshold"\nceilings = false\n')
    return make_dag(make_study(str(path), "smoke"), read_cohort(cohort_folder), (0,), ("full",), ONE_CORE, "instance2022")


def test_runs_in_order_and_resumes(small_phantom: Path, tmp_path: Path) -> None:
    dag = untrained(small_phantom, tmp_path)
    events: list[Event] = []
    outcome = run_dag(dag, tmp_path / "steps", ONE_CORE, 2, events.append)
    assert not outcome.failed
    assert not outcome.blocked
    ended = [event.step.id for event in events if event.kind == "ended" and event.step]
    assert sorted(ended) == sorted(dag.steps)
    for name, step in dag.steps.items():
        assert all(ended.index(needed) < ended.index(name) for needed in step.inputs.values())
    assert all(event.eta_s >= 0 for event in events)
    assert events[-1].finished == events[-1].total == len(dag.steps)
    again: list[Event] = []
    run_dag(dag, tmp_path / "steps", ONE_CORE, 2, again.append)
    assert [event.kind for event in again] == ["found"] * len(dag.steps)


def test_a_failure_blocks_what_needs_it_and_nothing_else(small_phantom: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "cohort"
    shutil.copytree(small_phantom, folder)
    dag = untrained(folder, tmp_path)
    # a test image is cut short after the graph was made: predictions fail, preparation of the training cases does not
    image = next((folder / "imagesTs").iterdir())
    image.write_bytes(image.read_bytes()[:200])
    outcome = run_dag(dag, tmp_path / "steps", ONE_CORE, 2, lambda event: None)
    kinds = {dag.steps[name].kind for name in outcome.failed}
    assert kinds == {"predict"}
    assert {dag.steps[name].kind for name in outcome.blocked} == {"score"}
    assert all(str(image.name) in message for message in outcome.failed.values())
    assert set(outcome.codes.values()) == {2}
    assert [result_of(tmp_path / "steps" / name) is not None for name, step in dag.steps.items() if step.kind == "prepare"] == [True]


def test_long_chains_first(small_phantom: Path) -> None:
    study = make_study("preprocessing", "smoke")
    dag = make_dag(study, read_cohort(small_phantom), (0,), ("full",), ONE_CORE, "instance2022")
    order = _most_urgent_first(dag)
    position = {name: order.index(name) for name in dag.steps}
    result: Result = next(result for result in dag.results if result.arm == "floor_threshold")
    prepares = [name for name, step in dag.steps.items() if step.kind == "prepare"]
    assert max(position[name] for name in prepares) < position[result.predict_step]
