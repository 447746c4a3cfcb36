# SPDX-License-Identifier: GPL-2.0-or-later
"""The register page and the calls, byte for byte as ``qemu-plugin/link_protocol.h`` has them."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import closing

import pytest

from mktme.datapath.link import LinkError, VmLink, decode_hello
from mktme.datapath.registers import (
    CALL_BYTES,
    GENERAL_PROTECTION,
    Operation,
    RegisterPage,
    decode_call,
    encode_answer,
)
from mktme.engine.tme import CpuidBits

from ..conftest import MakeQemu
from ..fake_qemu import PAGE, FakeQemu, make_register_page

CPUID = CpuidBits(7, 0, (1, 2, 3, 1 << 18))


@pytest.fixture
def visible(make_qemu: MakeQemu) -> FakeQemu:
    return make_qemu(visible=True)


@pytest.fixture
def link(visible: FakeQemu) -> Iterator[VmLink]:
    with closing(VmLink(decode_hello(visible.hello.encode()), visible.dups(), os.getpid())) as one:
        yield one


def shown(qemu: FakeQemu) -> bytes:
    return os.pread(qemu.register_page, 472, 0)


def test_page_is_what_the_plugin_reads(visible: FakeQemu, link: VmLink) -> None:
    page = RegisterPage(link)
    page.write([CPUID], {0x981: 0x1122334455667788, 0x9FF: None})
    assert struct.unpack_from("<8sIIIHH", shown(visible)) == (b"MKTMEREG", 1, 2, 1, 1, 2)
    assert struct.unpack_from("<6I", shown(visible), 24) == (7, 0, 1, 2, 3, 1 << 18)
    assert shown(visible)[48:216] == bytes(168)
    assert struct.unpack_from("<IIQ", shown(visible), 216) == (0x981, 0, 0x1122334455667788)
    assert struct.unpack_from("<IIQ", shown(visible), 232) == (0x9FF, 1, 0)
    assert shown(visible)[248:] == bytes(224)

    page.write([], {})
    assert struct.unpack_from("<8sIIIHH", shown(visible)) == (b"MKTMEREG", 1, 4, 0, 0, 0)
    assert shown(visible)[24:] == bytes(448)


def test_sequence_is_odd_while_the_page_is_written(
    visible: FakeQemu, link: VmLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = RegisterPage(link)
    page.write([], {})
    sequences = []
    write = os.pwrite

    def watched(descriptor: int, data: bytes, offset: int) -> int:
        count = write(descriptor, data, offset)
        sequences.append(struct.unpack_from("<I", shown(visible), 12)[0])
        return count

    monkeypatch.setattr(os, "pwrite", watched)
    page.write([CPUID], {0x981: 1})
    assert sequences[-1] == 4
    assert len(sequences) > 1
    assert all(one % 2 for one in sequences[:-1])


def test_page_holds_no_more_than_it_can(link: VmLink) -> None:
    page = RegisterPage(link)
    page.write([CPUID] * 8, dict.fromkeys(range(16), 0))
    with pytest.raises(ValueError, match="more than the page holds"):
        page.write([CPUID] * 9, {})
    with pytest.raises(ValueError, match="more than the page holds"):
        page.write([], dict.fromkeys(range(17), 0))


def test_page_of_a_vm_that_is_gone(link: VmLink) -> None:
    page = RegisterPage(link)
    link.close()
    with pytest.raises(LinkError, match="gone"):
        page.write([], {})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [("ram", "not one page"), ("size", "not one page"), ("pipe", "not a memfd")],
)
def test_register_page_must_be_one(visible: FakeQemu, wrong: str, message: str) -> None:
    reader, writer = os.pipe()
    other = make_register_page(2 * PAGE)
    descriptors = visible.dups()
    os.dup2({"ram": visible.ram[0], "size": other, "pipe": reader}[wrong], descriptors[-1])
    for one in (reader, writer, other):
        os.close(one)
    with pytest.raises(LinkError, match=message):
        VmLink(decode_hello(visible.hello.encode()), descriptors, os.getpid())


def test_call_is_taken_apart() -> None:
    program = os.urandom(192)
    message = bytearray(struct.pack("<IIQ", 2, 0xFFFF_FFFF, 1 << 63) + program)
    assert len(message) == CALL_BYTES == 208
    call = decode_call(memoryview(message))
    assert (call.operation, call.number) == (Operation.PCONFIG, 0xFFFF_FFFF)
    assert call.value == 1 << 63
    assert call.program == program
    message[:] = bytes(208)  # it is no copy: whoever wipes the message wipes the key
    assert call.program == bytes(192)


@pytest.mark.parametrize(
    "message",
    [b"", bytes(208), b"\1", b"\1".ljust(207, b"\0"), b"\1".ljust(209, b"\0")],
    ids=["nothing", "zeros", "short", "cut", "long"],
)
def test_what_is_no_call_is_refused(message: bytes) -> None:
    with pytest.raises(LinkError, match="a call of"):
        decode_call(memoryview(message))


def test_answers_are_what_the_plugin_reads() -> None:
    assert struct.unpack("<IIII", GENERAL_PROTECTION) == (1, 0, 0, 0)
    assert struct.unpack("<IIII", encode_answer()) == (0, 0, 0, 0)
    assert struct.unpack("<IIII", encode_answer(rax=3, zf=True)) == (0, 3, 1, 0)
