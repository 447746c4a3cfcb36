# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's measured boot, proven by its vTPM to who trusts the platform; and what is refused.

Of firmware, boot loader and kernel everything is Debian's, and so are the tools in the guest.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import struct
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from mktme.attest.claims import Evidence, decode_claims
from mktme.attest.identity import Trust
from mktme.attest.policy import Policy
from mktme.attest.reference import Reference
from mktme.attest.result import Appraisal, Verdict
from mktme.attest.token import Token
from mktme.attest.tpm_keys import TpmKey
from mktme.attest.tpm_quote import MeasuredBoot, QuoteError, TpmQuote, verify_quote
from mktme.attest.verify import verify
from mktme.datapath.kinds import DataPath
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.vm.config import VmConfig
from mktme.vm.disk_images import DiskImage, ensure_disk
from mktme.vm.disk_layout import ESP_OFFSET_BYTES
from mktme.vm.guest_tpm import take_quote
from mktme.vm.hardware import Firmware, Hardware
from mktme.vm.platform import Platform, Vm

TIMEOUT_S = 60
POLICY = Policy(
    name="measured boot", data_paths=frozenset({"inline"}), integrity=False, vtpm=True, quote=True
)
GUEST = pytest.mark.mktme(
    guest="debian-12", firmware="uefi", vtpm=True, datapath="inline", memory="512M"
)


@dataclass(frozen=True)
class Asked:
    """What a verifier got from a platform and from its VM, and what it knows them by."""

    vm: Vm
    trust: Trust
    nonce: bytes
    token: bytes
    quote: TpmQuote
    secret: bytes

    @classmethod
    def of(cls, vm: Vm) -> Asked:
        engine = vm.require_engine()
        root = x509.load_pem_x509_certificate(engine.identity().root.encode())
        nonce = secrets.token_bytes(32)
        token = engine.evidence(nonce, vm.uuid)
        return cls(vm, Trust((root,)), nonce, token, *take_quote(vm.domain.shell))

    @property
    def evidence(self) -> Evidence:
        token = Token.parse(self.token)
        return decode_claims(token.verify(token.key()))

    @property
    def vtpm(self) -> bytes:
        """What the platform vouches for."""
        (claims,) = self.evidence.vms
        assert claims.vtpm is not None
        return claims.vtpm

    def boot(self) -> MeasuredBoot:
        return verify_quote(self.quote, vtpm=self.vtpm, nonce=self.secret)

    def reference(self) -> Reference:
        (claims,) = self.evidence.vms
        return Reference.of(self.evidence, claims).with_boot(self.boot())

    def appraise(self, reference: Reference) -> Appraisal:
        return verify(
            self.token,
            trust=self.trust,
            policy=POLICY,
            reference=reference,
            nonce=self.nonce,
            vm=self.vm.uuid,
            quote=self.quote.encode(),
            quote_nonce=self.secret,
        )


def refused(check: str, quote: TpmQuote, vtpm: bytes, nonce: bytes) -> None:
    with pytest.raises(QuoteError) as error:
        verify_quote(quote, vtpm=vtpm, nonce=nonce)
    assert error.value.check == check


@pytest.mark.timeout(900)
@GUEST
def test_boot_is_proven_and_forgeries_are_refused(
    mktme_vm: Vm, mktme_platform: Platform, tmp_path: Path
) -> None:
    asked = Asked.of(mktme_vm)
    appraisal = asked.appraise(asked.reference())
    assert appraisal.verdict is Verdict.AFFIRMING, appraisal.failed

    boot = asked.boot()
    assert boot.boot_loaders == (authenticode(boot_loader(mktme_vm, tmp_path)),)
    told = mktme_vm.domain.shell.run("cat /proc/cmdline", TIMEOUT_S).output.strip()
    assert told.removeprefix("BOOT_IMAGE=") in boot.commands
    measured = {event.sha256 for event in boot.files}
    for name in ("/vmlinuz", "/initrd.img", "/boot/grub/grub.cfg"):
        said = mktme_vm.domain.shell.run(f"sha256sum {name}", TIMEOUT_S).output
        assert bytes.fromhex(said.split()[0]) in measured, name

    tools_agree(asked, tmp_path)

    quote, secret, vtpm = asked.quote, asked.secret, asked.vtpm
    refused("vtpm:nonce", quote, vtpm, secrets.token_bytes(32))
    refused("vtpm:key", quote, another_tpm(mktme_platform), secret)
    for field in ("message", "signature"):
        data = bytearray(getattr(quote, field))
        data[-1] ^= 1
        flipped = msgspec.structs.replace(quote, **{field: bytes(data)})
        refused("vtpm:signature", flipped, vtpm, secret)
    kernel = next(event for event in boot.files if event.label.endswith("/vmlinuz"))
    at = quote.event_log.index(kernel.sha256)
    log = quote.event_log[:at] + bytes(32) + quote.event_log[at + 32 :]
    refused("vtpm:log", msgspec.structs.replace(quote, event_log=log), vtpm, secret)


def tools_agree(asked: Asked, directory: Path) -> None:
    """tpm2-tools on this machine find the same of the same files, and refuse a wrong nonce."""
    quote = asked.quote
    pem = TpmKey.parse(quote.attestation_key).key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    files = {"log": quote.event_log, "ak": pem, "m": quote.message, "s": quote.signature}
    for name, data in files.items():
        (directory / name).write_bytes(data)

    def tool(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )

    said = re.findall(r"^ +(\d+) *: 0x([0-9a-f]{64})$", tool("tpm2_eventlog", "log").stdout, re.M)
    replayed = {int(pcr): bytes.fromhex(value) for pcr, value in said}
    assert {pcr: replayed[pcr] for pcr in asked.boot().pcrs} == asked.boot().pcrs
    check = ("tpm2_checkquote", "-u", "ak", "-m", "m", "-s", "s", "-g", "sha256", "-q")
    assert tool(*check, asked.secret.hex()).returncode == 0
    assert tool(*check, bytes(32).hex()).returncode != 0


def another_tpm(platform: Platform) -> bytes:
    """The key of a TPM that the same engine made, for another VM."""
    other = uuid4()
    platform.engine.add_vm(
        other,
        name="other",
        memory_bytes=2 << 20,
        track=None,
        algorithm=Algorithm.AES_XTS_128,
        mode=KeyMode.RANDOM,
        datapath=DataPath.INLINE,
        window_bytes=1 << 20,
    )
    try:
        return platform.engine.add_vtpm(other).endorsement_key
    finally:
        platform.engine.remove_vm(other)


def boot_loader(vm: Vm, directory: Path) -> bytes:
    """What is on the guest's disk for UEFI to start."""
    assert isinstance(vm.config.image, DiskImage)
    esp = f"{vm.config.image.disk}@@{ESP_OFFSET_BYTES}"
    file = directory / "bootx64.efi"
    subprocess.run(["mcopy", "-i", esp, "::EFI/BOOT/BOOTX64.EFI", str(file)], check=True)
    return file.read_bytes()


def authenticode(program: bytes) -> bytes:
    """The hash of a PE program without signatures: all of it but its checksum, and where they are.

    Source: Windows Authenticode Portable Executable Signature Format, "Calculating the PE image
    hash".
    """
    (header,) = struct.unpack_from("<I", program, 0x3C)
    optional = header + 24
    assert program[header : header + 4] == b"PE\0\0"
    assert program[optional : optional + 2] == b"\x0b\x02"  # PE32+
    checksum, certificates = optional + 64, optional + 112 + 4 * 8
    assert program[certificates : certificates + 8] == bytes(8)
    parts = (program[:checksum], program[checksum + 4 : certificates], program[certificates + 8 :])
    return hashlib.sha256(b"".join(parts)).digest()


def test_nothing_of_a_tpm_is_left(mktme_platform: Platform) -> None:
    """A guest before its first instruction: QEMU has the TPM, and its end is the TPM's."""
    hardware = Hardware(firmware=Firmware.UEFI, vtpm=True)
    config = VmConfig(ensure_disk("debian-12"), datapath=DataPath.INLINE, track=None)
    run_dir = mktme_platform.run_dir
    before, others = set(run_dir.iterdir()), swtpms(run_dir)
    with mktme_platform.launch(replace(config, hardware=hardware), "paused", boot=False):
        assert len(swtpms(run_dir) - others) == 1
    assert swtpms(run_dir) == others
    left = {path for path in set(run_dir.iterdir()) - before if not path.name.endswith(".log")}
    assert left == set()


def swtpms(run_dir: Path) -> set[int]:
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            line = (directory / "cmdline").read_bytes()
        except OSError:
            continue
        if line.startswith(b"swtpm\0") and os.fsencode(run_dir) in line:
            found.add(int(directory.name))
    return found


@pytest.mark.nightly
@pytest.mark.timeout(900)
@GUEST
def test_reference_holds_for_the_next_boot_and_for_no_other_command_line(mktme_vm: Vm) -> None:
    shell = mktme_vm.domain.shell
    reference = Asked.of(mktme_vm).reference()

    mktme_vm.domain.reboot(mktme_vm.config.boot_deadline_s)
    again = Asked.of(mktme_vm)
    assert again.appraise(reference).failed == ()

    shell.run("sed -i 's/ quiet/ quiet debug/' /boot/grub/grub.cfg && sync", TIMEOUT_S)
    mktme_vm.domain.reboot(mktme_vm.config.boot_deadline_s)
    other = Asked.of(mktme_vm)
    assert [check.name for check in other.appraise(reference).failed] == ["vtpm:pcr-8"]
    assert any(" quiet debug" in one for one in other.boot().commands)
