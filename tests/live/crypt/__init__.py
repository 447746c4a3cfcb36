# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest `crypt`: guest `tiny` that has dm-crypt, and a program of ours that sets it up.

It is no recipe of its own in ``guest-images``: nobody but the tests has a use for it.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from mktme.vm.images import RECIPES_DIR, GuestImage, cache_dir, ensure

_CACHE = cache_dir()  # the user's, whatever a test makes of it: there it stays
_MODULES = '"virtio_pci", "virtio_balloon", "virtio_blk",'


def crypt_guest(directory: Path) -> GuestImage:
    """Build it, unless the cache has it.

    Args:
        directory: for its recipe.
    """
    recipe = directory / "recipes" / "crypt"
    shutil.copytree(RECIPES_DIR / "tiny", recipe)
    text = (recipe / "recipe.toml").read_text()
    assert _MODULES in text
    text = text.replace(_MODULES, f'{_MODULES} "dm_crypt", "xts", "ecb",')
    (recipe / "recipe.toml").write_text(f'{text}"bin/dmcrypt" = "dmcrypt"\n')
    source = Path(__file__).with_name("dmcrypt.c")
    command = ["gcc", "-static", "-s", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-o", "dmcrypt", source.absolute()], cwd=recipe, check=True)
    return ensure("crypt", recipes=recipe.parent, cache=_CACHE)
