# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's errors, and the root of every error this project raises.

The whole tree, outer layers included (each layer defines its own branch)::

    MktmeError
    ├── EngineError                 this module
    │   ├── AddressError            an address or range that the platform does not have
    │   ├── KeyIdError              a KeyID that cannot be used as asked
    │   ├── KeyMaterialError        a key, or key file, that must not be used
    │   ├── DramError               the DRAM image cannot be read or written
    │   │   └── DramFullError       its file system is full (ENOSPC, EDQUOT)
    │   ├── OutputError             a file that cannot be made, or not be written to the end
    │   │   └── OutputExistsError   its name is taken
    │   ├── IntegrityError          a line in DRAM that does not match its MAC
    │   ├── EntropyError            mktme.engine.rng: the noise source is not to be trusted
    │   ├── GeneralProtection       mktme.engine.tme: an instruction raises #GP
    │   ├── PconfigError            mktme.engine.package: a KeyID could not be programmed
    │   ├── PlatformConfigError     mktme.engine.firmware: a setting that no platform can have
    │   └── FirmwareError           mktme.engine.firmware: TME could not be enabled
    ├── LinkError                   mktme.datapath.link: a hello that is refused
    ├── WriteTrackingError          mktme.datapath.uffd: the kernel or its permissions lack it
    ├── FaultServiceError           mktme.datapath.uffd: a guest's page faults cannot be served
    │   └── GuestGoneError          its QEMU, or the memory in it, is gone
    ├── ProtocolError               mktme.service.wire: not a message of the control protocol
    ├── RoleError                   mktme.service.wire: not for a connection of that role
    ├── CaptureError                mktme.service.captures: DRAM cannot be captured now
    ├── VtpmError                   mktme.service.vtpm: a VM's TPM could not be made
    ├── LimitError                  mktme.service.limits: more than one peer can have
    ├── ServiceError                mktme.service.client: the engine could not be asked
    │   ├── EngineGoneError         its process or connection ended
    │   └── EngineRefusedError      it answered with a failure
    ├── EnvironmentUnfitError       mktme.vm.host: this machine lacks something
    ├── UsageError                  mktme.vm.host: an option value that makes no sense
    │   ├── BypassError             mktme.vm.bypass: what would bypass a guest's data path
    │   └── TenantsError            mktme.provision.errors: a tenants.toml that says nothing
    ├── ProvisionError              mktme.provision.errors: what the provisioner could not do
    │   └── LeftOffError            it goes on without the command that asked it
    ├── UnknownGuestError           mktme.vm.images: no recipe of that name
    ├── ImageError                  mktme.vm.images: a guest image that cannot be built or trusted
    ├── VmError                     mktme.vm.console: a guest that did not do as expected
    │   ├── VmLostError             it is gone, or silent
    │   │   └── HostLostError       mktme.remote.link: so is the host that it moved to
    │   ├── MigrationError          mktme.vm.arrival: it did not move, and runs on where it was
    │   └── GuestCommandError       a command in it failed
    ├── WireError                   mktme.remote.wire: no message between two hosts
    ├── GuestRamError               mktme.proof.guest_ram: RAM that cannot be read
    ├── KeySearchError              mktme.proof.custody: what cannot be searched for keys
    ├── AttestationError            mktme.attest.errors: root of the next nine
    │   ├── TokenError              what is no evidence
    │   ├── CertificateError        a certificate, chain or CA that cannot be used
    │   ├── MeasurementError        a launch that cannot be measured
    │   ├── PolicyError             a policy that cannot be appraised
    │   ├── ReferenceValuesError    reference values that cannot be read
    │   ├── JweError                a JWE that cannot be opened
    │   ├── TpmFormatError          mktme.attest.marshal: no structure of a TPM's
    │   ├── QuoteError              mktme.attest.tpm_quote: a quote that is not to be believed
    │   └── RefusedError            mktme.attest.result: evidence that is not affirmed
    ├── BrokerError                 mktme.broker.errors: root of the next eight
    │   ├── BrokerSetupError        what an administrator asked for makes no sense
    │   ├── StoreError              a store that is not as the broker left it
    │   ├── AuditError              a decision that cannot be recorded
    │   ├── DeniedError             a client does not get what it asked for
    │   ├── BrokerGoneError         it cannot be reached
    │   ├── SessionError            mktme.broker.sessions: a cookie that is none, or expired
    │   │   └── ReplayError         a nonce that served already
    │   └── BusyError               mktme.broker.sessions: as many as there may be
    ├── PatternError                mktme.dump.patterns: what cannot be searched for
    └── DumpError                   mktme.dump.image: an image that is not what it is said to be
        ├── DumpChangedError        it was written while it was read
        └── WrongKeyError           mktme.dump.keys: not the key that it was written with
"""

from __future__ import annotations


class MktmeError(Exception):
    """Root of the tree.

    Args:
        message: one line, what is wrong.
        hint: one line, what the reader can do about it.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class EngineError(MktmeError):
    """The encryption engine refuses or cannot do something."""


class AddressError(EngineError):
    """An address or range outside what the platform has, or not aligned as needed."""

    def __init__(self, message: str, *, address: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.address = address


class KeyIdError(EngineError):
    """A KeyID that does not exist, or cannot be used as asked."""

    def __init__(self, message: str, *, keyid: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.keyid = keyid


class KeyMaterialError(EngineError):
    """Key material that cannot or must not be used; the message never shows any of it."""


class DramError(EngineError):
    """The DRAM image cannot be read, written or understood."""


class OutputError(EngineError):
    """A file that is to be made cannot be, or not be written to the end; nothing of it is left."""


class OutputExistsError(OutputError):
    """There is something of that name, which is left as it is."""


class DramFullError(DramError):
    """The DRAM image's file system is full; nothing written earlier is lost."""

    def __init__(self, message: str, *, address: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.address = address


class IntegrityError(EngineError):
    """A line does not match its MAC: it was changed, moved, or written under another key.

    Attributes:
        address: the line's address in DRAM.
        keyid: the KeyID that it was read through.
    """

    def __init__(self, *, address: int, keyid: int) -> None:
        super().__init__(
            f"the line at {address:#x} does not match its MAC under KeyID {keyid}",
            hint="DRAM was changed from outside, or its page was written through another KeyID",
        )
        self.address = address
        self.keyid = keyid
