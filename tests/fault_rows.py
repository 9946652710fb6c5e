"""One promise, what was measured of it, and each case that broke it."""

from typing import NamedTuple


class Row(NamedTuple):
    promise: str
    figures: dict[str, float]
    failed: list[str]
