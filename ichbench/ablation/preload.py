"""Imported once by the server that child processes are forked from, so that each starts with torch in memory."""

import ichbench.cases.cohort
import ichbench.inference.predictors
import ichbench.inference.sliding
import ichbench.network.weights
import ichbench.prepare.store
import ichbench.scoring.score
import ichbench.scoring.tables
import ichbench.training.trainer  # noqa: F401
