"""Scores for segmentations of intracranial bleeds: exact, never raising on a valid pair of masks, without torch."""

from __future__ import annotations

from ichbench.scoring.protocol import METRICS, PROTOCOLS, Metric, Protocol
from ichbench.scoring.score import Score, read_scores, rows_for_case, score_files, score_folder, score_masks, write_scores

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "Metric",
    "Protocol",
    "Score",
    "read_scores",
    "rows_for_case",
    "score_files",
    "score_folder",
    "score_masks",
    "write_scores",
]
