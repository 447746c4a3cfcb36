# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's memory out of an image: right, complete, or not at all."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import cast

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mktme.dump import decrypt as decrypting
from mktme.dump.decrypt import (
    PIECE_BYTES,
    DecryptReport,
    SkippedKeyId,
    VmMemory,
    decrypt,
)
from mktme.dump.formats import Format, parse_vmcoreinfo
from mktme.dump.image import DumpChangedError, DumpError, DumpImage
from mktme.dump.keys import EngineKeys, FileKeys, WrongKeyError
from mktme.engine.dram import mac_path
from mktme.engine.errors import KeyMaterialError, OutputError, OutputExistsError
from mktme.engine.keys import KeyDescription, KeyMode
from mktme.engine.line_key import LineKey
from mktme.engine.sidecar import (
    ExclusionRecord,
    IntegrityRecord,
    ModuleRecord,
    PageRange,
    Sidecar,
    sidecar_path,
    write_sidecar,
)
from mktme.engine.xts import Algorithm
from mktme.service import wire
from mktme.service.client import EngineClient

from ...vectors import reference
from .conftest import DRAM_BYTES, PAGE, VM_BASE, VM_BYTES, VM_KEYID, MakeImage, describe
from .encrypted import (
    KEY,
    LINE,
    OTHER_KEY,
    STRUCTURED,
    encrypted,
    key_file,
    vm_pages,
    with_segments,
)
from .test_formats import RELEASE, note_of

RANDOM = Random(8)
NOISE = RANDOM.randbytes(PAGE)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


def run(
    image: Path,
    out: Path,
    kind: Format = Format.RAW,
    *,
    keys: Mapping[int, bytes] = {VM_KEYID: KEY},
    skip_missing: bool = False,
    force: bool = False,
) -> DecryptReport:
    """Decrypt with known keys."""
    with ExitStack() as stack:
        opened = stack.enter_context(DumpImage.open(image))
        made = {}
        for keyid, key in keys.items():
            described = opened.key(keyid)
            assert described is not None
            assert described.algorithm is not None
            made[keyid] = LineKey.make(described.algorithm, key)
        file_keys = stack.enter_context(FileKeys(made))
        memory = stack.enter_context(VmMemory(opened, opened.vm("alice"), file_keys))
        return decrypt(memory, out, kind, image=image, skip_missing=skip_missing, force=force)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# --- what is right ----------------------------------------------------------------------------

_LINES = st.one_of(
    st.just(bytes(LINE)), st.just(b"same" * 16), st.binary(min_size=LINE, max_size=LINE)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    pages=st.dictionaries(
        st.integers(0, VM_BYTES // PAGE - 1), st.lists(_LINES, min_size=1, max_size=8), max_size=6
    ),
    kind=st.sampled_from(Format),
)
def test_round_trip(
    tmp_path: Path, make_image: MakeImage, pages: dict[int, list[bytes]], kind: Format
) -> None:
    """What another implementation encrypted, to the last bit, wherever it lies."""
    plain = {
        number: b"".join(lines) + STRUCTURED[len(lines) * LINE :] for number, lines in pages.items()
    }
    half = VM_BYTES // 2
    sidecar = with_segments((1 << 32, half, half), (0, 0, half))
    image, out = tmp_path / "dram", tmp_path / "out"
    for path in (image, mac_path(image), sidecar_path(image), out):
        path.unlink(missing_ok=True)
    make_image(vm_pages(plain), sidecar)
    report = run(image, out, kind)
    memory = bytearray(VM_BYTES)
    for number, contents in plain.items():
        memory[number * PAGE : (number + 1) * PAGE] = contents
    assert read_back(out, kind) == {0: memory[:half], 1 << 32: memory[half:]}
    assert report.written_bytes == len(plain) * PAGE
    assert (report.size_bytes, report.bad_lines, report.skipped) == (VM_BYTES, 0, ())
    # LiME's headers move memory, so that a page is in two blocks.
    assert out.stat().st_blocks * 512 <= (2 * len(plain) + 3) * PAGE


def read_back(path: Path, kind: Format) -> dict[int, bytes]:
    """A file's memory by address, read by its format's definition."""
    half = VM_BYTES // 2
    with path.open("rb") as file:
        if kind is Format.RAW:
            return {at: os.pread(file.fileno(), half, at) for at in (0, 1 << 32)}
        found = {}
        if kind is Format.LIME:
            while header := file.read(32):
                magic, version, first, last, reserved = struct.unpack("<IIQQQ", header)
                assert (magic, version, reserved) == (0x4C694D45, 1, 0)
                found[first] = file.read(last + 1 - first)
            return found
        header = file.read(64)
        phoff, _shoff, _flags, _size, entry, count = struct.unpack_from("<QQIHHH", header, 32)
        for index in range(count):
            program = os.pread(file.fileno(), entry, phoff + index * entry)
            kind_, _f, offset, _v, physical, size, in_memory, _a = struct.unpack(
                "<IIQQQQQQ", program
            )
            if kind_ == 1:
                assert size == in_memory
                found[physical] = os.pread(file.fileno(), size, offset)
        return found


def test_more_than_a_piece(tmp_path: Path, make_image: MakeImage, out: Path) -> None:
    """Reads ahead and writes behind put everything where it belongs."""
    size = 9 * PIECE_BYTES
    base = describe()
    vm = msgspec.structs.replace(base.vms[0], base=0, size_bytes=size, segments=())
    sidecar = msgspec.structs.replace(
        base,
        platform=msgspec.structs.replace(base.platform, dram_bytes=size),
        pages=(PageRange(base=0, size_bytes=size, keyid=VM_KEYID),),
        vms=(msgspec.structs.replace(vm, segments=with_segments((0, 0, size)).vms[0].segments),),
    )
    plain = np.arange(size // 8, dtype=np.uint64)
    plain[::8] = plain[2::8]
    plain[1::8] = plain[3::8]  # two equal blocks
    cipher = plain.copy().reshape(-1, 8)
    addresses = np.arange(0, size, LINE, dtype=np.uint64)
    key = LineKey.make(Algorithm.AES_XTS_256, KEY)
    assert key.cipher is not None
    key.cipher.encrypt_lines(cipher, addresses, out=cipher)
    image = make_image({0: cipher.tobytes()}, sidecar)
    assert run(image, out).written_bytes == size
    assert out.read_bytes() == plain.tobytes()


def test_pages_that_are_not_encrypted_pass_through(make_image: MakeImage, out: Path) -> None:
    base = describe()
    sidecar = msgspec.structs.replace(
        base,
        keys=(*base.keys, KeyDescription(keyid=4, mode=KeyMode.NO_ENCRYPT, algorithm=None)),
        pages=(
            PageRange(base=VM_BASE, size_bytes=PAGE, keyid=VM_KEYID),
            PageRange(base=VM_BASE + PAGE, size_bytes=PAGE, keyid=4),
        ),
        exclusion=ExclusionRecord(mask=0xFFFF_FFFF_F000, base=VM_BASE + 2 * PAGE),
    )
    pages = vm_pages({0: STRUCTURED}) | {VM_BASE + PAGE: NOISE, VM_BASE + 2 * PAGE: NOISE}
    run(make_image(pages, sidecar), out)
    assert out.read_bytes()[: 4 * PAGE] == STRUCTURED + NOISE + NOISE + bytes(PAGE)


def test_nvdimm_is_memory_too(make_image: MakeImage, out: Path, tmp_path: Path) -> None:
    module = tmp_path / "pmem.img"
    module.write_bytes(encrypted(KEY, VM_BASE + PAGE, STRUCTURED))
    sidecar = msgspec.structs.replace(
        describe(),
        modules=(ModuleRecord(base=VM_BASE + PAGE, size_bytes=PAGE, file=str(module)),),
    )
    run(make_image(vm_pages({0: STRUCTURED}), sidecar), out)
    assert out.read_bytes()[: 3 * PAGE] == STRUCTURED * 2 + bytes(PAGE)


def test_elf_has_the_kernels_own_note(make_image: MakeImage, out: Path) -> None:
    note = note_of()
    old = note_of(note_of()[24:].replace(b"-51-", b"-50-"))
    uts = b"Linux\0tiny\0".ljust(130, b"\0") + RELEASE.encode() + b"\0"
    at = 5 * PAGE + 0x80
    text = note[24:].replace(b"ffffffff82a11dc0", f"{0xFFFFFFFF81000000 + at:x}".encode())
    pages = {
        3: note_of(text).ljust(PAGE, b"\0"),
        5: (bytes(0x80) + uts).ljust(PAGE, b"\0"),
        9: old.ljust(PAGE, b"\0"),
    }
    report = run(make_image(vm_pages(pages)), out, Format.ELF)
    assert report.kernel == RELEASE
    shown = subprocess.run(["readelf", "--notes", out], capture_output=True, text=True, check=True)
    assert "VMCOREINFO" in shown.stdout
    assert out.read_bytes().endswith(text + bytes(-len(text) % 4))


def test_guest_that_is_full_of_notes(
    make_image: MakeImage, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is kept, and no more are looked at than a guest can have."""
    looked: list[bytes] = []

    def parse(memory: bytes) -> tuple[bytes, str] | None:
        looked.append(memory)
        return parse_vmcoreinfo(memory)

    monkeypatch.setattr(decrypting, "NOTES_MAX", 5)
    monkeypatch.setattr(decrypting, "parse_vmcoreinfo", parse)
    releases = [f"-{number}-" for number in range(10)]
    pages = {
        number: note_of(note_of()[24:].replace(b"-51-", name.encode())).ljust(PAGE, b"\0")
        for number, name in enumerate(releases)
    }
    report = run(make_image(vm_pages(pages)), out, Format.ELF)
    assert len(looked) == 5
    assert report.kernel == RELEASE.replace("-51-", releases[4])
    assert out.read_bytes().rstrip(b"\0").endswith(pages[4].rstrip(b"\0"))


def test_elf_without_a_kernel(make_image: MakeImage, out: Path) -> None:
    report = run(make_image(vm_pages({0: STRUCTURED})), out, Format.ELF)
    assert report.kernel is None
    assert out.stat().st_size == PAGE + VM_BYTES


# --- keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [OTHER_KEY, KEY[:32] + OTHER_KEY[32:], OTHER_KEY[:32] + KEY[32:], KEY[32:] + KEY[:32]],
    ids=["another", "tweak key wrong", "data key wrong", "halves changed"],
)
def test_wrong_key_is_noticed(make_image: MakeImage, out: Path, tmp_path: Path, key: bytes) -> None:
    image = make_image(vm_pages({number: STRUCTURED for number in range(20)}))
    with pytest.raises(WrongKeyError, match=f"does not fit KeyID {VM_KEYID} of .*noise") as caught:
        run(image, out, keys={VM_KEYID: key})
    assert "--force" in (caught.value.hint or "")
    assert not out.exists()
    run(image, out, keys={VM_KEYID: key}, force=True)
    assert STRUCTURED[:16] not in out.read_bytes()


def test_one_line_in_the_sample_is_enough(make_image: MakeImage, out: Path) -> None:
    pages = {number: RANDOM.randbytes(PAGE) for number in range(40)}
    with pytest.raises(WrongKeyError):
        run(make_image(vm_pages(pages), name="noise"), out)
    pages[39] = NOISE[:-16] + NOISE[-32:-16]
    run(make_image(vm_pages(pages)), out)
    assert out.read_bytes()[: 40 * PAGE] == b"".join(pages.values())


def test_sample_is_spread_over_all_of_it(
    make_image: MakeImage, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {number: RANDOM.randbytes(PAGE) for number in range(9)}
    monkeypatch.setattr(decrypting, "SAMPLE_PAGES", 3)
    with pytest.raises(WrongKeyError, match="192 lines"):
        run(make_image(vm_pages(pages), name="noise"), out)
    run(make_image(vm_pages(pages | {8: STRUCTURED})), out)


def test_nothing_written_fits_any_key(make_image: MakeImage, out: Path) -> None:
    assert run(make_image({}), out, keys={VM_KEYID: OTHER_KEY}).written_bytes == 0
    assert not any(out.read_bytes())


def shared(name_of_key: int = 0) -> Sidecar:
    """The second page of the VM is shared with the platform: under KeyID 0."""
    return msgspec.structs.replace(
        describe(),
        pages=(
            PageRange(base=VM_BASE, size_bytes=PAGE, keyid=VM_KEYID),
            PageRange(base=VM_BASE + PAGE, size_bytes=PAGE, keyid=name_of_key),
        ),
    )


@pytest.mark.parametrize("keyid", [0, 9], ids=["KeyID 0", "one that is as KeyID 0"])
def test_key_that_is_not_there(make_image: MakeImage, out: Path, keyid: int) -> None:
    pages = vm_pages({0: STRUCTURED}) | {VM_BASE + PAGE: NOISE}
    image = make_image(pages, shared(keyid))
    with pytest.raises(DumpError, match="alice has 4 KiB under KeyID 0, for which there is") as e:
        run(image, out)
    assert "--skip-missing" in (e.value.hint or "")
    assert not out.exists()
    report = run(image, out, skip_missing=True)
    assert report.skipped == (SkippedKeyId(0, PAGE),)
    assert out.read_bytes()[: 2 * PAGE] == STRUCTURED + bytes(PAGE)


def test_key_that_is_not_needed(make_image: MakeImage, out: Path) -> None:
    """What was never written needs none, also in a copy that has it as zeros."""
    image = make_image(vm_pages({0: STRUCTURED}) | {VM_BASE + PAGE: bytes(PAGE)}, shared())
    assert run(image, out).skipped == ()


def test_several_keys(make_image: MakeImage, out: Path) -> None:
    tme = OTHER_KEY[:32]
    pages = vm_pages({0: STRUCTURED}) | {
        VM_BASE + PAGE: encrypted(tme, VM_BASE + PAGE, STRUCTURED[::-1])
    }
    image = make_image(pages, shared())
    run(image, out, keys={VM_KEYID: KEY, 0: tme})
    assert out.read_bytes()[: 2 * PAGE] == STRUCTURED + STRUCTURED[::-1]


def test_key_files(make_image: MakeImage, tmp_path: Path) -> None:
    own, tme = key_file(tmp_path / "own"), key_file(tmp_path / "a=b", OTHER_KEY[:32])
    with DumpImage.open(make_image({})) as image:
        vm = image.vm("alice")
        with FileKeys.read(image, vm, [str(own), f"0={tme}"]) as keys:
            assert [keyid in keys for keyid in (0, VM_KEYID, 1)] == [True, True, False]
        with FileKeys.read(image, vm, [f"{VM_KEYID}={own}"]) as keys:
            assert VM_KEYID in keys
        for files, said in (
            ([str(own), f"{VM_KEYID}={own}"], "another key for KeyID 3"),
            ([str(tme)], "no aes-xts-256 key"),
            (["none"], "No such file"),
        ):
            with pytest.raises(KeyMaterialError, match=said):
                FileKeys.read(image, vm, files)
    plain = msgspec.structs.replace(
        describe(), keys=(KeyDescription(keyid=0, mode=KeyMode.PLATFORM, algorithm=None),)
    )
    with (
        DumpImage.open(make_image({}, plain, name="plain")) as image,
        pytest.raises(KeyMaterialError, match="is not encrypted"),
    ):
        FileKeys.read(image, image.vm("alice"), [str(own)])


# --- MACs -------------------------------------------------------------------------------------


def with_macs(make_image: MakeImage, plain: dict[int, bytes], key: bytes) -> Path:
    """An image of lines with MACs, made by others' code."""
    base = describe()
    sidecar = msgspec.structs.replace(
        base,
        keys=(
            base.keys[0],
            KeyDescription(VM_KEYID, KeyMode.DIRECT, Algorithm.AES_XTS_128_INTEGRITY),
        ),
        integrity=IntegrityRecord(file="dram.mac"),
    )
    contents = vm_pages(plain, key)
    path = make_image(contents, sidecar)
    with mac_path(path).open("r+b") as macs:
        for address, data in contents.items():
            for at in range(0, PAGE, LINE):
                macs.seek((address + at) // 16)
                line = data[at : at + LINE]
                macs.write(reference.mac_entry(key, address + at, line).to_bytes(4, "little"))
    return path


def test_macs_are_checked(make_image: MakeImage, out: Path) -> None:
    key = KEY[:32]
    plain = {0: STRUCTURED, 3: NOISE}
    image = with_macs(make_image, plain, key)
    run(image, out, keys={VM_KEYID: key})
    assert out.read_bytes()[: 4 * PAGE] == STRUCTURED + bytes(2 * PAGE) + NOISE
    out.unlink()

    with pytest.raises(WrongKeyError, match="of its lines' MACs hardly any matches"):
        run(image, out, keys={VM_KEYID: OTHER_KEY[:32]})
    at = VM_BASE + 3 * PAGE + 5 * LINE
    with image.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DumpError, match=f"1 lines of alice do not match .* at {at:#x}") as caught:
        run(image, out, keys={VM_KEYID: key})
    assert "--force" in (caught.value.hint or "")
    assert not out.exists()
    report = run(image, out, keys={VM_KEYID: key}, force=True)
    assert report.bad_lines == 1
    differs = np.frombuffer(out.read_bytes()[3 * PAGE : 4 * PAGE], np.uint8) != np.frombuffer(
        NOISE, np.uint8
    )
    assert differs.reshape(-1, 16).any(axis=1).nonzero()[0].tolist() == [5 * LINE // 16]


def test_macs_of_another_image(make_image: MakeImage, out: Path) -> None:
    image = with_macs(make_image, {0: STRUCTURED}, KEY[:32])
    os.truncate(mac_path(image), DRAM_BYTES // 16 - 256)
    with pytest.raises(DumpError, match="bytes are not the MACs of"):
        run(image, out, keys={VM_KEYID: KEY[:32]})


def test_keys_are_wiped_if_the_next_file_has_none(
    make_image: MakeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wiped: list[LineKey] = []
    wipe = LineKey.wipe

    def noted(key: LineKey) -> None:
        wiped.append(key)
        wipe(key)

    monkeypatch.setattr(LineKey, "wipe", noted)
    own = key_file(tmp_path / "own")
    with DumpImage.open(make_image({})) as image:
        vm = image.vm("alice")
        with pytest.raises(KeyMaterialError):
            FileKeys.read(image, vm, [str(own), "0=none"])
        assert len(wiped) == 1
        with FileKeys.read(image, vm, [str(own)]):
            assert len(wiped) == 1
    assert len(wiped) == 2


def test_keyid_that_was_programmed_anew_without_macs(make_image: MakeImage) -> None:
    """The engine does not look at what its key has no MACs for."""

    class Client:
        def status(self) -> object:
            vm = SimpleNamespace(vm=describe().vms[0].uuid, keyid=VM_KEYID, base=VM_BASE)
            return SimpleNamespace(vms=(vm,))

        def decrypt(self, *_of: object) -> wire.Decrypted:
            return wire.Decrypted(data=bytes(PAGE), bad=b"")

    keys = EngineKeys(cast("EngineClient", Client()), describe().vms[0])
    data, entries = np.ones(PAGE, np.uint8), np.ones(PAGE // LINE, np.uint32)
    assert keys.decrypt(VM_KEYID, VM_BASE, data, None) is None
    with pytest.raises(WrongKeyError, match=f"KeyID {VM_KEYID} has no MACs on the platform"):
        keys.decrypt(VM_KEYID, VM_BASE, data, entries)


# --- what is not right ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segments", "said"),
    [
        ((), "does not say where alice has its memory"),
        (((0, 0, PAGE), (0, PAGE, PAGE)), "inconsistent"),
        (((0, 0, VM_BYTES + PAGE),), "inconsistent"),
        ((((1 << 52) - PAGE, 0, 2 * PAGE),), "inconsistent"),
        (((1, 0, PAGE),), "inconsistent"),
        (((0, 0, 0),), "inconsistent"),
    ],
)
def test_map_of_memory_that_makes_no_sense(
    make_image: MakeImage, out: Path, segments: tuple[tuple[int, int, int], ...], said: str
) -> None:
    with pytest.raises(DumpError, match=said):
        run(make_image({}, with_segments(*segments)), out)


def test_image_that_changes_meanwhile(
    make_image: MakeImage, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image(vm_pages({0: STRUCTURED}))
    check_keys = VmMemory.check_keys

    def write_then_check(memory: VmMemory, **options: bool) -> tuple[SkippedKeyId, ...]:
        found = check_keys(memory, **options)
        with image.open("r+b") as file:
            file.write(b"x")
        return found

    monkeypatch.setattr(VmMemory, "check_keys", write_then_check)
    with pytest.raises(DumpChangedError, match="changed while it was read"):
        run(image, out)
    assert not out.exists()


def test_output_that_exists(make_image: MakeImage, out: Path) -> None:
    out.write_text("theirs")
    with pytest.raises(OutputExistsError):
        run(make_image({}), out)
    assert out.read_text() == "theirs"


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "full"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@needs_root
@pytest.mark.parametrize("kind", Format)
def test_output_on_a_full_disk(make_image: MakeImage, full: Path, kind: Format) -> None:
    image = make_image(vm_pages({number: STRUCTURED for number in range(40)}))
    with pytest.raises(OutputError, match="No space left on device"):
        run(image, full / "out", kind)
    assert list(full.iterdir()) == []


def test_sidecar_that_is_not_the_images(make_image: MakeImage, out: Path) -> None:
    image = make_image(vm_pages({0: STRUCTURED}))
    other = msgspec.structs.replace(
        describe(), platform=msgspec.structs.replace(describe().platform, dram_bytes=2 * DRAM_BYTES)
    )
    write_sidecar(sidecar_path(image), other)
    with pytest.raises(DumpError, match="truncated"):
        run(image, out)
