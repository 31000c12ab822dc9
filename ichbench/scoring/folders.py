"""Many pairs, in this process or in several: files, folders and data sets of masks -> rows.

At most a few pairs per process are in memory at any time, however many there are. The first pair that cannot be scored ends
it all, with an error that names the case and its files: a table that silently lacks a case is worse than none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

from ichbench.errors import CaseError, InputError
from ichbench.scoring.layouts import Pair, Pairing, case_id, check_labels, find_pairs
from ichbench.scoring.pairs import Scored, Settings, as_pair, score_pair
from ichbench.scoring.protocol import Protocol, get_protocol
from ichbench.scoring.score import Score

#: A worker process takes about half a second to start, which is worth it from so many cases on.
CASES_PER_WORKER = 8
#: Pairs handed to each worker before the first of them must be done.
AHEAD = 3

_LOG = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Options(TypedDict, total=False):
    """The keywords of `score_pairs`, `score_files` and `score_folder`; all may be left out.

    arm, fold, seed   what the rows are filed under: "prediction" (in `score_folder` the name of the folder), "-" and "-"
    labels            name -> value, or a list of values for a region: adds rows such as `dice/2` and `dice/region`. Without it the
                      foreground alone, and in `score_folder` what the data set declares
    reorient          turn predictions whose axes are stored in another order or direction (files only)
    workers           processes, 1 unless given; None takes every core available (`score_folder`: no more than are worth it).
                      They are spawned, so a script needs its `if __name__ == "__main__":` then
    """

    arm: str | None
    fold: str
    seed: str
    labels: Mapping[str, Any] | None
    reorient: bool
    workers: int | None


def score_pairs(
    pairs: Iterable[Pair | tuple[Any, ...]], protocol: str | Protocol = "instance2022", **options: Unpack[Options]
) -> Iterator[Score]:
    """Rows of many pairs, one case after the other in the order given; a pair is read when its turn comes.

    pairs     (case, reference, prediction) with paths, or (case, reference, prediction, spacing_zyx_mm) with 3D arrays or
              tensors (z, y, x); a prediction None is a missing one. Any iterable: with a generator, memory stays flat
    options   keywords, all described in `Options`
    InputError naming case and files for the first pair that does not fit, CaseError for one that fails otherwise.
    """
    return _scored(pairs, Pairing(()), protocol, options, available_cores)


def score_each(pairs: Iterable[Pair | tuple[Any, ...]], settings: Settings, workers: int = 1) -> Iterator[Scored]:
    """`score_pairs` case by case, with files, counts and notes beside the rows; notes are kept and not warned of."""
    return in_order(score_pair, ((settings, as_pair(pair)) for pair in pairs), workers)


def score_files(
    reference: Path, prediction: Path | None, protocol: str | Protocol = "instance2022", **options: Unpack[Options]
) -> list[Score]:
    """Rows of one pair of mask files; the case is named after the reference file. `prediction` None is a missing one.

    The spacing is the pixdim of the reference's header, as in the official script. Both files must put every voxel in the
    same place within 1e-3 mm, else InputError with both files and both values (the official script compares shapes only).
    `options` are keywords, all described in `Options`.
    """
    pair = Pair(case_id(Path(reference)), Path(reference), None if prediction is None else Path(prediction))
    return list(score_pairs([pair], protocol, **options))


def score_folder(
    reference_dir: Path, prediction_dir: Path, protocol: str | Protocol = "instance2022", **options: Unpack[Options]
) -> list[Score]:
    """Rows of every reference in a folder, in the order of their names; matched on the file name without .nii or .nii.gz.

    Walks the references: one without a prediction is scored as a missing prediction, a prediction without a reference
    is only mentioned in the log. The folder may be an nnU-Net data set or an INSTANCE folder (`layouts.find_pairs`).
    `options` are keywords, all described in `Options`. InputError for a missing folder, no reference at all, two files of one
    case, or a pair that does not fit.
    """
    found = find_pairs(Path(reference_dir), Path(prediction_dir))
    if found.extra:
        names = ", ".join(path.name for path in found.extra[:5])
        _LOG.warning("%d prediction(s) in %s have no reference and are not scored: %s", len(found.extra), prediction_dir, names)
    return list(_scored(found.pairs, found, protocol, options, lambda: default_workers(len(found.pairs))))


def labels_present(references: Iterable[Path], workers: int = 1) -> dict[str, int]:
    """Every label value of these mask files as `labels`: {"background": 0, "1": 1, "2": 2}. Reads them all."""
    values = {value for found in in_order(_values, references, workers) for value in found}
    return {"background": 0} | {str(value): value for value in sorted(values - {0})}


def available_cores() -> int:
    """Cores that this process may use: fewer than the machine has under a scheduler, or in a container with a CPU set."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(n_cases: int) -> int:
    """Every available core for many cases, this process alone for few."""
    return max(1, min(available_cores(), n_cases // CASES_PER_WORKER))


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map` over spawned processes: lazy, in order, and with at most AHEAD items per process under way."""
    if workers < 1:
        raise InputError(f"workers is {workers}; 1 or more are needed")
    if workers == 1:
        yield from map(function, items)
        return
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            with _interrupts_held():
                waiting.append(pool.submit(function, item))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise CaseError(
            f"a worker process ended abruptly ({error}): it was killed, ran out of memory, or the script that started it lacks "
            'its `if __name__ == "__main__":`; use fewer workers, or 1'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes that start meanwhile never see a ctrl-C, from their first moment on: it is the parent's to handle."""
    import signal

    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """A worker must not outlive its parent."""
    import multiprocessing
    import threading

    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _scored(
    pairs: Iterable[Pair | tuple[Any, ...]], found: Pairing, protocol: str | Protocol, options: Options, most: Callable[[], int]
) -> Iterator[Score]:
    """Rows of the pairs; labels and arm are those `found` where the options name none, `most` the processes for workers=None."""
    given: dict[str, Any] = {**options}
    workers, arm, labels = given.pop("workers", 1), given.pop("arm", None), given.pop("labels", None)
    declared = found.labels if labels is None else check_labels(dict(labels), "labels")
    settings = Settings(get_protocol(protocol), found.arm if arm is None else arm, labels=declared, label_map=found.label_map, **given)
    return _rows(score_each(pairs, settings, most() if workers is None else workers))


def _rows(every: Iterator[Scored]) -> Iterator[Score]:
    for scored in every:
        for note in scored.notes:
            warnings.warn(note, UserWarning, stacklevel=3)
        yield from scored.rows


def _values(path: Path) -> set[int]:
    import numpy as np

    from ichbench.cases.images import read_labels

    return {int(value) for value in np.unique(read_labels(path, keep_file_order=True)[0])}
