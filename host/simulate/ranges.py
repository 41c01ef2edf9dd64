"""Sets of sequence numbers, kept as ranges: a board that counts to a million costs as much as one that counts to two."""

from bisect import bisect_right
from collections.abc import Iterator


class Ranges:
    """A set of whole numbers as sorted, disjoint ranges, the last number of each included."""

    def __init__(self) -> None:
        self._ranges: list[list[int]] = []  # [first, last], never touching

    def add(self, number: int) -> bool:
        """Add one number; False when it was there."""
        index = bisect_right(self._ranges, number, key=lambda found: found[0])
        before = self._ranges[index - 1] if index else None
        after = self._ranges[index] if index < len(self._ranges) else None
        if before and number <= before[1]:
            return False
        if before and before[1] == number - 1:
            before[1] = number
        else:
            before = [number, number]
            self._ranges.insert(index, before)
            index += 1
        if after and after[0] == number + 1:
            before[1] = after[1]
            del self._ranges[index]
        return True

    def __contains__(self, number: int) -> bool:
        index = bisect_right(self._ranges, number, key=lambda found: found[0])
        return index > 0 and number <= self._ranges[index - 1][1]

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self._ranges)

    def __iter__(self) -> Iterator[int]:
        for first, last in self._ranges:
            yield from range(first, last + 1)

    def to_list(self) -> list[list[int]]:
        """The ranges as `[first, last]`, for a report."""
        return [list(found) for found in self._ranges]
