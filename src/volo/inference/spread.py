"""A few of many items that come one after the other, spread over the groups they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Spread(Generic[Item]):
    """At most `most` of the items that are added: as many of each group as there is room for, and evenly over each group.

    It holds at most 2 `most` items of a group. Nothing is drawn at random: the same items give the same choice.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: dict[Hashable, list[tuple[int, Item]]] = {}
        self._stride: dict[Hashable, int] = {}
        self._seen: Counter[Hashable] = Counter()
        self._total = 0

    def add(self, group: Hashable, item: Item) -> None:
        number, self._seen[group] = self._seen[group], self._seen[group] + 1
        position, self._total = self._total, self._total + 1
        kept = self._kept.setdefault(group, [])
        stride = self._stride.setdefault(group, 1)
        if number % stride:
            return
        if len(kept) == 2 * self.most:  # every other one goes, and from now on only every other one stays
            del kept[1::2]
            self._stride[group] = stride = 2 * stride
            if number % stride:
                return
        kept.append((position, item))

    def chosen(self) -> list[Item]:
        """In the order in which they were added. Of more groups than `most`, one item of each of the largest."""
        groups = [group for group, _ in self._seen.most_common()]
        shares = dict.fromkeys(groups, 0)
        room = self.most
        while room and (open_ := [group for group in groups if shares[group] < len(self._kept[group])]):
            for group in open_[:room]:
                shares[group] += 1
            room -= min(room, len(open_))
        found = [
            self._kept[group][index] for group in groups for index in evenly(len(self._kept[group]), shares[group])
        ]
        return [item for _, item in sorted(found, key=lambda pair: pair[0])]


def spread(groups: Sequence[Hashable], most: int) -> list[int]:
    """Indices of at most `most` items, spread over their `groups`, in rising order."""
    found: Spread[int] = Spread(most)
    for index, group in enumerate(groups):
        found.add(group, index)
    return found.chosen()


def evenly(count: int, most: int) -> list[int]:
    """`most` of the numbers 0 to count - 1, evenly spaced."""
    return [i * count // most for i in range(min(most, count))] if most < count else list(range(count))
