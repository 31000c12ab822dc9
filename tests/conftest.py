"""Fixtures for every test. Real data lies beside the checkout in `shared/data` (or where ICHBENCH_SHARED_DATA says)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# how long drawing and trying an example takes says nothing about the code on a machine that others use too
settings.register_profile("ichbench", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ichbench")

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    # What a script runs in the background starts with SIGINT ignored, and so would the processes that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real CT and real results; tests that need it are skipped, with the reason, where it is missing."""
    folder = Path(os.environ.get("ICHBENCH_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set ICHBENCH_SHARED_DATA to run this test")
    return folder


@pytest.fixture(scope="session")
def small_phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of six small phantoms (four for training), shared by the tests of a worker; do not change it."""
    from ichbench.cases.phantom import write_phantom

    folder = tmp_path_factory.mktemp("cohort") / "phantom6"
    write_phantom(folder, 6, "small", seed=3, n_test=2)
    return folder


TINY = """
[plan]
base_features = 4
max_features = 8
memory_gb = 0.01

[training]
epochs = 1
iterations_per_epoch = 2
validation_iterations = 1

[inference]
mirror = false
tile_step = 1.0
"""


@pytest.fixture
def tiny_preset(tmp_path: Path) -> Path:
    """A preset that trains for a second: it proves the plumbing, not the learning."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path
