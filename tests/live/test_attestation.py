# SPDX-License-Identifier: GPL-2.0-or-later
"""Attestation of live VMs: what is affirmed, what is refused, and a key released before boot."""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path

import numpy as np
import pytest

from mktme.attest.claims import Evidence, KeySource
from mktme.attest.identity import CertificateAuthority, Trust, load_trust
from mktme.attest.policy import Policy
from mktme.attest.reference import Reference
from mktme.attest.result import Appraisal
from mktme.attest.token import Token, open_token
from mktme.attest.verify import verify
from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.proof.guest_ram import memory_of
from mktme.proof.transparency import compare_memory, run_workload
from mktme.pytest_plugin import vm_config
from mktme.vm.config import VmConfig
from mktme.vm.images import GuestImage
from mktme.vm.platform import Platform, Vm

from ..unit.attest.test_jwe import seal
from ..vectors import reference as xts

MIB = 1 << 20
MEMORY = 192 * MIB
LINE = 64
SAMPLE = 200
POLICY = Policy(
    name="live",
    key_size=256,
    data_paths=frozenset({"shadow", "inline"}),
    integrity=False,
    lifetime_s=60,
)


def evidence_of(vm: Vm, nonce: bytes) -> tuple[bytes, Evidence]:
    """A VM's evidence, and what it says, whoever signed it."""
    token = vm.require_engine().evidence(nonce, vm.uuid)
    return token, open_token(token, Token.parse(token).key())


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    CertificateAuthority.make("live tests").save(tmp_path / "ca")
    return load_trust([tmp_path / "ca/ca.pem"])


@pytest.mark.parametrize("datapath", ["shadow", "inline"])
def test_a_vm_is_attested_and_given_its_key(datapath: str, tmp_path: Path, trust: Trust) -> None:
    config = vm_config(memory="192M", datapath=datapath, algorithm="aes-xts-256")
    with Platform(2 * MEMORY, ca=tmp_path / "ca") as platform:
        with platform.launch(config, "alice", boot=False) as vm:
            nonce = secrets.token_bytes(32)
            token, said = evidence_of(vm, nonce)
            good = Reference.of(said, said.vms[0])

            def appraise(token: bytes, policy: Policy = POLICY) -> Appraisal:
                return verify(
                    token, trust=trust, policy=policy, reference=good, nonce=nonce, vm=vm.uuid
                )

            appraise(token).require()
            assert said.vms[0].running is (datapath == "inline")  # where no store is seen
            wants_broker = dataclasses.replace(POLICY, key_sources=frozenset({KeySource.BROKER}))
            assert [one.name for one in appraise(token, wants_broker).failed] == ["key-source"]

            key, other = secrets.token_bytes(64), secrets.token_bytes(64)
            keyid = release(vm, said, key)
            token, said = evidence_of(vm, nonce)
            appraise(token, wants_broker).require()
            assert (said.vms[0].keyid, said.vms[0].mode) == (keyid, KeyMode.DIRECT)

            vm.domain.boot(config.boot_deadline_s)
            run_workload(vm.domain.console)
            assert decrypted_lines(vm, platform.dram_path, key) == SAMPLE
            assert decrypted_lines(vm, platform.dram_path, other) == 0  # control
            with vm.held() as engine:
                assert compare_memory(dataclasses.replace(vm, keyid=keyid), engine).passed
            token, said = evidence_of(vm, nonce)
            appraise(token, wants_broker).require()
            assert said.vms[0].running

            changed = with_command_line(config, "console=ttyS0 quiet panic=-1 init=/bin/sh")
            with platform.launch(changed, "mallory", boot=False) as second:
                token, said = evidence_of(second, nonce)
                assert [one.name for one in appraise(token).failed] == ["vm"]
                refused = verify(token, trust=trust, policy=POLICY, reference=good, nonce=nonce)
                names = [one.name for one in refused.failed]
                assert names == ["launch:command-line", "launch:domain"]
        assert b'"ReleaseKey"' in (platform.run_dir / "audit.jsonl").read_bytes()
        for name in ("engine.log", "audit.jsonl"):
            text = (platform.run_dir / name).read_bytes()
            for half in (key[:32], key[32:]):
                assert half not in text
                assert half.hex().encode() not in text


def release(vm: Vm, said: Evidence, key: bytes) -> int:
    """What a key broker does: encrypt to the key that evidence binds."""
    public = said.vms[0].recipient_key.public_key()
    return vm.require_engine().release_key(vm.uuid, seal(public, "ECDH-ES+A256KW", key).encode())


def with_command_line(config: VmConfig, text: str) -> VmConfig:
    assert isinstance(config.image, GuestImage)
    return dataclasses.replace(config, image=dataclasses.replace(config.image, cmdline=text))


def decrypted_lines(vm: Vm, dram: Path, key: bytes) -> int:
    """How many of some lines of DRAM, decrypted by an independent AES-XTS, are what it holds."""
    with vm.held(), memory_of(vm) as source:
        memory = np.frombuffer(source.read(0, 4 * MIB), np.uint8).reshape(-1, LINE)
        written = np.flatnonzero(memory.any(axis=1))
        chosen = written[:: max(1, len(written) // SAMPLE)][:SAMPLE]
        equal = 0
        with dram.open("rb") as file:
            for number in chosen:
                address = vm.base + int(number) * LINE
                file.seek(address)
                line = xts.decrypt(key, address.to_bytes(16, "little"), file.read(LINE))
                equal += line == memory[number].tobytes()
        return equal


def test_a_platform_that_bypasses_tme_is_refused(tmp_path: Path, trust: Trust) -> None:
    config = vm_config(memory="192M")
    bypassed = PlatformConfig(bypass=True)
    with (
        Platform(MEMORY, ca=tmp_path / "ca", config=bypassed) as platform,
        platform.launch(config, boot=False) as vm,
    ):
        nonce = secrets.token_bytes(32)
        token, said = evidence_of(vm, nonce)
        appraisal = verify(
            token,
            trust=trust,
            policy=dataclasses.replace(POLICY, key_size=128),
            reference=Reference.of(said, said.vms[0]),
            nonce=nonce,
        )
        assert [one.name for one in appraisal.failed] == ["exclusion"]
