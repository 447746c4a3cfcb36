# SPDX-License-Identifier: GPL-2.0-or-later
"""The window: its bound and its books, who goes next, and what is read ahead."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mktme.datapath.window import MAX_READ_AHEAD_PAGES, Policy, Window, WindowError

Pages = npt.NDArray[np.int64]

RAM: Final = 48

all_policies = pytest.mark.parametrize("policy", Policy, ids=lambda policy: policy.value)


def numbers(*pages: int) -> Pages:
    return np.array(pages, dtype=np.int64)


def marked(*pages: int) -> Callable[[Pages], npt.NDArray[np.bool_]]:
    """A store tracker: these pages were stored to since they were last asked about."""
    left = set(pages)

    def referenced(asked: Pages) -> npt.NDArray[np.bool_]:
        answer = np.isin(asked, list(left))
        left.difference_update(asked.tolist())
        return answer

    return referenced


# --- the books, against a set -------------------------------------------------------------------


class WindowAgainstSet(RuleBasedStateMachine):
    """Whatever happens to a window, it holds what a plain set would, and no more than it may."""

    window_type: type[Window] = Window
    here: set[int]
    chosen: set[int]

    @initialize(policy=st.sampled_from(Policy), capacity=st.integers(1, RAM), full=st.booleans())
    def make(self, policy: Policy, capacity: int, full: bool) -> None:
        self.window = self.window_type(RAM, capacity, policy)
        self.capacity = capacity
        self.here = set()
        self.chosen = set()  # and not evicted yet
        self.peak = 0
        if full:
            self.come_in_order(0, capacity)

    @rule(page=st.integers(0, RAM - 1))
    def come(self, page: int) -> None:
        if page in self.here or len(self.here) == self.capacity:
            with pytest.raises(WindowError):
                self.window.admit(page)
            return
        self.window.admit(page)
        self._came({page})

    @rule(first=st.integers(0, RAM - 1), count=st.integers(1, RAM + 1))
    def come_in_order(self, first: int, count: int) -> None:
        pages = set(range(first, first + count))
        if first + count > RAM or pages & self.here or len(self.here) + len(pages) > self.capacity:
            with pytest.raises(WindowError):
                self.window.admit_range(first, count)
            return
        self.window.admit_range(first, count)
        self._came(pages)

    @rule(page=st.integers(0, RAM - 1))
    def fault(self, page: int) -> None:
        if page in self.here:
            return
        count = self.window.read_ahead(page)
        assert 1 <= count <= max(1, self.capacity)
        pages = set(range(page, page + count))
        assert max(pages) < RAM
        assert not pages & self.here
        if self.window.room < count:
            self.go(count, None)
        self.window.admit_range(page, count)
        self._came(pages)

    @rule(
        count=st.integers(0, RAM + 1),
        stored=st.none() | st.sets(st.integers(0, RAM - 1)),
    )
    def go(self, count: int, stored: set[int] | None) -> None:
        victims = self.window.choose(count, None if stored is None else marked(*stored))
        assert victims.dtype == np.int64
        assert victims.tolist() == sorted(set(victims.tolist()))
        assert len(victims) == min(count, len(self.here))
        assert self.here.issuperset(victims.tolist())
        self.chosen = set(victims.tolist())
        self.here -= self.chosen

    @precondition(lambda self: self.chosen)
    @rule()
    def stay_after_all(self) -> None:
        pages = numbers(*sorted(self.chosen))
        if self.chosen & self.here or len(self.chosen) > self.capacity - len(self.here):
            with pytest.raises(WindowError):
                self.window.restore(pages)
        else:
            self.window.restore(pages)
            self._came(self.chosen)
        self.chosen = set()

    @rule(first=st.integers(0, RAM - 1), count=st.integers(0, RAM))
    def vanish(self, first: int, count: int) -> None:
        self.window.forget(first, count)
        self.here -= set(range(first, first + count))

    @invariant()
    def books_are_right(self) -> None:
        assert self.window.resident().tolist() == sorted(self.here)
        assert self.window.resident_pages == len(self.here) <= self.capacity
        assert self.window.room == self.capacity - len(self.here)
        assert self.window.peak_pages == self.peak <= self.capacity
        assert [page for page in range(RAM) if page in self.window] == sorted(self.here)
        assert np.flatnonzero(self.window.contains(np.arange(RAM))).tolist() == sorted(self.here)

    def teardown(self) -> None:
        """Everything that is here can be made to go, each page once."""
        if hasattr(self, "window"):
            self.go(RAM, None)
            assert self.window.resident_pages == 0

    def _came(self, pages: set[int]) -> None:
        self.here |= pages
        self.peak = max(self.peak, len(self.here))


WindowAgainstSet.TestCase.settings = settings(max_examples=300, stateful_step_count=30)
TestWindowAgainstSet = WindowAgainstSet.TestCase


class _OneTooMany(Window):
    def __init__(self, page_count: int, capacity_pages: int, policy: Policy) -> None:
        super().__init__(page_count, min(capacity_pages + 1, page_count), policy)


class _Hoarder(Window):
    def choose(self, count: int, referenced: Any = None) -> Pages:
        victims = super().choose(count, referenced)
        for page in victims[:1].tolist():
            self.admit(page)
        return victims


class _Forgetful(Window):
    def forget(self, first: int, count: int) -> None:
        super().forget(first, count - 1)


@pytest.mark.parametrize("wrong", [_OneTooMany, _Hoarder, _Forgetful])
def test_the_set_tells_a_window_that_is_wrong(wrong: type[Window]) -> None:
    machine = type("Wrong", (WindowAgainstSet,), {"window_type": wrong})
    search = settings(
        max_examples=300, database=None, phases=[Phase.generate], report_multiple_bugs=False
    )
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_state_machine_as_test(machine, settings=search)


@pytest.mark.parametrize("capacity", [0, -1, 9])
def test_capacity_is_at_least_a_page_and_at_most_ram(capacity: int) -> None:
    with pytest.raises(ValueError, match="no window"):
        Window(8, capacity)
    assert Window(8, 8).room == 8


def test_more_pages_than_links_can_number_are_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        Window(1 << 31, 1)


def test_refusals_say_why() -> None:
    window = Window(8, 3)
    window.admit(1)
    with pytest.raises(WindowError, match="one is in the window"):
        window.admit_range(0, 2)
    with pytest.raises(WindowError, match="room for 2"):
        window.admit_range(2, 3)
    assert window.resident().tolist() == [1]


@all_policies
def test_what_makes_no_sense_leaves_the_books_alone(policy: Policy) -> None:
    window = Window(8, 4, policy)
    window.admit_range(0, 3)
    for page in (-1, 8):
        with pytest.raises(WindowError, match="not in RAM"):
            window.admit(page)
    for first, count in ((-1, 1), (8, 1), (0, -1)):
        with pytest.raises(WindowError):
            window.admit_range(first, count)
    with pytest.raises(ValueError, match="-1 pages"):
        window.choose(-1)
    assert window.choose(4).tolist() == [0, 1, 2]


@all_policies
def test_it_takes_little_memory(policy: Policy) -> None:
    """An engine of at most 1/32 of RAM is promised; a window of any size takes 1/240."""
    pages = 1 << 16
    tracemalloc.start()
    try:
        window = Window(pages, pages, policy)
        for first in range(0, pages, 64):
            window.admit_range(first, 64)
        window.forget(0, pages // 2)
        window.choose(pages // 4)
        used, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert pages <= used <= 17 * pages + 4096


# --- who goes next ------------------------------------------------------------------------------


def test_fifo_lets_go_in_the_order_of_coming() -> None:
    window = Window(RAM, 6, Policy.FIFO)
    for page in (9, 3, 7, 1, 30, 2):
        window.admit(page)
    assert window.choose(3).tolist() == [3, 7, 9]
    assert window.choose(2, marked(1, 30)).tolist() == [1, 30]  # it does not ask
    assert window.choose(2).tolist() == [2]


def test_clock_gives_stored_pages_a_second_chance() -> None:
    window = Window(RAM, 6, Policy.CLOCK)
    for page in (9, 3, 7, 1, 30, 2):
        window.admit(page)
    assert window.choose(2, marked(9, 7)).tolist() == [1, 3]
    assert window.choose(2, marked()).tolist() == [2, 30]
    assert window.choose(2, marked()).tolist() == [7, 9]


def test_clock_without_tracker_is_fifo() -> None:
    window = Window(RAM, 6, Policy.CLOCK)
    for page in (9, 3, 7, 1, 30, 2):
        window.admit(page)
    assert window.choose(3).tolist() == [3, 7, 9]


@pytest.mark.parametrize("policy", [Policy.CLOCK, Policy.TWO_QUEUES])
def test_the_search_for_a_page_without_stores_ends(policy: Policy) -> None:
    """A vCPU waits meanwhile."""
    pages = 4096
    window = Window(pages, pages, policy)
    window.admit_range(0, pages)
    asked: list[int] = []

    def always(candidates: Pages) -> npt.NDArray[np.bool_]:
        asked.extend(candidates.tolist())
        return np.ones(len(candidates), dtype=bool)

    assert len(window.choose(8, always)) == 8
    assert 8 <= len(asked) <= 4 * 8


def test_random_lets_any_page_go() -> None:
    window = Window(RAM, 16, Policy.RANDOM)
    window.admit_range(0, 16)
    gone = np.zeros(RAM, dtype=int)
    for _ in range(4000):
        (victim,) = window.choose(1)
        gone[victim] += 1
        window.admit(int(victim))
    assert gone[16:].sum() == 0
    assert gone[:16].min() > 250 / 1.5
    assert gone[:16].max() < 250 * 1.5


def pass_through(window: Window, pages: Iterable[int]) -> None:
    for page in pages:
        if not window.room:
            window.choose(1)
        window.admit(page)


def test_a_page_that_is_soon_back_is_protected() -> None:
    window = Window(RAM, 6, Policy.TWO_QUEUES)
    pass_through(window, range(7))
    assert 0 not in window
    pass_through(window, [0, *range(7, RAM)])
    assert 0 in window


def test_a_page_that_is_back_late_is_as_new() -> None:
    window = Window(RAM, 6, Policy.TWO_QUEUES)
    pass_through(window, range(14))
    pass_through(window, [0, *range(14, RAM)])
    assert 0 not in window


def test_protected_pages_go_when_new_ones_are_few() -> None:
    window = Window(RAM, 6, Policy.TWO_QUEUES)
    window.admit_range(0, 6)
    window.choose(6)
    for page in (3, 1, 4, 0, 5):
        window.admit(page)
    window.admit(20)
    assert window.choose(2).tolist() == [1, 3]
    assert window.choose(4).tolist() == [0, 4, 5, 20]


def test_protected_pages_have_second_chances_too() -> None:
    window = Window(RAM, 6, Policy.TWO_QUEUES)
    window.admit_range(0, 6)
    window.choose(6)
    for page in range(6):
        window.admit(page)
    assert window.choose(2, marked(0, 2)).tolist() == [1, 3]


def test_a_page_given_back_has_no_past() -> None:
    """Its number is the same, what is in it is not."""
    for forgotten in (False, True):
        window = Window(RAM, 6, Policy.TWO_QUEUES)
        pass_through(window, range(7))
        if forgotten:
            window.forget(0, 1)
        pass_through(window, [0, *range(7, RAM)])
        assert (0 in window) is not forgotten


@pytest.mark.parametrize(
    "policy", [Policy.FIFO, Policy.CLOCK, Policy.TWO_QUEUES], ids=lambda policy: policy.value
)
def test_what_could_not_go_is_not_the_next_to_go(policy: Policy) -> None:
    window = Window(RAM, 12, policy)
    window.admit_range(0, 12)
    first = window.choose(4)
    window.restore(first)
    second = window.choose(4)
    third = window.choose(4)
    assert not set(first.tolist()) & (set(second.tolist()) | set(third.tolist()))
    assert window.resident().tolist() == first.tolist()


# --- reading ahead ------------------------------------------------------------------------------


def faults(window: Window, accesses: Pages, referenced: bool = False) -> tuple[int, int]:
    """Run accesses through a window; returns faults, and pages that came in."""
    stored: set[int] = set()

    def were_stored(pages: Pages) -> npt.NDArray[np.bool_]:
        answer = np.isin(pages, list(stored))
        stored.difference_update(pages.tolist())
        return answer

    count = fetched = 0
    for page in accesses.tolist():
        if page in window:
            stored.add(page)
            continue
        ahead = window.read_ahead(page)
        if window.room < ahead:
            window.choose(max(ahead, 16), were_stored if referenced else None)
        window.admit_range(page, ahead)
        stored.difference_update(range(page, page + ahead))
        count += 1
        fetched += ahead
    return count, fetched


def test_reading_in_order_doubles_what_is_fetched() -> None:
    window = Window(4096, 4096)
    page, fetched = 100, []
    while page < 300:
        fetched.append(window.read_ahead(page))
        window.admit_range(page, fetched[-1])
        page += fetched[-1]
    assert fetched[:7] == [1, 1, 3, 6, 12, 24, MAX_READ_AHEAD_PAGES + 1]
    assert set(fetched[7:]) == {MAX_READ_AHEAD_PAGES + 1}


def test_readers_do_not_disturb_each_other() -> None:
    alone = faults(Window(1 << 14, 1 << 12), np.arange(1024))
    readers = [np.arange(1024) + start for start in range(0, 1 << 14, 2048)]
    together = faults(Window(1 << 14, 1 << 12), np.stack(readers).T.reshape(-1))
    assert together == (len(readers) * alone[0], len(readers) * alone[1])


def test_a_reader_goes_on_where_its_pages_went_out() -> None:
    """Reading again what did not fit, there are no more faults than the first time."""
    window = Window(1 << 14, 512)
    first, _ = faults(window, np.arange(4096))
    again, _ = faults(window, np.arange(4096))
    assert again <= first <= 4096 / MAX_READ_AHEAD_PAGES + 8


def test_nothing_is_fetched_that_is_here() -> None:
    window = Window(256, 256)
    window.admit_range(0, 20)
    window.admit(25)
    assert window.read_ahead(20) == 5
    assert window.read_ahead(24) == 1


def test_reading_ahead_ends_with_ram() -> None:
    window = Window(256, 256)
    window.admit_range(200, 50)
    assert window.read_ahead(250) == 6
    window.admit_range(250, 5)
    assert window.read_ahead(255) == 1
    assert Window(256, 256).read_ahead(0) == 1


def test_a_page_by_itself_is_no_reader() -> None:
    window = Window(256, 256)
    window.admit(10)
    assert window.read_ahead(11) == 1
    window.admit(11)
    assert window.read_ahead(12) == 3


@pytest.mark.parametrize("capacity", [1, 8, 16, 64, 256, 4096])
def test_one_fault_moves_only_a_part_of_a_small_window(capacity: int) -> None:
    window = Window(8192, capacity)
    window.admit_range(0, capacity)
    most = window.read_ahead(capacity)
    assert most <= 1 + capacity // 8
    assert most == 1 + min(MAX_READ_AHEAD_PAGES, capacity // 8) or capacity < 16


# --- what the policies are worth ----------------------------------------------------------------
# A window of 1024 pages onto 8192, as 12.5 % of RAM is.

PAGES: Final = 8192
WINDOW: Final = 1024
ACCESSES: Final = 60_000


def _shuffled(seed: int) -> tuple[np.random.Generator, Pages]:
    generator = np.random.default_rng(seed)
    return generator, generator.permutation(PAGES)


def zipf() -> Pages:
    """Few pages are used often, most seldom; which are which is not in order."""
    generator, order = _shuffled(1)
    weight = 1 / np.arange(1, PAGES + 1)
    return order[generator.choice(PAGES, size=ACCESSES, p=weight / weight.sum())]


def scan_and_hot() -> Pages:
    """Half of the accesses go through RAM in order, half to as many pages as half the window."""
    generator, order = _shuffled(2)
    hot = order[generator.integers(0, WINDOW // 2, size=ACCESSES)]
    return np.where(generator.random(ACCESSES) < 0.5, hot, np.arange(ACCESSES) // 2 % PAGES)


def loop() -> Pages:
    """A loop over a quarter more than the window, not in order."""
    _, order = _shuffled(3)
    return np.resize(order[: WINDOW * 5 // 4], ACCESSES)


def uniform() -> Pages:
    """Any page, with equal chances."""
    return np.random.default_rng(4).integers(0, PAGES, size=ACCESSES)


def in_order() -> Pages:
    """All of RAM, again and again."""
    return np.arange(ACCESSES) % PAGES


def relative_faults(
    policy: Policy, accesses: Pages, *, referenced: bool = False
) -> tuple[float, float]:
    """Faults, and pages that came in, over FIFO's."""
    base = faults(Window(PAGES, WINDOW, Policy.FIFO), accesses)
    ours = faults(Window(PAGES, WINDOW, policy), accesses, referenced)
    return ours[0] / base[0], ours[1] / base[1]


@pytest.mark.parametrize(
    ("trace", "most"),
    [(zipf, 0.92), (scan_and_hot, 0.75), (loop, 0.80), (uniform, 1.01), (in_order, 1.01)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_two_queues_against_fifo(trace: Callable[[], Pages], most: float) -> None:
    """A good deal fewer faults where some pages matter more, and no more where none do."""
    fault_ratio, page_ratio = relative_faults(Policy.TWO_QUEUES, trace())
    assert fault_ratio <= most
    assert page_ratio <= most


@pytest.mark.parametrize("trace", [zipf, scan_and_hot])
def test_the_margin_is_not_had_for_nothing(trace: Callable[[], Pages]) -> None:
    """The control: neither chance nor a clock that hears of no stores gets near it."""
    for policy in (Policy.RANDOM, Policy.CLOCK):
        assert relative_faults(policy, trace())[0] > 0.95


def test_stores_help_to_choose() -> None:
    without, _ = relative_faults(Policy.TWO_QUEUES, zipf())
    with_tracker, _ = relative_faults(Policy.TWO_QUEUES, zipf(), referenced=True)
    assert with_tracker < 0.95 * without


@all_policies
def test_reading_ahead_costs_little_where_there_is_no_order(policy: Policy) -> None:
    count, fetched = faults(Window(PAGES, WINDOW, policy), uniform())
    assert fetched <= 1.05 * count


@all_policies
def test_runs_of_the_same_accesses_are_the_same(policy: Policy) -> None:
    accesses = zipf()[:20_000]
    assert faults(Window(PAGES, WINDOW, policy), accesses) == faults(
        Window(PAGES, WINDOW, policy), accesses
    )
