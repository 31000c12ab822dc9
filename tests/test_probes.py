"""The probes that guard the scorer: they cover the hard cases and feel the official tolerance."""

from __future__ import annotations

from ichbench.scoring.probes import SPACINGS_MM, probe_pairs, probe_rows


def test_the_probes_feel_the_tolerance_and_never_raise() -> None:
    rows = {(row.arm, row.case, row.metric): row.value for row in probe_rows()}
    nsd = {spacing: rows["instance2022", f"shifted_in_plane@{spacing}", "nsd"] for spacing in SPACINGS_MM}
    # facts, A1: one voxel in plane is within 0.42 mm up to a spacing of 0.42 mm and not above
    assert all((value == 1.0) == (spacing <= 0.42) for spacing, value in nsd.items())
    assert rows["strict", "both_empty@0.42", "dice"] == 1.0
    assert rows["instance2022", "empty_prediction@0.42", "hd"] == float("inf")


def test_every_pair_is_another_one() -> None:
    pairs = [(reference.tobytes(), predicted.tobytes()) for _, reference, predicted in probe_pairs()]
    assert len(set(pairs)) == len(pairs) == 10
