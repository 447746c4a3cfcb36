# SPDX-License-Identifier: GPL-2.0-or-later
"""Is a guest's software what its packages hold."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from mktme.vm.console import VmError
from mktme.vm.disk_images import DiskImage, packaged_files
from mktme.vm.platform import Vm

_TIMEOUT_S: Final = 300.0
_DIFFERS: Final = re.compile(r"^(.*): FAILED(?: open or read)?$", re.M)


def changed_files(vm: Vm, only: Collection[str] = ()) -> tuple[int, list[str]]:
    """Compare a guest's files, as it reads them, with the checksums of Debian's packages.

    The checksums are those that were noted when the image was built: the guest's own database of
    them is not asked.

    Args:
        vm: a guest that boots a disk of ours, up.
        only: paths to look at; all that packages have when empty.

    Returns:
        How many files were looked at, and the paths of those that differ or are missing.

    Raises:
        VmError: it is no such guest, or does not answer.
    """
    image = vm.config.image
    if not isinstance(image, DiskImage) or image.manifest is None:
        raise VmError(f"{vm.name}: nothing tells what its packages hold")
    lines = packaged_files(image).read_text().splitlines(keepends=True)
    if only:
        lines = [line for line in lines if line.split(maxsplit=1)[1].strip() in only]
    if not lines:
        raise VmError(f"{vm.name}: no package has such a file")
    result = vm.domain.ssh.run(
        "md5sum --check --quiet 2>/dev/null",
        _TIMEOUT_S,
        check=False,
        stdin="".join(lines).encode(),
    )
    differ = _DIFFERS.findall(result.output)
    if result.status != 0 and not differ:
        raise VmError(f"{vm.name}: its files cannot be compared: {result.output.strip()[-200:]}")
    return len(lines), differ
