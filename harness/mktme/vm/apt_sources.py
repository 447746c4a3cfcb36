# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine's own apt sources, turned to another suite: same mirror, same keys, same options."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from mktme.vm.image_cache import APT_HINT, ImageError, host_release, run_tool

_KEPT_OPTIONS = re.compile(
    r"Acquire::(https?::|Retries|Check-Date|Check-Valid-Until|Max-FutureTime)"
)
_POCKETS = ("", "-updates", "-security")


@dataclass(frozen=True, slots=True)
class AptSources:
    """Entries for apt, in both of its formats (sources.list(5)); one of them may be empty."""

    deb822: str
    one_line: str


def sources_for(suite: str) -> AptSources:
    """The entries that this machine has its own release from, with their suites replaced.

    Backports are left out. Entries are read as apt understood them: it is asked which of its files
    has an index of this release, and at what place.

    Args:
        suite: the other suite's codename, "trixie"; it is looked for on the same mirror.

    Raises:
        ImageError: apt has no index of this machine's release.
    """
    release = host_release().split()[-1]
    wanted = {release + pocket: suite + pocket for pocket in _POCKETS}
    suites: dict[str, dict[str, str]] = defaultdict(dict)
    listed = run_tool(
        "apt-get",
        "indextargets",
        "--format",
        "$(CODENAME) $(RELEASE) $(SOURCESENTRY)",
        "Created-By: Packages",
        "Component: main",
    )
    for line in listed.splitlines():
        codename, written, entry = line.split(maxsplit=2)
        if codename in wanted:
            suites[entry][written] = wanted[codename]
    if not suites:
        raise ImageError(f"apt has no index of {release}", hint=APT_HINT)
    stanzas, lines = [], []
    for entry, replaced in suites.items():
        name, _, number = entry.rpartition(":")
        text = Path(name).read_text()
        if name.endswith(".sources"):
            stanzas.append(_stanza(text, int(number), replaced))
        else:
            (written,) = replaced
            line = text.splitlines()[int(number) - 1]
            lines.append(re.sub(rf"(?<=\s){re.escape(written)}(?=\s)", replaced[written], line))
    return AptSources("\n\n".join(stanzas), "\n".join(lines))


def acquire_options() -> str:
    """How this machine's apt fetches, for apt.conf(5): proxies, retries, checks of dates."""
    dump = run_tool("apt-config", "dump", "--format", '%F "%v";%n', "Acquire")
    return "".join(f"{line}\n" for line in dump.splitlines() if _KEPT_OPTIONS.match(line))


def _stanza(text: str, number: int, suites: dict[str, str]) -> str:
    """The entry of that number in a deb822 file, for binary packages of `suites`' values."""
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    stanza = re.split(r"\n(?:[ \t]*\n)+", "\n".join(lines).strip("\n"))[number - 1]
    for field, value in (("Types", "deb"), ("Suites", " ".join(dict.fromkeys(suites.values())))):
        stanza = re.sub(rf"(?im)^{field}:.*(\n[ \t].*)*", f"{field}: {value}", stanza)
    return stanza
