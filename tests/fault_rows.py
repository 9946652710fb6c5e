"""One row of the table of promises, as every part of the fault harness makes it."""

from typing import NamedTuple


class Row(NamedTuple):
    """A promise, its measured numbers, and one line for each case that broke it."""
    promise: str
    figures: dict[str, float]
    failed: list[str]
