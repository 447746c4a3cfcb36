# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel modules of a guest: what they depend on, and the ``modules.dep`` that modprobe(8) wants.

A kernel package has no ``modules.dep`` (its postinst runs depmod), so it is made of what each
module's .modinfo section says. Modules may be compressed (.ko.xz), and stay so.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_MODINFO_DEPENDS: Final = re.compile(rb"\0depends=([^\0]*)\0")


def module_name(path: str) -> str:
    """A module's name as the kernel has it, which knows no hyphens (modprobe(8))."""
    return Path(path).name.split(".ko")[0].replace("-", "_")


def depends_on(module: bytes) -> list[str]:
    """The modules that a module needs: ``depends`` in its .modinfo section (modinfo(8))."""
    if module.startswith(b"\xfd7zXZ\0"):
        module = lzma.decompress(module)
    found = _MODINFO_DEPENDS.search(module)
    names = "" if found is None else found[1].decode()
    return [module_name(name) for name in names.split(",") if name]


def _dependencies(modules: dict[str, bytes]) -> dict[str, list[str]]:
    """For each module, by path: the paths of all that it needs, each before what needs it."""
    paths = {module_name(path): path for path in modules}
    depends = {name: depends_on(modules[path]) for name, path in paths.items()}

    def add(name: str, needed: dict[str, None]) -> None:
        for other in depends[name]:
            if other not in needed:
                add(other, needed)
                needed[other] = None

    order: dict[str, list[str]] = {}
    for name, path in paths.items():
        needed: dict[str, None] = {}
        add(name, needed)
        order[path] = [paths[other] for other in needed]
    return order


def is_closure(modules: dict[str, bytes], names: Iterable[str]) -> bool:
    """Whether `modules`, by path, are those of `names` and what they depend on, and no others."""
    depends = {module_name(path): depends_on(data) for path, data in modules.items()}
    reached = {module_name(name) for name in names}
    todo = list(reached)
    while todo:
        new = set(depends.get(todo.pop(), ())) - reached
        reached |= new
        todo += new
    return reached == depends.keys()


def module_files(modules: dict[str, bytes]) -> dict[str, bytes]:
    """Modules, by path, with the ``modules.dep`` beside them that tells modprobe(8) their order."""
    files = dict(modules)
    lines: dict[str, list[str]] = {}
    for path, needed in sorted(_dependencies(modules).items()):
        # lib/modules/RELEASE/kernel/...; in modules.dep, without the first three.
        parents, inner = path.split("/")[:3], [one.split("/", 3)[3] for one in (path, *needed)]
        # What is loaded first comes last (modules.dep(5)).
        line = " ".join((f"{inner[0]}:", *reversed(inner[1:])))
        lines.setdefault("/".join(parents), []).append(line)
    for directory, told in lines.items():
        files[f"{directory}/modules.dep"] = "".join(f"{line}\n" for line in told).encode()
    return files
