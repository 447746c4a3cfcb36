# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that holds a deployment's platform and VMs.

A platform and its VMs live as long as the process that started them (`mktme.vm.platform`), so one
has to stay when ``apply`` is done. ``apply`` starts it where there is none, in a session of its
own; it listens on a UNIX socket in its private directory, and only its own user gets an answer. It
ends when it holds nothing any more, when its engine ends, and on SIGTERM. `mktme.vm.reaper` clears
up after one that is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mktme.engine.errors import MktmeError
from mktme.provision import wire
from mktme.provision.apply import Bench, FetchKey, Narrator, OpenBench, Provisioner
from mktme.provision.errors import ProvisionError
from mktme.provision.guests import PlatformBench
from mktme.provision.keys import fetch_key
from mktme.provision.tenants import Deployment
from mktme.service.peer import credentials
from mktme.vm.reaper import process_dir

log = logging.getLogger(__name__)

LOG_FILE: Final = "provision.log"
# accept(2): no descriptor is free now, or the peer went at once.
_PASSING: Final = (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED)
_ACCEPT_RETRY_S: Final = 0.5
_END_TIMEOUT_S: Final = 60.0


class Daemon:
    """Answers clients, one operation at a time, until it holds nothing.

    Args:
        path: of the socket; its directory is private.
        open_bench: brings a platform up.
        fetch_key: as `Provisioner` has it.
    """

    def __init__(self, path: Path, open_bench: OpenBench, fetch_key: FetchKey) -> None:
        self._path = path
        self._open_bench = open_bench
        self._provisioner = Provisioner(self._opened, fetch_key)
        self._operation = threading.Lock()
        self._clients = 0
        self._changed = threading.Condition()
        self._ending = False

    def run(self, first: socket.socket) -> None:
        """Serve until the end; `first` is the connection of who started this process."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            listener = stack.enter_context(_listening(self._path))
            threading.Thread(
                target=self._accept, args=(listener,), name="provision-accept", daemon=True
            ).start()
            self._welcome(first)
            with self._changed:
                self._changed.wait_for(lambda: self._ending)

    def end(self) -> None:
        """Have `run` end, from any thread."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def _close(self) -> None:
        """Take all down; who is still at it finds that nothing goes any more."""
        self.end()
        bench = self._provisioner.bench
        if bench is not None:
            bench.abort()
        if not self._operation.acquire(timeout=_END_TIMEOUT_S):
            log.error("an operation did not end")  # the reaper ends what is left
            return
        self._provisioner.close()

    def _opened(self, deployment: Deployment, tell: Narrator) -> Bench:
        bench = self._open_bench(deployment, tell)

        def watch() -> None:
            bench.wait_ended()
            with self._operation:  # whoever opens it has to be done with that
                is_ours = self._provisioner.bench is bench
            if is_ours:
                log.error("the engine ended")
                self.end()

        threading.Thread(target=watch, name="provision-engine", daemon=True).start()
        return bench

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if error.errno not in _PASSING:
                    return  # it was closed
                with self._changed:  # a client that leaves gives its descriptor back
                    self._changed.wait(_ACCEPT_RETRY_S)
                continue
            with contextlib.suppress(OSError):  # it is gone already
                if credentials(connection).uid == os.geteuid():
                    self._welcome(connection)
                    continue
            connection.close()

    def _welcome(self, connection: socket.socket) -> None:
        with self._changed:
            self._clients += 1
        threading.Thread(
            target=self._serve, args=(connection,), name="provision-client", daemon=True
        ).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._answer_all(connection)
        except (OSError, ProvisionError) as error:
            log.info("a client is gone: %s", error)
        finally:
            with self._changed:
                self._clients -= 1
                if not self._clients and self._provisioner.bench is None:
                    self._ending = True
                    self._changed.notify_all()

    def _answer_all(self, connection: socket.socket) -> None:
        with contextlib.closing(wire.requests(connection)) as requests:
            hello = next(requests, None)
            with self._changed:
                if self._ending or hello is None:
                    return  # who comes now starts another provisioner
            if hello != wire.Hello():
                raise ProvisionError("no hello of this version")
            wire.send(connection, wire.Ready())
            for request in requests:
                wire.send(connection, self._answer(connection, request))

    def _answer(self, connection: socket.socket, request: wire.Request) -> wire.Reply:
        if not self._operation.acquire(blocking=False):
            what, hint = "is at work for somebody else", "try again when that is done"
            if self._ending:
                what, hint = "ends, and all that it held", "mktme provision apply makes it anew"
            return wire.Failure(
                error=ProvisionError.__name__, message=f"the provisioner {what}", hint=hint
            )
        try:
            return self._do(connection, request)
        except MktmeError as error:
            return wire.Failure(error=type(error).__name__, message=str(error), hint=error.hint)
        except Exception as error:  # a fault of ours; a client that waits is to know
            log.exception("a request failed")
            return wire.Failure(error="", message=f"{type(error).__name__}: {error}")
        finally:
            self._operation.release()

    def _do(self, connection: socket.socket, request: wire.Request) -> wire.Reply:
        provisioner, tell = self._provisioner, _Teller(connection)
        match request:
            case wire.Apply(deployment=deployment, only=only):
                results = provisioner.apply(
                    deployment, tell, only, lambda: tell.is_heard and not self._ending
                )
                state = provisioner.state()
                if not state.vms:
                    provisioner.close()
                return wire.Applied(results=results, state=state)
            case wire.MakePlan(deployment=deployment, only=only):
                plan = provisioner.plan(deployment, only)
                return wire.Planned(plan=plan, state=provisioner.state())
            case wire.Destroy():
                return wire.Applied(results=provisioner.destroy(tell), state=provisioner.state())
            case wire.GetState():
                return wire.StateIs(state=provisioner.state())
        raise ProvisionError("a second hello")


class _Teller:
    """Tells a client how it goes on; one that is gone is not waited for.

    Attributes:
        is_heard: whether the client is there still.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self.is_heard = True

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        self._send(wire.StepBegan(what=what))
        try:
            yield
        except BaseException:
            self._send(wire.StepEnded(well=False))
            raise
        self._send(wire.StepEnded(well=True))

    def notice(self, line: str) -> None:
        log.info("%s", line)
        self._send(wire.Noticed(line=line))

    def _send(self, message: wire.Progress) -> None:
        with self._sending:  # a platform notices things in threads of its own
            try:
                wire.send(self._connection, message)
            except OSError:
                self.is_heard = False


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        try:
            path.chmod(0o600)  # nobody connects before `listen`
            listener.listen()
            yield listener
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


def main() -> int:
    """Run until there is nothing to hold any more."""
    parser = argparse.ArgumentParser(prog="mktme-provision", description=__doc__)
    parser.add_argument("--name", required=True, help="of the deployment")
    parser.add_argument("--client-fd", type=int, required=True, help="inherited: the first client")
    arguments = parser.parse_args()
    first = socket.socket(fileno=arguments.client_fd)
    directory = process_dir()
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        filename=directory / LOG_FILE,
    )
    daemon = Daemon(directory / wire.socket_name(arguments.name), PlatformBench.open, fetch_key)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: daemon.end())
    daemon.run(first)
    return 0


if __name__ == "__main__":
    sys.exit(main())
