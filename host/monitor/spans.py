"""From which rows a span of a device's time is read: telemetry as it came, by minute, or by hour.

The longer the span, the coarser its rows; what sticks out over whole hours is read by minute, and over whole minutes as it
came, so a span gives what the telemetry in it gives. Only where finer rows are forgotten already is the minute or hour at
an edge taken whole.
"""

import math
from dataclasses import dataclass

AS_IT_CAME, MINUTE, HOUR = 0, 60, 3600
"""Seconds that a row stands for."""
WIDTHS = (MINUTE, HOUR)
FINEST_UP_TO_S = {AS_IT_CAME: 6 * 3600.0, MINUTE: 3 * 86400.0, HOUR: math.inf}
"""The longest span that is read so."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one width whose time, or beginning, lies in `since` up to, but without, `until`."""

    width_s: int
    since: float
    until: float


def choose_width(seconds: float, since: float, kept_since: dict[int, float]) -> int:
    """The finest width that a span of so many seconds is read by, and that is kept from `since` on.

    `kept_since` tells of each width from what time by the device's clock on all its rows are there.
    """
    for width_s, limit_s in FINEST_UP_TO_S.items():
        if seconds <= limit_s and since >= kept_since[width_s]:
            return width_s
    return HOUR


def pieces(since: float, until: float, width_s: int, kept_since: dict[int, float]) -> list[Piece]:
    """Divide `since` up to `until` into rows of `width_s` and, at the edges, finer ones."""
    if since >= until:
        return []
    if width_s == AS_IT_CAME:
        return [Piece(AS_IT_CAME, since, until)]
    finer = AS_IT_CAME if width_s == MINUTE else MINUTE
    first, last = math.ceil(since / width_s) * width_s, math.floor(until / width_s) * width_s
    if first > last:  # within one row
        is_kept = since >= kept_since[finer]
        return pieces(since, until, finer, kept_since) if is_kept else [Piece(width_s, last, first)]
    if since < first and since < kept_since[finer]:
        first, since = first - width_s, first - width_s
    if last < until and last < kept_since[finer]:
        last, until = last + width_s, last + width_s
    whole = [Piece(width_s, first, last)] if first < last else []
    return [*pieces(since, first, finer, kept_since), *whole, *pieces(last, until, finer, kept_since)]
