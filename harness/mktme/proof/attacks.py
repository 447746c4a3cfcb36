# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks on the memory of a guest, and what is to come of each, without and with integrity.

Of integrity as TDX has it ("Ci"): a MAC for each line, bound to its address, and no freshness.
What it does not stop is here too, and expected, so that nobody takes the table for more than it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mktme.engine.xts import LINE_BYTES, LINES_PER_PAGE, PAGE_BYTES
from mktme.proof.damage import ALL_LINES, Outcome
from mktme.proof.dimms import Dimms, Stored
from mktme.service.client import EngineClient

# Of the page's 64 lines, the one that is attacked, and one that is only looked at.
_LINE: Final = 5
_OTHER_LINE: Final = 9


@dataclass(frozen=True, slots=True)
class Scene:
    """What an attacker finds: guests that are held, each with a page that is in DRAM alone.

    Attributes:
        dimms: memory as it is.
        engine: the way in through references with a KeyID, for software that has one.
        keyid: a KeyID that is nobody else's, of the guests' algorithm.
        pages: DRAM addresses of the pages, one for each guest.
        recorded: the first page as DRAM held it before the guest's last write, if that is of use.
        plaintext: a page of the attacker's own.
    """

    dimms: Dimms
    engine: EngineClient
    keyid: int
    pages: tuple[int, ...]
    recorded: Stored | None
    plaintext: bytes

    @property
    def line(self) -> int:
        """DRAM address of the line that is attacked."""
        return self.pages[0] + _LINE * LINE_BYTES

    @property
    def old_line(self) -> Stored:
        """That line, as it was recorded."""
        assert self.recorded is not None
        macs = self.recorded.macs
        entry = len(macs) // LINES_PER_PAGE
        return Stored(
            self.recorded.ciphertext[_LINE * LINE_BYTES : (_LINE + 1) * LINE_BYTES],
            macs[_LINE * entry : (_LINE + 1) * entry],
        )


Strike = Callable[[Scene], bytes | None]


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack.

    Attributes:
        name: for people, and of the row of the report.
        action: what the attacker does.
        without: what comes of it without integrity.
        with_integrity: what comes of it with integrity.
        strike: does it. It returns the page that the attacker reads, if that is what the attack
            is about, and None if it is about what the guests read.
        lines: which lines of a page it is about (bit i: line i).
        remark: what a reader of the table should know.
        control: whether it is none, and shows that the checks can tell.
        guests: how many guests it takes.
        needs_history: whether the attacker records the page before the guest writes it again.
    """

    name: str
    action: str
    without: Outcome
    with_integrity: Outcome
    strike: Strike
    lines: int = 1 << _LINE
    remark: str | None = None
    control: bool = False
    guests: int = 1
    needs_history: bool = False

    def expected(self, integrity: bool) -> Outcome:
        """What is to come of it."""
        return self.with_integrity if integrity else self.without

    @property
    def ends_guests(self) -> bool:
        """Whether a guest with integrity does not survive it."""
        return self.with_integrity is Outcome.MACHINE_CHECK


def _nothing(_scene: Scene) -> None:
    pass


def _flip(scene: Scene) -> None:
    scene.dimms.flip(scene.line + LINE_BYTES // 2)


def _move(scene: Scene) -> None:
    scene.dimms.put(scene.line, scene.dimms.get(scene.pages[0] + _OTHER_LINE * LINE_BYTES))


def _replay(scene: Scene) -> None:
    scene.dimms.put(scene.line, scene.old_line)


def _replay_without_mac(scene: Scene) -> None:
    scene.dimms.put_ciphertext(scene.line, scene.old_line.ciphertext)


def _lose(scene: Scene) -> None:
    assert scene.recorded is not None
    scene.dimms.put(scene.pages[0], scene.recorded)


def _read(scene: Scene) -> bytes:
    return scene.engine.read_dram(scene.pages[0], PAGE_BYTES, scene.keyid)


def _write(scene: Scene) -> None:
    scene.engine.write_dram(scene.line, scene.plaintext[:LINE_BYTES], scene.keyid)


def _zero(scene: Scene) -> None:
    scene.dimms.put_ciphertext(scene.line, bytes(LINE_BYTES))


def _zero_both(scene: Scene) -> None:
    macs = scene.dimms.get(scene.line).macs
    scene.dimms.put(scene.line, Stored(bytes(LINE_BYTES), bytes(len(macs))))


def _swap(scene: Scene) -> None:
    one, other = (scene.dimms.get(page, PAGE_BYTES) for page in scene.pages)
    for page, lines in zip(scene.pages, (other, one), strict=True):
        scene.dimms.put(page, lines)


_NO_FRESHNESS: Final = (
    "neither has freshness: an old line with its old MAC, at its address, is as good as a new one"
)
_NEVER_WRITTEN: Final = (
    "a line of zeros is one that was never written here, and reads as zeros; in real memory it"
    " would decrypt to garbage"
)

ATTACKS: Final = (
    Attack(
        "none",
        "nothing: the page is only out of the window and back",
        Outcome.INTACT,
        Outcome.INTACT,
        _nothing,
        lines=0,
        control=True,
    ),
    Attack(
        "replay a line with its MAC",
        "puts a line and its MAC back as they were before the guest wrote it again",
        Outcome.OLD_DATA,
        Outcome.OLD_DATA,
        _replay,
        remark=_NO_FRESHNESS,
        needs_history=True,
    ),
    Attack(
        "lose a write",
        "keeps a page and its MACs as they were before the guest's last write-out",
        Outcome.OLD_DATA,
        Outcome.OLD_DATA,
        _lose,
        lines=ALL_LINES,
        remark=_NO_FRESHNESS,
        needs_history=True,
    ),
    Attack(
        "read through another KeyID",
        "reads the page under a KeyID of its own; the guest's view stays",
        Outcome.GARBAGE,
        Outcome.REFUSED,
        _read,
        lines=ALL_LINES,
    ),
    Attack(
        "zero a line and its MAC",
        "makes a line and its MAC zeros",
        Outcome.ZEROS,
        Outcome.ZEROS,
        _zero_both,
        remark=f"{_NEVER_WRITTEN}, and with integrity be a #MC, as no MAC is that of zeros",
    ),
    Attack(
        "flip a bit",
        "flips one bit of ciphertext",
        Outcome.ONE_BLOCK,
        Outcome.MACHINE_CHECK,
        _flip,
    ),
    Attack(
        "move a line",
        "copies a line and its MAC to another address",
        Outcome.GARBAGE,
        Outcome.MACHINE_CHECK,
        _move,
    ),
    Attack(
        "replay a line without its MAC",
        "puts a line back as it was, the MAC being of the new one",
        Outcome.OLD_DATA,
        Outcome.MACHINE_CHECK,
        _replay_without_mac,
        needs_history=True,
    ),
    Attack(
        "write through another KeyID",
        "writes a line under a KeyID of its own",
        Outcome.GARBAGE,
        Outcome.MACHINE_CHECK,
        _write,
    ),
    Attack(
        "zero a line",
        "makes a line's ciphertext zeros",
        Outcome.ZEROS,
        Outcome.MACHINE_CHECK,
        _zero,
        remark=_NEVER_WRITTEN,
    ),
    Attack(
        "swap two VMs' pages",
        "exchanges a page of each of two VMs, MACs and all",
        Outcome.GARBAGE,
        Outcome.MACHINE_CHECK,
        _swap,
        lines=ALL_LINES,
        guests=2,
    ),
)
"""Those that a guest with integrity survives come first."""
