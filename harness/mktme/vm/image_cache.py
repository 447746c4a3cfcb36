# SPDX-License-Identifier: GPL-2.0-or-later
"""What every kind of guest image has in common: recipes, a cache, builds that are whole or absent.

::

    MktmeError
    ├── UnknownGuestError       no recipe of that name
    └── ImageError              an image cannot be built, or is not what its packages hold
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from mktme.engine.errors import MktmeError

RECIPES_DIR = Path(__file__).parents[3] / "guest-images"

APT_HINT = "refresh apt's index with `sudo apt-get update`; check its sources and the network"

Progress = Callable[[str], None]
_Recipe = TypeVar("_Recipe")


class UnknownGuestError(MktmeError):
    """There is no recipe for a guest of this name."""

    def __init__(self, guest: str, known: tuple[str, ...]) -> None:
        super().__init__(f"unknown guest {guest!r}", hint=f"known guests: {', '.join(known)}")
        self.guest = guest
        self.known = known


class ImageError(MktmeError):
    """An image cannot be built, or is not what its packages hold."""


def cache_dir() -> Path:
    """Where images are kept, by the XDG base directory specification."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "mktme" / "images"


def known_guests(recipes: Path = RECIPES_DIR) -> tuple[str, ...]:
    """The names of the guests that there are recipes for, of either kind, sorted."""
    return tuple(sorted(recipe.parent.name for recipe in recipes.glob("*/recipe.toml")))


def is_disk_guest(name: str, recipes: Path = RECIPES_DIR) -> bool:
    """Whether a guest boots from a disk, not an initramfs: its recipe names a `suite`.

    Raises:
        UnknownGuestError: there is no such recipe.
        ImageError: the recipe is no TOML.
    """
    return "suite" in _read_toml(name, recipes)


def read_recipe(name: str, recipes: Path, kind: type[_Recipe]) -> _Recipe:
    """Read a guest's recipe.

    Raises:
        UnknownGuestError: there is no such recipe.
        ImageError: it is not as `kind` has it.
    """
    try:
        return msgspec.convert(_read_toml(name, recipes), kind)
    except msgspec.ValidationError as error:
        raise ImageError(f"{recipes / name / 'recipe.toml'}: {error}") from error


def _read_toml(name: str, recipes: Path) -> dict[str, object]:
    if name not in known_guests(recipes):
        raise UnknownGuestError(name, known_guests(recipes))
    path = recipes / name / "recipe.toml"
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ImageError(f"{path}: {error}") from error


def build_key(build_format: int, files: Iterable[Path]) -> str:
    """Name of what would be built: the same key, the same files on the same release."""
    digest = hashlib.sha256(f"{build_format} {host_release()}".encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def host_release() -> str:
    """The Debian release that images are built on: "debian bookworm"."""
    release = platform.freedesktop_os_release()
    return f"{release['ID']} {release.get('VERSION_CODENAME', '')}".strip()


def ensure_built(image_dir: Path, build: Callable[[Path], None]) -> None:
    """Have `build` fill a directory that becomes `image_dir`, unless that is there already.

    Raises:
        ImageError: from `build`, or the cache cannot be written.
    """
    cache = image_dir.parent
    try:
        if not image_dir.exists():
            with _build_dir(cache) as build_dir:
                # Another process may have built it while this one waited for the lock.
                if not image_dir.exists():
                    build(build_dir)
                    build_dir.rename(image_dir)
    except OSError as error:
        raise ImageError(
            f"cannot keep guest image {image_dir.name} in {cache}: {error.strerror}",
            hint="make room there, or set XDG_CACHE_HOME to another directory",
        ) from error


@contextmanager
def _build_dir(cache: Path) -> Iterator[Path]:
    """A directory to build in, on the cache's file system, while no other process builds.

    The lock goes with the process, so any other build directory is what a killed one left.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in cache.glob(".build-*"):
            shutil.rmtree(leftover)
        build_dir = Path(tempfile.mkdtemp(prefix=".build-", dir=cache))
        # QEMU may run as another user than the one who builds.
        build_dir.chmod(0o755)
        try:
            yield build_dir
        finally:
            shutil.rmtree(build_dir, ignore_errors=True)


def damaged(image_dir: Path, problem: str) -> ImageError:
    """The error for an image that is not as it was built."""
    return ImageError(
        f"guest image {image_dir.name}: {problem}",
        hint=f"remove {image_dir} and run again to rebuild it",
    )


def run_tool(*command: str, cwd: Path | None = None, stdin: bytes = b"") -> str:
    """Run one of Debian's tools and return what it printed.

    Raises:
        ImageError: it is missing, or failed; the message has its last word.
    """
    try:
        return subprocess.run(
            command, cwd=cwd, check=True, capture_output=True, input=stdin, env=tool_environment()
        ).stdout.decode(errors="replace")
    except FileNotFoundError as error:
        raise tool_missing(command[0]) from error
    except subprocess.CalledProcessError as error:
        complaints = error.stderr.decode(errors="replace").strip().splitlines()
        complaint = (complaints or ["no message"])[-1]
        raise ImageError(f"{' '.join(command)}: {complaint}", hint=APT_HINT) from error


def tool_environment() -> dict[str, str]:
    """The environment for Debian's tools: messages in English, and what is root's in the path."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return os.environ | {"LC_ALL": "C.UTF-8", "PATH": path}


def tool_missing(tool: str) -> ImageError:
    """The error for a tool that is not installed."""
    return ImageError(
        f"{tool} is missing",
        hint="guest images are built from Debian packages: use Debian 12 or 13, and `make setup`",
    )
