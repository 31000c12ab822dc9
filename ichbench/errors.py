"""The two ways a run can end badly. Everything a user can cause is an `InputError`."""

from __future__ import annotations


class InputError(ValueError):
    """The input is wrong. The message says what came, what is allowed and what to do next.

    The command line prints the message alone (no traceback) and exits with 2.
    """


class CaseError(RuntimeError):
    """A case or a check failed although the input was well formed. The command line exits with 1."""
