# SPDX-License-Identifier: GPL-2.0-or-later
"""The serial console, with a real shell at the other end in a guest's stead."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol

import pytest

from mktme.vm.console import (
    Console,
    GuestCommandError,
    GuestPanicError,
    VmError,
    VmLostError,
)

DEADLINE_S = 20.0
SOON_S = 0.1


class Boot(Protocol):
    """Starts a shell script as the guest, and a console on it; `said` comes before the script."""

    def __call__(
        self, script: str, said: bytes = b""
    ) -> tuple[Console, subprocess.Popen[bytes]]: ...


@pytest.fixture
def transcript(tmp_path: Path) -> Path:
    return tmp_path / "transcript.log"


@pytest.fixture
def boot(tmp_path: Path, transcript: Path) -> Iterator[Boot]:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "console"))
        listener.listen()

        def start(script: str, said: bytes = b"") -> tuple[Console, subprocess.Popen[bytes]]:
            console = stack.enter_context(closing(Console(tmp_path / "console", transcript)))
            line, _ = listener.accept()
            with line:
                line.sendall(said)
                command = ["/bin/sh", "-c", script]
                end = line.fileno()
                guest = subprocess.Popen(command, stdin=end, stdout=end, stderr=end)
            stack.enter_context(guest)
            stack.callback(guest.kill)
            return console, guest

        yield start


@pytest.fixture
def console(boot: Boot) -> Console:
    return boot("exec sh")[0]


def test_boot_is_waited_for(boot: Boot) -> None:
    console, _ = boot("echo booting; printf '@mktme ready\\r\\n'; exec sh")
    console.wait_ready(DEADLINE_S)
    assert console.run("echo hello", DEADLINE_S).output == "hello\n"


def test_command_gives_its_output_and_status(console: Console) -> None:
    result = console.run("echo one; echo two", DEADLINE_S)
    assert (result.output, result.status) == ("one\ntwo\n", 0)
    assert console.run("true", DEADLINE_S).output == ""
    assert console.run("(exit 42)", DEADLINE_S, check=False).status == 42


def test_line_ends_of_a_terminal_are_made_plain(console: Console) -> None:
    assert console.run(r"printf 'a\r\nb\r\n'", DEADLINE_S).output == "a\nb\n"


def test_commands_do_not_see_each_others_output(console: Console) -> None:
    for number in range(20):
        assert console.run(f"echo {number}", DEADLINE_S).output == f"{number}\n"


def test_much_output_arrives_whole(console: Console) -> None:
    assert len(console.run("seq 20000", DEADLINE_S).output.split()) == 20000


def test_output_that_is_not_utf_8(console: Console) -> None:
    assert console.run(r"printf '\377'", DEADLINE_S).output == "\ufffd"


def test_failed_command_is_an_error(console: Console) -> None:
    with pytest.raises(GuestCommandError) as caught:
        console.run("echo first; echo the reason; (exit 3)", DEADLINE_S)
    assert "exited with 3 in the guest: the reason" in str(caught.value)
    with pytest.raises(GuestCommandError, match="exited with 1 in the guest: no output"):
        console.run("false", DEADLINE_S)
    assert console.run("echo still here", DEADLINE_S).output == "still here\n"


def test_output_like_a_token_is_no_token(console: Console) -> None:
    result = console.run("echo @mktme-0123456789abcdef 0", DEADLINE_S)
    assert result.output == "@mktme-0123456789abcdef 0\n"


def test_echo_of_the_command_is_not_its_success(boot: Boot) -> None:
    """A terminal echoes; a guest that hangs then must not pass for one that is done."""
    console, _ = boot("exec cat")
    with pytest.raises(VmLostError, match=r"running 'true': no answer in 0\.1 s"):
        console.run("true", SOON_S)


def test_guest_that_never_boots_is_lost(boot: Boot) -> None:
    console, _ = boot("exec cat", said=b"loading\r\nKernel panic\r\n")
    with pytest.raises(VmLostError) as caught:
        console.wait_ready(SOON_S)
    assert "lost while booting: no answer in 0.1 s" in str(caught.value)
    assert "it last said: loading / Kernel panic" in str(caught.value)


def test_guest_that_dies_is_lost_at_once(boot: Boot) -> None:
    console, _ = boot("echo oops")
    with pytest.raises(VmLostError, match="while booting: its console ended; it last said: oops"):
        console.wait_ready(DEADLINE_S)


def test_guest_that_is_killed_during_a_command_is_lost(boot: Boot) -> None:
    console, guest = boot("exec sh")
    with pytest.raises(VmLostError, match="running 'kill': its console ended"):
        console.run("kill -9 $$", DEADLINE_S)
    assert guest.wait(DEADLINE_S) == -9
    with pytest.raises(VmLostError, match="console ended"):
        console.run("true", DEADLINE_S)


def test_end_is_waited_for(boot: Boot) -> None:
    console, guest = boot("exec sh")
    with pytest.raises(VmLostError, match=r"still there after 0\.1 s"):
        console.wait_end(SOON_S)
    console.send("exit 5")
    console.wait_end(DEADLINE_S)
    assert guest.wait(DEADLINE_S) == 5


def test_transcript_has_all_that_was_said(boot: Boot, transcript: Path) -> None:
    console, _ = boot("echo booting; echo '@mktme ready'; exec sh")
    console.wait_ready(DEADLINE_S)
    console.run("echo hello", DEADLINE_S)
    console.close()
    said = transcript.read_text()
    assert re.fullmatch(r"booting\n@mktme ready\nhello\n@mktme-[0-9a-f]{16} 0\n", said)


def test_guest_goes_on_while_nobody_looks(boot: Boot, transcript: Path) -> None:
    """What it says is more than a socket holds."""
    console, guest = boot("head -c 1000000 /dev/zero | tr '\\0' x; echo; echo done")
    assert guest.wait(DEADLINE_S) == 0
    assert console.wait_for("done\n", DEADLINE_S, "talking").endswith(b"xxx\ndone\n")
    assert transcript.stat().st_size == 1_000_006
    assert console.heard_at is not None


def test_what_is_said_while_nobody_looks_is_kept(boot: Boot) -> None:
    """A serial port says its bytes one by one."""
    said = 10_000
    loop = f"i=0; while [ $i -lt {said} ]; do printf x; i=$((i + 1)); done"
    console, guest = boot(f"{loop}; echo done")
    assert guest.wait(DEADLINE_S) == 0
    assert console.wait_for("done\n", DEADLINE_S, "talking") == said * b"x" + b"done\n"


LOGIN = """
echo 'Debian GNU/Linux 12 ttyS0'
while printf 'guest login: '; read -r user; do
    [ "$user" ] && break
done
printf 'Password: '; read -r password
if [ "$user:$password" != tester:secret ]; then echo 'Login incorrect'; exec sleep 100; fi
printf '\033[?2004htester@guest:~$ '
read -r line
set -- $line
exec sh -c "$(printf '%s' "$line" | sed "s/^[^']*'//; s/'$//; s/stty -echo; //")"
"""


def test_login_gives_a_shell(boot: Boot) -> None:
    console, _ = boot(LOGIN)
    console.log_in("tester", "secret", DEADLINE_S)
    assert console.run("echo it works", DEADLINE_S).output == "it works\n"


def test_login_that_is_refused_is_no_shell(boot: Boot) -> None:
    console, _ = boot(LOGIN)
    with pytest.raises(VmLostError, match="logging in on its console"):
        console.log_in("tester", "wrong", SOON_S)


def test_no_console_there(tmp_path: Path, transcript: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Console(tmp_path / "none", transcript)


PANIC = "Kernel panic - not syncing: Fatal machine check"


def test_guest_that_panics_is_lost_at_once(boot: Boot) -> None:
    """It reboots, and would never finish the command."""
    console, _ = boot(f"read x; printf 'a\\r\\nMCE\\r\\n{PANIC}\\r\\nBIOS\\r\\n'; exec sleep 60")
    with pytest.raises(GuestPanicError, match=f"running 'true': {PANIC}$") as caught:
        console.run("true", DEADLINE_S)
    assert caught.value.said == f"a\nMCE\n{PANIC}\n"


def test_reboot_after_a_panic_can_be_waited_for(boot: Boot) -> None:
    console, _ = boot(f"printf '{PANIC}\\r\\n@mktme ready\\r\\n'; exec sh")
    console.wait_ready(DEADLINE_S)
    assert console.run("echo hello", DEADLINE_S).output == "hello\n"


def test_lost_guests_are_guest_errors() -> None:
    assert issubclass(VmLostError, VmError)
    assert issubclass(GuestCommandError, VmError)
