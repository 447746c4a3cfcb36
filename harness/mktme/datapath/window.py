# SPDX-License-Identifier: GPL-2.0-or-later
"""The window of the `inline` data path: which pages are plaintext, and which go next.

Nobody tells us of an access to a page that is here; all there is to learn from are faults. A fault
at a page that went out a short while ago says that it went too early, and that is what the policy
`2q` builds on (after Johnson and Shasha, VLDB 1994, and Linux's mm/workingset.c). A fault right
behind a run of pages that are here says that somebody goes through memory in order, and that is
what reading ahead builds on. docs/adr/0009-replacement-policy.md has the figures.

All of it is O(1) a page and takes at most 17 bytes for each page of RAM, in the window or not.
"""

from __future__ import annotations

import enum
import random
from array import array
from collections.abc import Callable, Iterable, Sized
from typing import Final, Literal, NoReturn, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from mktme.engine.errors import MktmeError

MAX_READ_AHEAD_PAGES: Final = 32
"""The most pages that one fault brings in besides its own."""

_READ_AHEAD_SHARE: Final = 8
_SHORTEST_RUN: Final = 2
_PROBATION_SHARE: Final = 3
_LOOKS: Final = 4
_MAX_PAGES: Final = (1 << 31) - 3  # links are 32 bits wide

_OUT: Final = 0
_IN: Final = 1
_PROTECTED: Final = 2

Referenced: TypeAlias = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.bool_]]
"""Which of these pages were stored to since they were last asked about, or came in."""


class Policy(enum.Enum):
    """Which page leaves a full window.

    Attributes:
        FIFO: the one that came in first.
        CLOCK: as `FIFO`, but a page that was stored to meanwhile goes to the back once more; needs
            the `stores` tracker, and is `FIFO` without.
        RANDOM: any, with equal chances.
        TWO_QUEUES: new pages pass through a third of the window; a page that is back soon after
            it left goes to the rest. Either part is FIFO, or CLOCK with the `stores` tracker.
    """

    FIFO = "fifo"
    CLOCK = "clock"
    RANDOM = "random"
    TWO_QUEUES = "2q"


class WindowError(MktmeError):
    """A page that came in twice, or for which there was no room: a defect of this program."""


class Window:
    """The pages of one VM's RAM that are plaintext: never more than its capacity.

    Args:
        page_count: pages of RAM, numbered from 0.
        capacity_pages: how many may be here at a time.
        policy: which go next.

    Raises:
        ValueError: the capacity is less than one page, or more than RAM has.
    """

    def __init__(
        self, page_count: int, capacity_pages: int, policy: Policy = Policy.TWO_QUEUES
    ) -> None:
        if page_count > _MAX_PAGES:
            raise ValueError(f"a window onto at most {_MAX_PAGES} pages, not {page_count}")
        if not 1 <= capacity_pages <= page_count:
            raise ValueError(f"no window of {capacity_pages} pages onto {page_count} pages of RAM")
        self._capacity = capacity_pages
        self._policy = policy
        self._count = 0
        self._peak = 0
        # _OUT, or anything else for a page that is here; a bytearray for single pages, and a view
        # of it for many.
        self._state = bytearray(page_count)
        self._states = np.frombuffer(self._state, dtype=np.uint8)
        self._order = _order(policy, self._state, capacity_pages)
        self._read_ahead = min(MAX_READ_AHEAD_PAGES, capacity_pages // _READ_AHEAD_SHARE)

    @property
    def policy(self) -> Policy:
        """Which pages go next."""
        return self._policy

    @property
    def capacity_pages(self) -> int:
        """How many pages may be here."""
        return self._capacity

    @property
    def resident_pages(self) -> int:
        """How many pages are here."""
        return self._count

    @property
    def peak_pages(self) -> int:
        """The most that ever were."""
        return self._peak

    @property
    def room(self) -> int:
        """How many more pages may come in."""
        return self._capacity - self._count

    def __contains__(self, page: int) -> bool:
        return self._state[page] != _OUT

    def contains(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of `pages` are here, in their shape."""
        here: npt.NDArray[np.bool_] = self._states[pages] != _OUT
        return here

    def resident(self) -> npt.NDArray[np.int64]:
        """The pages that are here, ascending."""
        return np.flatnonzero(self._states)

    def read_ahead(self, page: int) -> int:
        """How many pages to fetch for a fault at `page`: itself, and those behind it to come.

        As many pages behind as there are in a run up to it, a single one being no run, and only
        up to the next that is here: for a reader that goes on in order, they double each time.
        """
        state = self._state
        start = max(page - self._read_ahead, 0)
        gap = state.rfind(_OUT, start, page)
        run = page - max(gap + 1, start)
        if run < _SHORTEST_RUN:
            return 1
        behind = state[page + 1 : page + 1 + run]
        return 1 + len(behind) - len(behind.lstrip(b"\0"))

    def admit(self, page: int) -> None:
        """A page came in.

        Raises:
            WindowError: it is here already, or not in RAM, or there is no room.
        """
        count = self._count + 1
        if count > self._capacity or not 0 <= page < len(self._state) or self._state[page]:
            self._refuse(range(page, page + 1))
        self._order.add(page)
        self._count = count
        if count > self._peak:
            self._peak = count

    def admit_range(self, first: int, count: int) -> None:
        """As `admit`, of `count` pages from `first` on; all of them or none."""
        total = self._count + count
        absent = 0 if first < 0 else self._state.count(_OUT, first, first + count)
        if total > self._capacity or absent != count:
            self._refuse(range(first, first + count))
        add = self._order.add
        for page in range(first, first + count):
            add(page)
        self._count = total
        if total > self._peak:
            self._peak = total

    def choose(self, count: int, referenced: Referenced | None = None) -> npt.NDArray[np.int64]:
        """Take out the pages that are to go next; the caller evicts them now.

        Args:
            count: how many; fewer are chosen only if fewer are here.
            referenced: the `stores` tracker, for policies that heed it.

        Returns:
            Their numbers, ascending.

        Raises:
            ValueError: a negative count.
        """
        if count < 0:
            raise ValueError(f"{count} pages to choose")
        victims = np.array(self._order.take(count, referenced), dtype=np.int64)
        victims.sort()
        self._states[victims] = _OUT
        self._count -= len(victims)
        return victims

    def restore(self, pages: npt.NDArray[np.int64]) -> None:
        """Chosen pages could not be evicted: they are here after all, and not the next to go.

        Raises:
            WindowError: one is here already, or there is no room.
        """
        if len(pages) > self.room or self._states[pages].any():
            self._refuse(pages)
        for page in pages.tolist():
            self._order.forget((), page, 1)  # as it did not go, it is not back
            self.admit(page)

    def forget(self, first: int, count: int) -> None:
        """Pages from `first` on are no more: the guest gave them back.

        When one is used again, that says nothing of the one that was here.
        """
        gone = np.flatnonzero(self._states[first : first + count]) + first
        self._order.forget(gone.tolist(), first, count)
        self._states[gone] = _OUT
        self._count -= len(gone)

    def _refuse(self, pages: Sized) -> NoReturn:
        if len(pages) > self.room:
            raise WindowError(f"{len(pages)} pages to come in, and room for {self.room}")
        raise WindowError(
            f"of {len(pages)} pages to come in, one is in the window already, or not in RAM"
        )


# --- the order in which pages go ----------------------------------------------------------------


class _Order(Protocol):
    """A policy's memory of the pages that are here; `add` sets their state."""

    def add(self, page: int) -> None: ...

    def take(self, count: int, referenced: Referenced | None) -> list[int]: ...

    def forget(self, pages: Iterable[int], first: int, count: int) -> None: ...


def _order(policy: Policy, state: bytearray, capacity_pages: int) -> _Order:
    match policy:
        case Policy.RANDOM:
            return _Random(state)
        case Policy.TWO_QUEUES:
            return _TwoQueues(state, capacity_pages)
        case Policy.FIFO | Policy.CLOCK:
            return _OneQueue(state, second_chance=policy is Policy.CLOCK)


class _Queue:
    """Pages in order; in at the back, out at the front or anywhere.

    A ring of links through arrays that all queues of a window share: an OrderedDict would take
    150 bytes a page and be no faster.
    """

    __slots__ = ("_end", "_next", "_previous", "size")

    def __init__(self, following: array[int], previous: array[int], end: int) -> None:
        self._next = following
        self._previous = previous
        self._end = end
        following[end] = previous[end] = end
        self.size = 0

    def append(self, page: int) -> None:
        end, following, previous = self._end, self._next, self._previous
        last = previous[end]
        following[last] = previous[end] = page
        following[page] = end
        previous[page] = last
        self.size += 1

    def remove(self, page: int) -> None:
        before, behind = self._previous[page], self._next[page]
        self._next[before] = behind
        self._previous[behind] = before
        self.size -= 1

    def pop(self, count: int) -> list[int]:
        """Take up to `count` pages from the front."""
        count = min(count, self.size)
        following = self._next
        page = self._end
        pages = [page := following[page] for _ in range(count)]
        first = following[page]
        following[self._end] = first
        self._previous[first] = self._end
        self.size -= count
        return pages

    def take(self, count: int, referenced: Referenced | None) -> list[int]:
        """As `pop`, sending referenced pages to the back, as long as that is no long search."""
        if referenced is None:
            return self.pop(count)
        pages: list[int] = []
        looks = min(_LOOKS * count, self.size)
        while looks > 0 and len(pages) < count:
            batch = self.pop(min(count - len(pages), looks))
            looks -= len(batch)
            for page, again in zip(batch, referenced(np.array(batch)).tolist(), strict=True):
                if again:
                    self.append(page)
                else:
                    pages.append(page)
        return pages + self.pop(count - len(pages))


def _queues(page_count: int, count: int) -> list[_Queue]:
    following = _zeros("i", page_count + count)
    previous = following[:]
    return [_Queue(following, previous, page_count + index) for index in range(count)]


def _zeros(typecode: Literal["i", "q"], count: int) -> array[int]:
    return array(typecode, (0,)) * count


class _OneQueue:
    def __init__(self, state: bytearray, *, second_chance: bool) -> None:
        self._state = state
        self._second_chance = second_chance
        (self._queue,) = _queues(len(state), 1)

    def add(self, page: int) -> None:
        self._state[page] = _IN
        self._queue.append(page)

    def take(self, count: int, referenced: Referenced | None) -> list[int]:
        return self._queue.take(count, referenced if self._second_chance else None)

    def forget(self, pages: Iterable[int], first: int, count: int) -> None:
        for page in pages:
            self._queue.remove(page)


class _TwoQueues:
    """New pages are on probation; who is back within a window's worth of evictions is protected.

    Read-ahead pages count like others: nearly all of them turn out to be wanted.
    """

    def __init__(self, state: bytearray, capacity_pages: int) -> None:
        self._state = state
        self._probation, self._protected = _queues(len(state), 2)
        self._probation_pages = capacity_pages // _PROBATION_SHARE
        self._horizon = capacity_pages
        # How many evictions there were at all, and when each page went; 0 is too long ago.
        self._evictions = capacity_pages + 1
        self._evicted = _zeros("q", len(state))
        self._evicted_view = np.frombuffer(self._evicted, dtype=np.int64)

    def add(self, page: int) -> None:
        if self._evictions - self._evicted[page] > self._horizon:
            self._state[page] = _IN
            self._probation.append(page)
        else:
            self._state[page] = _PROTECTED
            self._protected.append(page)

    def take(self, count: int, referenced: Referenced | None) -> list[int]:
        over = max(self._probation.size - self._probation_pages, 0)
        pages = self._probation.take(min(count, over), referenced)
        pages += self._protected.take(count - len(pages), referenced)
        pages += self._probation.take(count - len(pages), referenced)
        self._evictions += len(pages)
        self._evicted_view[pages] = self._evictions
        return pages

    def forget(self, pages: Iterable[int], first: int, count: int) -> None:
        for page in pages:
            (self._probation if self._state[page] == _IN else self._protected).remove(page)
        self._evicted_view[first : first + count] = 0


class _Random:
    def __init__(self, state: bytearray) -> None:
        self._state = state
        self._pages = array("i")
        self._index = _zeros("i", len(state))
        self._draw = random.Random(0).random  # runs of the same trace are to be the same

    def add(self, page: int) -> None:
        self._state[page] = _IN
        self._index[page] = len(self._pages)
        self._pages.append(page)

    def take(self, count: int, referenced: Referenced | None) -> list[int]:
        pages = []
        for _ in range(min(count, len(self._pages))):
            page = self._pages[int(self._draw() * len(self._pages))]
            self._remove(page)
            pages.append(page)
        return pages

    def forget(self, pages: Iterable[int], first: int, count: int) -> None:
        for page in pages:
            self._remove(page)

    def _remove(self, page: int) -> None:
        last = self._pages.pop()
        if last != page:
            index = self._index[page]
            self._pages[index] = last
            self._index[last] = index
