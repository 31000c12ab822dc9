"""The reference that everything here is compared with is the one that the facts were read from."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("nnunetv2")


def test_it_is_the_reference_that_we_follow() -> None:
    assert version("nnunetv2") == "2.8.1"


def test_it_writes_to_folders_of_ours(nnunet_folders: Path) -> None:
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results

    for found, name in ((nnUNet_raw, "raw"), (nnUNet_preprocessed, "preprocessed"), (nnUNet_results, "results")):
        assert Path(os.fspath(found)) == nnunet_folders / name
