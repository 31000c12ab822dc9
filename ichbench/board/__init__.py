"""Boards and effects: everything that follows from score rows.

`summary` folds rows into one value per case and describes each arm, `effects` compares arms with a base case by case,
`render` writes both as CSV, Markdown and text, `check` compares two sets of facts. Nothing here imports torch.
"""
