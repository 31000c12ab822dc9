"""Fixtures for every test. Real data lies beside the checkout in `shared/data` (or where ICHBENCH_SHARED_DATA says)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real CT and real results; tests that need it are skipped, with the reason, where it is missing."""
    folder = Path(os.environ.get("ICHBENCH_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set ICHBENCH_SHARED_DATA to run this test")
    return folder
