# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM in a process of its own that counts on its memory, which is taken away all the while.

::

    python -m tests.unit.datapath.hammer LINK_SOCKET PAGES [careless]

It has a counter on each page and increments them in turn, looking each time whether the counter
still is what it was. When standard input ends it prints how often it stored, and how often it did
not find what it had stored, and stays until it is killed. A careless one keeps no userfaultfd of
its own.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

from mktme.datapath.shadow import Track

from ..fake_qemu import PAGE, FakeQemu


def main() -> None:
    """See above."""
    link_socket, pages = Path(sys.argv[1]), int(sys.argv[2])
    # A page's stores come in bursts that last longer than it takes to take a page away.
    order = [page for page in range(pages) for _ in range(1024)]
    expected = [0] * pages
    stores = lost = 0
    with FakeQemu((pages,), track=Track.PAGES, faults=True) as qemu:
        qemu.link(link_socket)
        if sys.argv[3:] == ["careless"]:
            os.dup2(0, qemu.descriptors[-1])
        with memoryview(qemu.memory[0]) as memory, memory.cast("Q") as words:
            while not select.select([sys.stdin], [], [], 0)[0]:
                for page in order:
                    count = words[page * PAGE // 8]
                    lost += count != expected[page]
                    expected[page] = words[page * PAGE // 8] = count + 1
                stores += len(order)
        print(stores, lost, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
