# SPDX-License-Identifier: GPL-2.0-or-later
"""All that crosses a process's sockets, recorded by strace(1)."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

END_TIMEOUT_S = 60

# The data of sockets, and no file's: the engine reads key files, which it should.
_CALLS = {
    "recvfrom": "in",
    "recvmsg": "in",
    "recvmmsg": "in",
    "sendto": "out",
    "sendmsg": "out",
    "sendmmsg": "out",
}
_LINE = re.compile(r"(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)", re.S)
_UNFINISHED = " <unfinished ...>"
_RESULT = re.compile(r".*\) += (-?\d+)(?: \w+ \(.*\))?", re.S)
_DATA = re.compile(r'(?:^\d+, |iov_base=)"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')


class RecordError(Exception):
    """No record can be made, or what strace wrote is not understood."""


@dataclass(frozen=True)
class Stream:
    """One direction of one socket: descriptor, and "in" or "out"."""

    descriptor: int
    direction: str


@contextlib.contextmanager
def recorded(pid: int, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Record a process from now on until it ends, or this does.

    Raises:
        RecordError: there is no strace, or it may not look into that process.
    """
    program = shutil.which("strace")
    if program is None:
        raise RecordError("there is no strace")
    command = [program, "-f", "-p", str(pid), "-e", f"trace={','.join(_CALLS)}"]
    # Each byte as \xNN, and no string cut short.
    command += ["-xx", "-s", str(64 << 20), "-o", str(path)]
    strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    try:
        said = strace.stderr.readline()
        if "attached" not in said:
            raise RecordError(said.strip() or "strace ended")
        yield strace
    finally:
        strace.terminate()  # it lets go of the process
        strace.communicate(timeout=END_TIMEOUT_S)


def read_record(path: Path) -> dict[Stream, bytes]:
    """What went through each socket.

    Raises:
        RecordError: a line is not understood, or data was left out.
    """
    streams: defaultdict[Stream, bytearray] = defaultdict(bytearray)
    begun: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if line.split(maxsplit=1)[1].startswith(("---", "+++")):  # signals and ends
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise RecordError(f"not understood: {line[:80]}")
        thread, resumed, call, arguments = match.groups()
        if arguments.endswith(_UNFINISHED):
            begun[thread] = arguments.removesuffix(_UNFINISHED)
            continue
        if resumed is not None:
            call, arguments = resumed, begun.pop(thread) + arguments
        result = _RESULT.fullmatch(arguments)
        if result is None:
            # The process ended within the call.
            if not arguments.endswith("= ?"):
                raise RecordError(f"not understood: {line[:80]} ... {line[-80:]}")
            continue
        count = int(result[1])
        if count <= 0:
            continue
        found = _DATA.findall(arguments)
        if any(cut for _data, cut in found):
            raise RecordError(f"cut short: {line[:80]}")
        data = bytes.fromhex("".join(text for text, _cut in found).replace("\\x", ""))
        if len(data) < count:
            raise RecordError(f"{len(data)} of {count} bytes: {line[:80]}")
        stream = Stream(int(arguments.split(",", 1)[0]), _CALLS[call])
        streams[stream] += data[:count]
    return {stream: bytes(data) for stream, data in streams.items()}
