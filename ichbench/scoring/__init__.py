"""Scores for segmentations of intracranial bleeds: exact, never raising on a valid pair of masks, without torch."""

from __future__ import annotations

from ichbench.scoring.folders import Options, score_files, score_folder, score_pairs
from ichbench.scoring.layouts import Pair
from ichbench.scoring.protocol import METRICS, PROTOCOLS, Metric, Protocol
from ichbench.scoring.score import Score, rows_for_case, score_masks
from ichbench.scoring.tables import Aggregate, aggregate, read_scores, write_scores, write_wide

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "Aggregate",
    "Metric",
    "Options",
    "Pair",
    "Protocol",
    "Score",
    "aggregate",
    "read_scores",
    "rows_for_case",
    "score_files",
    "score_folder",
    "score_masks",
    "score_pairs",
    "write_scores",
    "write_wide",
]
