# SPDX-License-Identifier: GPL-2.0-or-later
"""A live guest with a page that attacks are about, and what it says of that page itself."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from mktme.engine.integrity import Violation
from mktme.engine.pages import first_line
from mktme.engine.xts import LINE_BYTES, PAGE_BYTES
from mktme.proof.confidentiality import Canary
from mktme.proof.damage import BLOCK_BYTES, Damage, Outcome, Written, classify
from mktme.proof.eviction import held_out_of_window
from mktme.service.wire import PagePoisoned
from mktme.vm.console import GuestPanicError, VmLostError
from mktme.vm.guest_map import guest_physical
from mktme.vm.platform import Platform, Vm

_COMMAND_TIMEOUT_S: Final = 60.0
# A guest that has to be told, is told on the access.
_READ_TIMEOUT_S: Final = 60.0
_OD_LINE: Final = re.compile(r"^(?: [0-9a-f]{2}){16}$", re.M)
# Linux, arch/x86/kernel/cpu/mce/core.c: __print_mce() and mce_panic().
_MACHINE_CHECK: Final = re.compile(r"^.*(?:Machine [Cc]heck|machine check).*$", re.M)
_MCE_ADDRESS: Final = re.compile(r"\[Hardware Error\]:.* ADDR ([0-9a-f]+)")


@dataclass(frozen=True, slots=True)
class MachineCheck:
    """A line that the engine found bad, and what the guest said of it.

    Attributes:
        guest: whose.
        address: of the first bad line in DRAM.
        keyid: what it was read with.
        lines: how many lines of its page were bad.
        kind: what was wrong with the first.
        guest_physical: where the guest has it.
        reported: the address that the guest's kernel reported, good to 4 KiB; None if none.
        console: the guest's own line on its console.
    """

    guest: str
    address: int
    keyid: int
    lines: int
    kind: Violation
    guest_physical: int
    reported: int | None
    console: str


class Victim:
    """A guest of a platform, `inline`, that runs.

    Args:
        platform: whose; the record of poisoned lines is there.
        vm: the guest.
    """

    def __init__(self, platform: Platform, vm: Vm) -> None:
        self.vm = vm
        self._platform = platform
        self._ram_offset: int | None = None
        self._held = Canary.random()
        self._earlier: Canary | None = None
        self._next: Canary | None = None
        self.is_lost = False

    @property
    def page(self) -> bytes:
        """What the guest wrote into its page last."""
        return self._held.page

    @property
    def address(self) -> int:
        """Where its page is in DRAM, once it was held out of the window."""
        assert self._ram_offset is not None
        return self.vm.base + self._ram_offset

    def write(self, *, again: bool) -> None:
        """Have the guest write a new page.

        Args:
            again: whether `write_again` will follow.
        """
        self._held, self._earlier, self._ram_offset = Canary.random(), None, None
        with self.vm.domain.explained():
            if again:
                # Made first, since what makes it makes a file of that name and not a page.
                self._next = Canary.random()
                self._next.plant(self.vm.domain.console)
                self._run("mv /run/canary /run/next")
            self._held.plant(self.vm.domain.console)

    def write_again(self) -> None:
        """Have the guest write something else into the same page of its memory."""
        assert self._next is not None
        self._earlier, self._held = self._held, self._next
        with self.vm.domain.explained():
            self._run("dd if=/run/next of=/run/canary bs=4096 conv=notrunc 2>/dev/null")

    @contextlib.contextmanager
    def held_out_of_window(self) -> Iterator[None]:
        """Hold the guest, its page being in DRAM alone; see `mktme.proof.eviction`."""
        with held_out_of_window(self.vm, self._held, self._ram_offset) as self._ram_offset:
            yield

    def look(self, lines: int, others: tuple[bytes, ...]) -> tuple[Damage, MachineCheck | None]:
        """Have the guest read its page, and say what became of it.

        Args:
            lines: which of its lines were attacked.
            others: as `Written.others`.

        Returns:
            What became of it; and, if the host found lines that do not match their MACs, that.
        """
        said, lost = self._od()
        told = self._machine_check(said)
        reported = _MACHINE_CHECK.findall(said)
        if told is not None and reported:
            self.is_lost = self.is_lost or lost is not None
            return self._check(told, lines), told
        if told is not None:
            return Damage(Outcome.OTHER, "bad lines, and the guest reports no machine check"), told
        if reported:
            return Damage(Outcome.OTHER, f"a machine check of nothing: {reported[-1]}"), None
        if lost is not None:
            return Damage(Outcome.OTHER, lost), None
        rows = [bytes.fromhex(row) for row in _OD_LINE.findall(said)]
        if len(rows) != PAGE_BYTES // BLOCK_BYTES:
            return Damage(Outcome.OTHER, f"the guest shows {len(rows)} blocks of its page"), None
        earlier = None if self._earlier is None else self._earlier.page
        return classify(b"".join(rows), Written(self.page, earlier, others), lines), None

    def _od(self) -> tuple[str, str | None]:
        """What the guest says when it shows its page; and how it was lost, if it was."""
        try:
            result = self.vm.domain.console.run(
                "od -An -v -tx1 -w16 /run/canary", _READ_TIMEOUT_S, check=False
            )
        except GuestPanicError as error:
            self.is_lost = True
            return error.said, str(error)
        except VmLostError as error:
            self.is_lost = True
            return "", self.vm.domain.reason(str(error))
        return result.output, None

    def _machine_check(self, said: str) -> MachineCheck | None:
        found = next((one for one in self._platform.poisoned if one.vm == self.vm.uuid), None)
        if found is None:
            return None
        addresses = _MCE_ADDRESS.findall(said)
        lines = _MACHINE_CHECK.findall(said)
        return MachineCheck(
            guest=self.vm.name,
            address=found.address,
            keyid=found.keyid,
            lines=found.lines.bit_count(),
            kind=found.kind,
            guest_physical=self._guest_physical(found),
            reported=int(addresses[0], 16) if addresses else None,
            console=lines[-1].strip() if lines else "",
        )

    def _guest_physical(self, found: PagePoisoned) -> int:
        offset = found.address - self.vm.base
        config = self.vm.config
        return guest_physical(offset, config.memory_bytes, config.hardware.machine)

    def _check(self, told: MachineCheck, lines: int) -> Damage:
        """Whether the machine check is of the lines that were attacked."""
        first = self.address + first_line(lines) * LINE_BYTES
        wrong = []
        if (told.address, told.lines) != (first, lines.bit_count()):
            wrong.append(f"{told.lines} lines from {told.address:#x} on, not from {first:#x}")
        if told.keyid != self.vm.keyid:
            wrong.append(f"under KeyID {told.keyid}, not {self.vm.keyid}")
        page = told.guest_physical // PAGE_BYTES * PAGE_BYTES
        if told.reported != page:
            where = "no address" if told.reported is None else f"{told.reported:#x}"
            wrong.append(f"the guest reports {where}, not {page:#x}")
        if wrong:
            return Damage(Outcome.OTHER, "a machine check, but " + "; ".join(wrong))
        return Damage(Outcome.MACHINE_CHECK)

    def _run(self, command: str) -> None:
        self.vm.domain.console.run(command, _COMMAND_TIMEOUT_S)
