# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's part of attestation: evidence of what it is and has at this moment.

Every claim is read from what the engine works with: the registers, the key table, the KeyIDs of
pages, a VM's data path, what was observed of its QEMU. Who asks chooses a nonce and report data,
which are signed as such; there is no other way in. Between reading the claims and signing them
nothing else runs on the engine's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Final, Literal
from uuid import UUID

from mktme.attest.claims import (
    EXCEPTIONS_MAX,
    LINE_MAX_CHARACTERS,
    DebugStatus,
    Evidence,
    ExceptionKind,
    Launch,
    PageException,
    RecipientKey,
    TmeClaims,
    VmClaims,
)
from mktme.attest.errors import MeasurementError
from mktme.attest.files import Digests
from mktme.attest.identity import Identity
from mktme.attest.jwe import open_jwe
from mktme.attest.measure import Observation, code_digest, observe
from mktme.attest.token import sign
from mktme.datapath.kinds import DataPath
from mktme.engine.errors import KeyIdError, MktmeError
from mktme.engine.keys import KeyDescription
from mktme.engine.package import Package
from mktme.engine.sidecar import PageRange
from mktme.engine.tme import (
    IA32_TME_ACTIVATE,
    IA32_TME_CAPABILITY,
    IA32_TME_EXCLUDE_BASE,
    IA32_TME_EXCLUDE_MASK,
    ExclusionRange,
)
from mktme.service import wire
from mktme.service.custody import is_exposed, is_traced
from mktme.service.keyids import KeyIds
from mktme.service.vms import Vm

_VERSION: Final = metadata.version("mktme")
_ALL: Final = 1 << 52


class Attestation:
    """Signs evidence, and takes in the keys that are released on it.

    Args:
        identity: the platform's.
        package: its registers and keys.
        vms: its VMs, by UUID.
        keyids: whose KeyIDs are whose.
    """

    def __init__(
        self, identity: Identity, package: Package, vms: dict[UUID, Vm], keyids: KeyIds
    ) -> None:
        self._identity = identity
        self._package = package
        self._vms = vms
        self._keyids = keyids
        self._code = code_digest()  # before anything could have changed it since it was loaded
        self._digests = Digests()
        self._hashing = asyncio.Lock()

    def identity(self) -> wire.Identity:
        """Who signs."""
        return wire.Identity(ueid=self._identity.ueid, root=self._identity.root_pem().decode())

    async def evidence(self, request: wire.GetEvidence) -> wire.Evidence:
        """Sign what is so now.

        Raises:
            MeasurementError: the VM that was asked about is not one to be vouched for.
            MktmeError: there is no such VM.
        """
        if request.vm is not None and request.vm not in self._vms:
            raise MktmeError(f"no VM {request.vm} on this platform")
        launches: dict[UUID, tuple[Observation, Launch]] = {}
        for vm in tuple(self._vms.values()):
            if request.vm not in (None, vm.uuid):
                continue
            try:
                launches[vm.uuid] = await self._measure(vm)
            except MeasurementError:
                if request.vm is not None:
                    raise
        # From here to the signature nothing gives way to anything else.
        if request.vm is not None and not self._is(request.vm, launches[request.vm][0]):
            raise MeasurementError(f"VM {request.vm} ended meanwhile")
        evidence = Evidence(
            nonce=request.nonce,
            issued_at=int(time.time()),
            ueid=self._identity.ueid,
            version=_VERSION,
            code=self._code,
            debug=_debug_status(is_exposed()),
            tme=TmeClaims(
                capability=self._package.rdmsr(IA32_TME_CAPABILITY),
                activate=self._package.rdmsr(IA32_TME_ACTIVATE),
                exclude_mask=self._package.rdmsr(IA32_TME_EXCLUDE_MASK),
                exclude_base=self._package.rdmsr(IA32_TME_EXCLUDE_BASE),
            ),
            vms=tuple(
                self._claims(self._vms[uuid], launch, observation, request.report_data)
                for uuid, (observation, launch) in sorted(launches.items())
                if self._is(uuid, observation)
            ),
        )
        return wire.Evidence(token=sign(evidence, self._identity))

    async def release(self, request: wire.ReleaseKey) -> wire.KeyProgrammed:
        """Take in a key that was released to a VM, `KeyIds.lock` held.

        Raises:
            JweError: it is not encrypted to the VM's recipient key, or has not a key's size.
            MktmeError: as `KeyIds.adopt`.
        """
        vm = self._vms.get(request.vm)
        if vm is None:
            raise MktmeError(f"no VM {request.vm} on this platform")
        algorithm = self._key(vm).algorithm
        if algorithm is None:
            raise KeyIdError(f"VM {vm.name} is not encrypted", keyid=vm.keyid)
        with open_jwe(request.jwe, vm.recipient, algorithm.key_bytes) as key:
            keyid = await self._keyids.adopt(vm, algorithm, key.view)
        vm.renew_recipient()
        return wire.KeyProgrammed(keyid=keyid)

    async def _measure(self, vm: Vm) -> tuple[Observation, Launch]:
        """What a VM was launched from; hashing files takes its time, beside the engine's thread."""
        observation = vm.observation
        if observation is None or vm.link is None:
            raise MeasurementError(f"VM {vm.name}: {vm.unmeasured}")
        async with self._hashing:
            if vm.launch is None:
                launch = await asyncio.to_thread(observation.measure, self._digests)
                if not self._is(vm.uuid, observation):
                    raise MeasurementError(f"VM {vm.name} ended meanwhile")
                vm.launch = launch
            return observation, vm.launch

    def _is(self, uuid: UUID, observation: Observation) -> bool:
        """Whether a VM's QEMU is still the one that was observed."""
        vm = self._vms.get(uuid)
        return vm is not None and vm.link is not None and vm.observation is observation

    def _claims(
        self, vm: Vm, launch: Launch, observation: Observation, report_data: bytes
    ) -> VmClaims:
        key = self._key(vm)
        trackers: list[Literal["pages", "stores"]] = []
        if vm.datapath is DataPath.SHADOW and vm.track is not None:
            trackers += ["pages"] if vm.track.pages else []
            trackers += ["stores"] if vm.track.stores else []
        return VmClaims(
            uuid=vm.uuid,
            name=vm.name,
            running=_may_have_run(vm),
            launch=launch,
            keyid=vm.keyid,
            algorithm=key.algorithm,
            mode=key.mode,
            source=self._keyids.source(vm.keyid),
            datapath=vm.datapath.value,
            trackers=tuple(trackers),
            integrity=key.algorithm is not None and key.algorithm.has_integrity,
            exceptions=self._exceptions(vm),
            report_data=report_data,
            recipient_key=RecipientKey.of(vm.recipient.public_key()),
            vtpm=None if vm.vtpm is None else vm.vtpm.endorsement_key,
            debug=_debug_status(observation.debuggable or _is_traced(vm)),
            fault=None if vm.fault is None else _on_one_line(vm.fault)[:LINE_MAX_CHARACTERS],
        )

    def _key(self, vm: Vm) -> KeyDescription:
        """How a VM's own KeyID is programmed; one that is not is as KeyID 0."""
        keys = {one.keyid: one for one in self._package.keys.describe()}
        return keys.get(vm.keyid, keys[0])

    def _exceptions(self, vm: Vm) -> tuple[PageException, ...]:
        ranges = self._package.controller.page_ranges(vm.region)
        found = tuple(
            PageException(
                kind=kind,
                ram_offset=run.base - vm.region.base,
                size_bytes=run.size_bytes,
                keyid=run.keyid,
            )
            for run, kind in self._kinds(vm, ranges)
        )
        if len(found) > EXCEPTIONS_MAX:
            raise MeasurementError(
                f"VM {vm.name} has {len(found)} runs of pages that are not under its own KeyID",
                hint=f"evidence has room for {EXCEPTIONS_MAX}",
            )
        return found

    def _kinds(
        self, vm: Vm, ranges: tuple[PageRange, ...]
    ) -> Iterator[tuple[PageRange, ExceptionKind]]:
        """The pages that are not simply the VM's own, and what they are."""
        for run in ranges:
            for part, is_excluded in _split(run, self._package.tme.exclusion):
                if is_excluded or self._package.keys.cipher(run.keyid) is None:
                    yield part, ExceptionKind.UNENCRYPTED
                elif run.keyid == 0:
                    yield part, ExceptionKind.SHARED
                elif run.keyid != vm.keyid:
                    yield part, ExceptionKind.FURTHER


def look_at(vm: Vm, pid: int) -> tuple[Observation | None, str]:
    """Observe the QEMU that is about to be linked; None and why if it cannot be vouched for.

    A VM runs all the same without: there is no evidence of it then.
    """
    if vm.domain is None:
        return None, "the engine was not told what its domain is"
    try:
        if vm.vtpm is None:
            return observe(pid, vm.uuid, vm.domain), ""
        tpm = vm.vtpm
        return observe(pid, vm.uuid, vm.domain, tpm=tpm.pid, tpm_socket=tpm.socket), ""
    except MeasurementError as error:
        return None, str(error)


def _split(run: PageRange, exclusion: ExclusionRange | None) -> Iterator[tuple[PageRange, bool]]:
    """A run of pages in the parts that an exclusion range makes of it, if it is KeyID 0's."""
    start, end = run.base, run.base + run.size_bytes
    low = high = start
    if run.keyid == 0 and exclusion is not None:
        base = exclusion.base & exclusion.mask
        size = exclusion.mask & -exclusion.mask or _ALL  # the mask's lowest one; without one, all
        low, high = (min(max(one, start), end) for one in (base, base + size))
    for first, last, is_excluded in ((start, low, False), (low, high, True), (high, end, False)):
        if first < last:
            yield PageRange(base=first, size_bytes=last - first, keyid=run.keyid), is_excluded


def _may_have_run(vm: Vm) -> bool:
    """Whether a VM's vCPUs may have executed something.

    The store tracker's plugin counts a flush as each vCPU comes up, and another one at the reset
    vector, before anything is executed there. Without it, nobody saw that nothing was.
    """
    counters = None if vm.link is None else vm.link.counters()
    if vm.link is None or counters is None:
        return True
    return counters.tlb_misses > 0 or counters.tlb_flushes > vm.link.hello.vcpus


def _is_traced(vm: Vm) -> bool:
    """Whether a debugger is attached to a VM's QEMU now; if it is gone, nobody can tell."""
    try:
        return vm.link is None or is_traced(vm.link.qemu_pid)
    except OSError:
        return True


def _debug_status(is_open: bool) -> DebugStatus:
    return DebugStatus.ENABLED if is_open else DebugStatus.DISABLED


def _on_one_line(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode()
