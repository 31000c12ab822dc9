"""Case -> Prepared, and the exact way back. Files in reading order: one step a file, then the pipeline and the store."""
