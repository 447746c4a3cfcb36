# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's errors, and the root of every error this project raises.

The whole tree, outer layers included (each layer defines its own branch)::

    MktmeError
    ├── EngineError                 this module
    │   ├── AddressError            an address or range that the platform does not have
    │   ├── KeyIdError              a KeyID that cannot be used as asked
    │   ├── KeyMaterialError        a key, or key file, that must not be used
    │   └── DramError               the DRAM image cannot be read or written
    │       └── DramFullError       its file system is full (ENOSPC, EDQUOT)
    ├── LinkError                   mktme.datapath.link: a hello that is refused
    ├── WriteTrackingError          mktme.datapath.uffd: the kernel or its permissions lack it
    ├── ProtocolError               mktme.service.wire: not a message of the control protocol
    ├── ServiceError                mktme.service.client: the engine could not be asked
    │   ├── EngineGoneError         its process or connection ended
    │   └── EngineRefusedError      it answered with a failure
    ├── EnvironmentUnfitError       mktme.vm.host: this machine lacks something
    ├── UsageError                  mktme.vm.host: an option value that makes no sense
    ├── UnknownGuestError           mktme.vm.images: no recipe of that name
    ├── ImageError                  mktme.vm.images: a guest image that cannot be built or trusted
    ├── VmError                     mktme.vm.console: a guest that did not do as expected
    │   ├── VmLostError             it is gone, or silent
    │   └── GuestCommandError       a command in it failed
    └── GuestRamError               mktme.proof.guest_ram: RAM that cannot be read
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


class DramFullError(DramError):
    """The DRAM image's file system is full; nothing written earlier is lost."""

    def __init__(self, message: str, *, address: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.address = address
