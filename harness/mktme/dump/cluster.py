# SPDX-License-Identifier: GPL-2.0-or-later
"""Looking at all of an image, by threads of this process or by a Dask cluster.

A task says which file and which part of it, and is worked off where it runs: no data travels, and a
machine of a cluster must see the file under the same path. Results are merged as they come, a few
at a time, so that memory is bounded by how many tasks run at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mktme.dump.image import CHUNK_BYTES, DumpError, DumpImage
from mktme.engine.dram import Region
from mktme.engine.xts import PAGE_BYTES

TASK_BYTES: Final = 32 << 20
_TASK_REGIONS: Final = 1 << 14
_MERGED_AT_ONCE: Final = 8
_CONNECT_TIMEOUT_S: Final = 10
_MAX_THREADS: Final = 16  # unless asked for: each takes some 12 MiB

Result = TypeVar("Result")
Found = TypeVar("Found", covariant=True)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Source:
    """Where an image is, for whoever is to open it.

    Attributes:
        path: the image.
        sidecar: its description, None for the one beside it.
        raw: whether it is read without one.
    """

    path: Path
    sidecar: Path | None = None
    raw: bool = False

    def open(self) -> DumpImage:
        """Open the image.

        Raises:
            DumpError: as `DumpImage.open` and `DumpImage.open_raw`.
        """
        path = self.path.absolute()
        if self.raw:
            return DumpImage.open_raw(path)
        return DumpImage.open(path, None if self.sidecar is None else self.sidecar.absolute())

    def absolute(self) -> Source:
        """The same for a process with another working directory."""
        sidecar = None if self.sidecar is None else self.sidecar.absolute()
        return Source(self.path.absolute(), sidecar, self.raw)


@dataclass(frozen=True, slots=True)
class Workers:
    """Who does the work.

    Attributes:
        scheduler: address of a Dask scheduler, such as tcp://host:8786; None: threads of this
            process.
        threads: how many; None: one for each CPU that it may use, 16 at most.
        task_bytes: what a task reads, whole pages.
    """

    scheduler: str | None = None
    threads: int | None = None
    task_bytes: int = TASK_BYTES


HERE: Final = Workers()


class Work(Protocol[Found]):
    """What is done with parts of an image. It is sent to where it is done: it must pickle."""

    def __call__(self, regions: tuple[Region, ...], /) -> Found:
        """Look at parts of an image."""
        ...


def fold(
    regions: Iterable[Region],
    work: Work[Result],
    merge: Callable[[Iterable[Result]], Result],
    workers: Workers = HERE,
    progress: Progress | None = None,
) -> Result:
    """Have regions looked at, and merge what was found.

    Args:
        regions: ascending, whole pages.
        work: looks at some of them.
        merge: adds up results, of none as well, whatever their order.
        workers: who does it.
        progress: told of tasks done and of all there are; threads of this process only.

    Raises:
        DumpError: the scheduler cannot be reached, or has no workers; or what `work` raises.
    """
    tasks = list(_tasks(regions, workers.task_bytes))
    if not tasks:
        return merge(())
    import dask.bag

    bag = dask.bag.from_sequence(tasks, partition_size=1)  # type: ignore[no-untyped-call]
    merged = bag.map(work).reduction(merge, merge, split_every=_MERGED_AT_ONCE)
    found: Result
    if workers.scheduler is None:
        found = _here(merged, workers, progress)
    else:
        found = _there(merged, workers.scheduler)
    return found


def _here(merged: Any, workers: Workers, progress: Progress | None) -> Any:
    from dask.callbacks import Callback

    total = 0

    def start(graph: Sized) -> None:
        nonlocal total
        total = len(graph)

    def after(_key: object, _value: object, _graph: object, state: Any, _thread: object) -> None:
        if progress is not None:
            progress(len(state["finished"]), total)

    threads = workers.threads or min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with Callback(start=start, posttask=after):  # type: ignore[no-untyped-call]
        return merged.compute(scheduler="threads", num_workers=threads)


def _there(merged: Any, address: str) -> Any:
    from distributed import Client

    try:
        client = Client(  # type: ignore[no-untyped-call]
            address, timeout=_CONNECT_TIMEOUT_S, set_as_default=False
        )
    # Tidying up a client that got no connection may fail an assertion of its own, if it is late.
    except (OSError, ValueError, AssertionError) as error:
        raise DumpError(
            f"no Dask scheduler answers at {address}",
            hint="dask scheduler starts one, dask worker ADDRESS its workers",
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_CONNECT_TIMEOUT_S)
        except TimeoutError as error:
            raise DumpError(
                f"no worker at {address}", hint=f"dask worker {address} starts one"
            ) from error
        return merged.compute(scheduler=client)


def _tasks(regions: Iterable[Region], task_bytes: int) -> Iterator[tuple[Region, ...]]:
    """Regions in portions of a size, however many of them or how much of one that is."""
    portion: list[Region] = []
    room = task_bytes
    for region in regions:
        base = region.base
        while base < region.end:
            size = min(room, region.end - base)
            # One object for a fragment, however many lists have it: an image can have millions.
            portion.append(region if size == region.size_bytes else Region(base, size))
            base += size
            room -= size
            if room == 0 or len(portion) == _TASK_REGIONS:
                yield tuple(portion)
                portion, room = [], task_bytes
    if portion:
        yield tuple(portion)


def read_pages(
    image: DumpImage, regions: Sequence[Region]
) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
    """Read regions by some pages at a time, small ones together.

    Yields:
        pages, uint8, shape (n, 4096), the last one filled up with zeros if the image ends in it,
        in memory that the next ones are read into; and their numbers, int64, shape (n,).

    Raises:
        DumpError: the image cannot be read, or was cut short.
    """
    buffer = np.empty(CHUNK_BYTES, np.uint8)
    for portion in _tasks(regions, CHUNK_BYTES):
        numbers = [
            np.arange(one.base // PAGE_BYTES, -(-one.end // PAGE_BYTES), dtype=np.int64)
            for one in portion
        ]
        at = 0
        for region in portion:
            image.read_into(region.base, buffer[at : at + region.size_bytes])
            at += region.size_bytes
            rest = -at % PAGE_BYTES
            buffer[at : at + rest] = 0
            at += rest
        yield buffer[:at].reshape(-1, PAGE_BYTES), np.concatenate(numbers)


def whole_pages(image: DumpImage, regions: Iterable[Region]) -> list[Region]:
    """Regions that read_pages can take, of several lists: merged, and cut at the image's end."""
    merged: list[Region] = []
    for region in sorted(regions):
        base, end = region.base, min(region.end, image.size_bytes)
        if merged and merged[-1].end >= base:
            last = merged.pop()
            base, end = last.base, max(last.end, end)
        part = Region(base, end - base)
        merged.append(region if part == region else part)
    return merged
