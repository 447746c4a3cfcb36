# SPDX-License-Identifier: GPL-2.0-or-later
"""Event logs: what is measured, what it leads to, and logs that are none."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.attest.event_log import LOG_MAX_BYTES, PCRS, EventKind, EventLog
from mktme.attest.marshal import TpmFormatError

from .soft_tpm import BOOT, LogEvent, encode_log

SHA256, SHA384 = (0xB, 32), (0xC, 48)
LOG = encode_log(BOOT)


def test_replay_is_what_tpm2_eventlog_computes(tmp_path: Path) -> None:
    if shutil.which("tpm2_eventlog") is None:
        pytest.skip("tpm2-tools are not installed: make setup")
    path = tmp_path / "log"
    # tpm2-tools 5.4 extends events of type EV_NO_ACTION, too, which the specification forbids; a
    # TPM agrees with us (test_tpm_quote).
    data = encode_log([event for event in BOOT if event.kind is not EventKind.NO_ACTION])
    path.write_bytes(data)
    said = subprocess.run(["tpm2_eventlog", path], capture_output=True, text=True, check=True)
    theirs = dict(re.findall(r"^ +(\d+) *: 0x([0-9a-f]{64})$", said.stdout, re.M))
    assert len(theirs) == 10
    ours = EventLog.parse(data).replay()
    assert {int(pcr): bytes.fromhex(value) for pcr, value in theirs.items()} == dict(
        enumerate(ours[:10])
    )


def test_other_banks_change_nothing() -> None:
    both = encode_log(BOOT, [SHA384, SHA256, (0x1234, 7)])
    assert EventLog.parse(both) == EventLog.parse(LOG)


def test_pcrs_start_as_the_specification_has_them() -> None:
    values = EventLog.parse(encode_log(())).replay()
    assert len(values) == PCRS
    assert values[0] == values[16] == values[23] == bytes(32)
    assert values[17] == values[22] == b"\xff" * 32


def test_startup_locality_is_the_last_byte_of_pcr_0() -> None:
    start = LogEvent(0, EventKind.NO_ACTION, bytes(32), b"StartupLocality\0\3")
    assert EventLog.parse(encode_log([start])).replay()[0] == bytes(31) + b"\3"


def test_text_is_told_only_where_it_was_measured() -> None:
    log = EventLog.parse(LOG)
    assert [event.text for event in log.of(8)] == ["linux /vmlinuz quiet", "/vmlinuz quiet"]
    (kernel,) = log.of(9)
    assert kernel.text is None
    assert kernel.label == "/vmlinuz"
    assert kernel.sha256 == hashlib.sha256(b"the kernel").digest()
    lie = LogEvent.of(8, EventKind.IPL, b"grub_cmd: linux /vmlinuz\0", b"linux /evil")
    (event,) = EventLog.parse(encode_log([lie])).events
    assert event.text is None


def test_what_an_event_says_is_fit_for_a_terminal() -> None:
    escape = LogEvent.of(8, EventKind.IPL, b"\x1b[2J\xff\n")
    (event,) = EventLog.parse(encode_log([escape])).events
    assert event.label.isprintable()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "ends"),
        (LOG[:-1], "ends 1 bytes too early"),
        (LOG + b"\0", "ends"),
        (LOG[:32] + b"Spec ID Event02\0" + LOG[48:], "not in the crypto agile format"),
        (b"\1" + LOG[1:], "does not start with a Spec ID event"),
        (LOG[:28] + b"\xff\0\0\0" + LOG[32:], "not the 255 bytes it says"),
        (encode_log(BOOT, [SHA384]), "no bank of SHA-256"),
        (encode_log(BOOT, [SHA256, SHA256]), "twice"),
        (encode_log(BOOT, [(0xB, 20)]), "of 20 bytes"),
        (encode_log(BOOT, [SHA256, (0x99, 0)]), "digests of 0 bytes"),
        (encode_log((), [SHA256] * 9), "9 banks"),
        (encode_log([LogEvent(24, EventKind.IPL, bytes(32), b"")]), "an event of PCR 24"),
        (encode_log([LogEvent(0, EventKind.IPL, bytes(32), bytes(65537))]), "65537 bytes"),
        (encode_log([BOOT[1], BOOT[0]]), "a start-up locality that is none"),
        (LOG + bytes(LOG_MAX_BYTES), "more than"),
    ],
)
def test_what_is_no_log(data: bytes, problem: str) -> None:
    with pytest.raises(TpmFormatError, match=problem):
        EventLog.parse(data)


@given(st.data())
def test_any_other_byte_is_refused_or_gives_another_log(data: st.DataObject) -> None:
    """But for what is in no PCR: what comes first, the platform's class and NO_ACTION events."""
    place = data.draw(st.integers(0, len(LOG) - 1))
    changed = bytearray(LOG)
    changed[place] ^= data.draw(st.integers(1, 255))
    try:
        log = EventLog.parse(bytes(changed))
    except TpmFormatError:
        return
    assert log != EventLog.parse(LOG) or place < len(encode_log(BOOT[:1]))
