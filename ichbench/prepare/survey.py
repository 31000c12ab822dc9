"""Cohort -> fingerprint and plans: what happens before any case is prepared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ichbench.cases.cohort import Cohort
from ichbench.prepare.fingerprint import CaseFacts, Fingerprint, case_facts, combine
from ichbench.prepare.nnunet_files import check_channel_order, dataset_table
from ichbench.prepare.pipeline import flagged_case
from ichbench.prepare.plan import Plan, Planned, Planner, make_plan, plan_all
from ichbench.prepare.plans_read import count_labels
from ichbench.recipe import PlanRecipe, PrepareRecipe


def cohort_fingerprint(
    cohort: Cohort,
    ids: Sequence[str],
    recipe: PrepareRecipe,
    workers: int = 1,
    progress: Callable[[str], None] = lambda case_id: None,
) -> Fingerprint:
    """Fingerprint of the cases `ids` after the recipe's flags; with compatibility "nnunet" nnU-Net's own, to the last digit.

    workers   cases that are read at once; changes nothing but the time
    progress  called with each case's id once it is measured
    """
    as_nnunet = recipe.compatibility == "nnunet"

    def measured(case_id: str) -> CaseFacts:
        case, _, _ = flagged_case(cohort.load(case_id, keep_file_order=as_nnunet), recipe, cohort.channel_names)
        return case_facts(case)

    def each() -> Iterator[CaseFacts]:
        if workers == 1:
            for case_id in ids:
                yield measured(case_id)
                progress(case_id)
            return
        with ThreadPoolExecutor(workers) as threads:
            waiting: list[tuple[str, Future[CaseFacts]]] = []
            for case_id in [*ids, *[""] * workers]:
                if case_id:
                    waiting.append((case_id, threads.submit(measured, case_id)))
                # few cases are held at once, however many there are
                if waiting and (not case_id or len(waiting) > workers):
                    done, job = waiting.pop(0)
                    yield job.result()
                    progress(done)

    return combine(each(), sampled=as_nnunet, workers=workers)


def cohort_plan(cohort: Cohort, found: Fingerprint, prepare: PrepareRecipe, recipe: PlanRecipe) -> Plan:
    """The plan that `recipe` asks for, of the cases that the fingerprint was taken of."""
    n_labels, n_classes = _counts(cohort, prepare)
    return make_plan(found, recipe, cohort.channel_names, n_labels, len(found.spacings), _neighbours(prepare), n_classes)


def cohort_plans(cohort: Cohort, found: Fingerprint, prepare: PrepareRecipe, recipe: PlanRecipe) -> Planned:
    """Every configuration that nnU-Net would plan for the cohort, with the reasons."""
    n_labels, n_classes = _counts(cohort, prepare)
    return plan_all(Planner(found, recipe, cohort.channel_names, n_labels, len(found.spacings), _neighbours(prepare), n_classes))


def label_counts(cohort: Cohort) -> tuple[int, int]:
    """(entries of dataset.json's `labels`, the ignore label among them; outputs of the network, see `count_labels`).

    A region is one entry, however many values it joins: nnU-Net's memory estimate counts names, not values.
    """
    return count_labels(dataset_table(cohort)["labels"])


def _counts(cohort: Cohort, prepare: PrepareRecipe) -> tuple[int, int]:
    if prepare.compatibility == "nnunet":
        check_channel_order(cohort)
    return label_counts(cohort)


def _neighbours(prepare: PrepareRecipe) -> int:
    return 0 if prepare.neighbour_slices == "off" else prepare.neighbour_slices
