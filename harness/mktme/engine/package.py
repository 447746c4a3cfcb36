# SPDX-License-Identifier: GPL-2.0-or-later
"""One CPU package's memory encryption: its registers, keys, and the controller in front of DRAM.

Constructing it is power-on: the firmware's sequence has run and TME is locked, or it raises.
"""

from __future__ import annotations

import enum

from mktme.engine import firmware, pconfig
from mktme.engine.controller import MemoryController
from mktme.engine.dram import Dram
from mktme.engine.errors import AddressError, EngineError
from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import KeyTable
from mktme.engine.pconfig import Command, Status
from mktme.engine.rng import Rng
from mktme.engine.tme import Tme
from mktme.engine.xts import Algorithm, wipe


class PowerEvent(enum.Enum):
    """How a platform comes to run its firmware again.

    Whatever the event, all KeyIDs lose their keys and their pages, and registers are unlocked,
    then set up and locked by firmware. DRAM keeps its ciphertext.
    """

    POWER_CYCLE = "power-cycle"
    """Power off and on. A TME key saved for standby is lost too: its storage is the package's."""
    WARM_RESET = "warm-reset"
    """CPU reset. Firmware asks for a new TME key."""
    STANDBY = "standby"
    """To standby (S3) and back. Firmware asks for the TME key that was saved, if one was."""


class PconfigError(EngineError):
    """A KeyID could not be programmed.

    Attributes:
        status: what PCONFIG said.
    """

    def __init__(self, status: Status, keyid: int) -> None:
        super().__init__(f"KeyID {keyid}: PCONFIG failed with {status.name}")
        self.status = status


class Package:
    """See the module's docstring.

    Args:
        dram: the image; nothing else writes to it.
        config: what firmware sets up.
        rng: makes keys; None for the kernel's random numbers behind health tests.

    Raises:
        AddressError: DRAM is larger than what addresses reach.
        FirmwareError: TME could not be enabled.
    """

    def __init__(self, dram: Dram, config: PlatformConfig, rng: Rng | None = None) -> None:
        self.config = config
        self.keys = KeyTable(rng)
        self.tme = Tme(self.keys, maxphyaddr=config.physical_address_bits, revision=config.revision)
        self.controller = MemoryController(dram, self.keys, config.physical_address_bits)
        self._boot(resume=False)
        if dram.size_bytes > 1 << self.controller.address_bits:
            raise AddressError(
                f"{dram.size_bytes} bytes of DRAM need more than the "
                f"{self.controller.address_bits} address bits that {config.keyid_bits} KeyID bits "
                f"of {config.physical_address_bits} leave",
                address=dram.size_bytes,
            )

    def power(self, event: PowerEvent) -> None:
        """Let a power event happen, and firmware run.

        Raises:
            FirmwareError: TME could not be enabled; memory cannot be used then.
        """
        self.tme.reset()
        self.keys.reset(keep_saved_key=event is not PowerEvent.POWER_CYCLE)
        self.controller.reset()
        self._boot(resume=event is PowerEvent.STANDBY)

    def rdmsr(self, msr: int) -> int:
        """Read one of the package's registers; see `Tme.rdmsr`."""
        return self.tme.rdmsr(msr)

    def wrmsr(self, msr: int, value: int) -> None:
        """Write one of the package's registers; see `Tme.wrmsr`."""
        self.tme.wrmsr(msr, value)
        self.controller.exclude(self.tme.exclusion)

    def pconfig(self, leaf: int, address: int, program: bytes | bytearray | memoryview) -> Status:
        """Execute PCONFIG; see `mktme.engine.pconfig.execute`."""
        return pconfig.execute(self.tme, self.keys, leaf, address, program)

    def program(
        self,
        keyid: int,
        command: Command,
        algorithm: Algorithm,
        key: bytearray | memoryview | None = None,
    ) -> None:
        """Program a KeyID by way of PCONFIG; arguments as for `mktme.engine.pconfig.encode`.

        Raises:
            GeneralProtection, PconfigError: it is refused; the KeyID keeps what it had.
            KeyMaterialError: the key must not be used.
        """
        structure = pconfig.encode(keyid, command, algorithm, key)
        try:
            status = self.pconfig(pconfig.MKTME_KEY_PROGRAM, 0, structure)
        finally:
            wipe(structure)
        if status is not Status.PROG_SUCCESS:
            raise PconfigError(status, keyid)

    def _boot(self, *, resume: bool) -> None:
        firmware.boot(self.tme, self.config, resume=resume)
        self.controller.exclude(self.tme.exclusion)
