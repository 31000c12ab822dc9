"""Comparisons with nnunetv2, which the tox environment `parity-nnunet` installs; without it they are skipped.

Every test module begins with `pytest.importorskip("nnunetv2")`. Inputs are drawn anew in each run from the seed that
`fresh_seed` gives; a failure prints it, and ICHBENCH_PARITY_SEED=N repeats it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
HAVE_NNUNET = importlib.util.find_spec("nnunetv2") is not None
SEED = int(os.environ.get("ICHBENCH_PARITY_SEED", int.from_bytes(os.urandom(4), "big")))

if HAVE_NNUNET:
    # nnunetv2 reads its three folders from the environment; a user's own must never be written to
    FOLDERS = Path(tempfile.mkdtemp(prefix="ichbench-nnunet-"))
    for name in ("raw", "preprocessed", "results"):
        (FOLDERS / name).mkdir()
        os.environ[f"nnUNet_{name}"] = str(FOLDERS / name)
    # planning computes with as many threads as there are workers, so at least one; unset, it asks the shell for the host's name.
    # What trains in this process wants none, and says so only while it trains (`nn_training.training_here`)
    os.environ["nnUNet_n_proc_DA"] = "1"


def pytest_report_header() -> str:
    return (
        f"nnunetv2 comparisons: ICHBENCH_PARITY_SEED={SEED}" if HAVE_NNUNET else "nnunetv2 is not installed: tests/parity_nnunet is skipped"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            # warnings of nnunetv2 and what it imports are not ours to mend
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if HERE in item.path.parents and report.failed:
        report.sections.append(("repeat with", f"ICHBENCH_PARITY_SEED={SEED}"))
    return report


def pytest_unconfigure() -> None:
    if HAVE_NNUNET:
        shutil.rmtree(FOLDERS, ignore_errors=True)


@pytest.fixture(scope="session")
def fresh_seed() -> int:
    """Another seed in every run; ICHBENCH_PARITY_SEED fixes it."""
    return SEED


@pytest.fixture(scope="session")
def nnunet_folders() -> Path:
    """Holds raw/, preprocessed/ and results/, which nnUNet_raw, nnUNet_preprocessed and nnUNet_results name; empty at the start."""
    pytest.importorskip("nnunetv2")
    return FOLDERS
