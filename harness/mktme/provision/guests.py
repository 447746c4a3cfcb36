# SPDX-License-Identifier: GPL-2.0-or-later
"""The real VMs: what `mktme.provision.apply` gives orders to, on a `Platform`."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import libvirt

from mktme.attest.files import disk_digest
from mktme.attest.identity import Trust
from mktme.engine.keys import KeyMode
from mktme.engine.sidecar import PageRange
from mktme.provision.apply import Narrator
from mktme.provision.attestation import Criteria, engine_roots
from mktme.provision.secrets import Marks, hand_over, look, withdraw
from mktme.provision.state import (
    Facts,
    PlatformState,
    SecretFact,
    image_fact,
    key_fact,
    pages_fact,
    size_text,
)
from mktme.provision.tenants import Deployment, KeySource, Secret, VmSpec
from mktme.service import wire
from mktme.vm.console import VmError
from mktme.vm.guest_map import guest_physical
from mktme.vm.pages import GuestPages, PageUse
from mktme.vm.platform import Platform, Vm

_SEED: Final = "disk1"  # behind the guest's own disk (`mktme.vm.domain_xml`)
_VCPUS: Final = 3  # in virDomainGetInfo's answer


@dataclass(slots=True)
class PlatformBench:
    """A platform, as `mktme.provision.apply.Bench` has it.

    Attributes:
        platform: entered already.
        stack: what takes it down.
    """

    platform: Platform
    deployment: Deployment
    stack: contextlib.ExitStack

    @classmethod
    def open(cls, deployment: Deployment, tell: Narrator) -> PlatformBench:
        """Bring a platform up for a deployment.

        Raises:
            MktmeError: it does not come up; nothing of it is left.
        """
        with contextlib.ExitStack() as stack:
            platform = stack.enter_context(
                Platform(
                    deployment.dram_bytes,
                    config=deployment.platform,
                    ca=deployment.ca,
                    emulator=deployment.emulator,
                    notice=tell.notice,
                )
            )
            return cls(platform, deployment, stack.pop_all())

    def state(self) -> PlatformState:
        """What it is, as its engine says."""
        status = self.platform.engine.status()
        return PlatformState(
            dram_bytes=status.dram_bytes,
            config=status.platform,
            emulator=self.deployment.emulator,
            ca=self.deployment.ca,
            engine_pid=self.platform.engine_pid,
            control_socket=self.platform.control_socket,
        )

    def roots(self) -> Trust:
        """The CA that vouches for the engine which was started here."""
        return engine_roots(self.platform.engine)

    def launch(self, spec: VmSpec, tell: Narrator) -> PlatformGuest:
        """Load a VM; no instruction of it runs yet.

        Raises:
            MktmeError: it does not come up; nothing of it is left.
        """
        image = spec.ensure_image(tell.notice)
        with contextlib.ExitStack() as stack:
            launched = self.platform.launch(spec.config(image), spec.name, boot=False)
            vm = stack.enter_context(launched)
            return PlatformGuest(self.platform, vm, image_fact(spec), _own(vm), stack.pop_all())

    def wait_ended(self) -> None:
        """Wait until its engine ends, also by `close`."""
        self.platform.wait_ended()

    def abort(self) -> None:
        """Have whoever waits for a VM give up, from any thread; `close` is next."""
        self.platform.abort()

    def close(self) -> None:
        """Take it down."""
        self.stack.close()


@dataclass(slots=True)
class PlatformGuest:
    """A VM of a platform, as `mktme.provision.apply.Guest` has it.

    Attributes:
        image: what it was launched from, as facts have it.
        own: the seed that was made for it, by which the provisioner logs in to it.
    """

    platform: Platform
    vm: Vm
    image: str
    own: Mapping[str, bytes]
    stack: contextlib.ExitStack

    @property
    def uuid(self) -> UUID:
        """Its name at the engine."""
        return self.vm.uuid

    @property
    def keyid(self) -> int:
        """What its memory is under; another one once a broker released its key."""
        return self.vm.status().keyid

    def evidence(self, nonce: bytes) -> bytes:
        """A token about this VM alone."""
        return self.vm.require_engine().evidence(nonce, self.uuid)

    def facts(self, spec: VmSpec, criteria: Criteria, secrets: tuple[SecretFact, ...]) -> Facts:
        """What it is now.

        Raises:
            MktmeError: engine or libvirt do not say.
        """
        status = self.vm.require_engine().status()
        vm = self.vm.status()
        key = next(one for one in status.keys if one.keyid == vm.keyid)
        config = self.vm.config
        # A tracker that this QEMU cannot have (`Platform` says so) was not asked for in vain.
        track = spec.track if vm.track == config.track else vm.track
        released = key.mode is KeyMode.DIRECT
        return Facts(
            image=self.image,
            memory=size_text(vm.memory_bytes),
            vcpus=self._vcpus(),
            machine=config.hardware.machine.value,
            firmware=config.hardware.firmware.value,
            datapath=vm.datapath.value,
            track="-" if track is None else track.value,
            window="-" if vm.paging is None else size_text(vm.paging.window_bytes),
            algorithm="-" if key.algorithm is None else key.algorithm.value,
            key=key_fact(
                KeySource.BROKER if released else KeySource.RANDOM,
                spec.resource if released else None,
            ),
            pages=pages_fact(self._pages(vm, status.keys)),
            policy=criteria.policy_fact,
            reference=criteria.reference_fact,
            trust=criteria.trust_fact,
            secrets=secrets,
        )

    def _vcpus(self) -> str:
        try:
            return str(self.vm.domain.handle.info()[_VCPUS])
        except libvirt.libvirtError as error:
            raise VmError(f"libvirt knows nothing of it: {error}") from error

    def _pages(self, vm: wire.VmStatus, keys: Collection[wire.KeyStatus]) -> tuple[GuestPages, ...]:
        """Its pages that are under another KeyID than its own, as the engine has them."""
        modes = {one.keyid: one.mode for one in keys}
        machine = self.vm.config.hardware.machine
        return tuple(
            GuestPages(
                guest_physical(one.base - vm.base, vm.memory_bytes, machine),
                one.size_bytes,
                _use(one, modes),
            )
            for one in vm.pages
            if one.keyid != vm.keyid and one.base - vm.base < vm.memory_bytes
        )

    def trouble(self) -> str | None:
        """Why it is lost, None if it is not."""
        fault = self.platform.fault(self.uuid)
        if fault is not None:
            return fault
        return None if self.vm.domain.is_active else "its QEMU ended"

    def release(self, jwe: bytes) -> None:
        """Give it the key that a broker encrypted to it."""
        self.vm.require_engine().release_key(self.uuid, jwe)

    def boot(self) -> None:
        """Let it run for the first time, to its shell."""
        self.vm.domain.boot(self.vm.config.boot_deadline_s)

    def hold(self) -> None:
        """Stop its vCPUs."""
        self.vm.domain.suspend()

    def resume(self) -> None:
        """Let them go on."""
        self.vm.domain.resume()

    def assign(self, old: Collection[GuestPages], new: Collection[GuestPages]) -> None:
        """Give ranges of its pages back, and others to other KeyIDs."""
        for one in old:
            if one not in new:
                self.vm.assign(GuestPages(one.guest_physical, one.size_bytes, PageUse.PRIVATE))
        for one in new:
            if one not in old:
                self.vm.assign(one)

    def look(self, secrets: Collection[Secret], marks: Marks) -> tuple[SecretFact, ...]:
        """Which of some secrets are in it."""
        return look(self.vm.domain.ssh, secrets, marks) if secrets else ()

    def hand_over(self, secret: Secret) -> None:
        """Write a secret into it."""
        hand_over(self.vm.domain.ssh, secret)

    def withdraw(self, path: str) -> None:
        """Remove one."""
        withdraw(self.vm.domain.ssh, path)

    def close(self) -> None:
        """Take it down; nothing of it is left."""
        self.stack.close()


def _own(vm: Vm) -> dict[str, bytes]:
    """The seed's digest, as the launch measurement has it."""
    boot = vm.domain.spec.boot
    if boot is None:
        return {}
    with boot.seed.open("rb") as file:
        return {_SEED: disk_digest(file.fileno())}


def _use(pages: PageRange, modes: dict[int, KeyMode]) -> PageUse:
    if not pages.keyid:
        return PageUse.SHARED
    is_clear = modes[pages.keyid] is KeyMode.NO_ENCRYPT
    return PageUse.NO_ENCRYPT if is_clear else PageUse.OTHER_KEY
