# SPDX-License-Identifier: GPL-2.0-or-later
"""Start the engine process; its owner does this, with one end of a socket pair (`client.py`)."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import sys
from pathlib import Path

import msgspec

from mktme.attest.identity import Identity
from mktme.engine.dram import Dram
from mktme.engine.errors import MktmeError
from mktme.engine.firmware import PlatformConfig
from mktme.service import wire
from mktme.service.audit import AUDIT_FILE, AuditLog
from mktme.service.custody import harden
from mktme.service.server import EngineServer


def main() -> int:
    """Run the engine until its owner is gone."""
    parser = argparse.ArgumentParser(prog="mktme-engine", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="private directory, 0700")
    parser.add_argument("--dram", type=Path, required=True, help="the DRAM image to create")
    parser.add_argument("--dram-bytes", type=int, required=True)
    parser.add_argument("--platform", default="{}", help="what firmware sets up: JSON")
    parser.add_argument("--audit", type=Path, help="audit log; none: in the private directory")
    parser.add_argument("--ca", type=Path, help="platform CA's directory; none: one of its own")
    parser.add_argument("--owner-fd", type=int, required=True, help="inherited socket of the owner")
    parser.add_argument("--peer-uid", type=int, action="append", default=[])
    parser.add_argument("--shared-ownership", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    owner = socket.socket(fileno=arguments.owner_fd)
    try:
        custody = harden()
        identity = Identity.create(arguments.ca)
        with (
            AuditLog(arguments.audit or arguments.run_dir / AUDIT_FILE) as audit,
            Dram.create(arguments.dram, arguments.dram_bytes) as dram,
        ):
            server = EngineServer(
                arguments.run_dir,
                dram,
                msgspec.json.decode(arguments.platform, type=PlatformConfig),
                custody,
                audit,
                frozenset(arguments.peer_uid),
                shared_ownership=arguments.shared_ownership,
                identity=identity,
            )
            asyncio.run(server.serve(owner))
    except (MktmeError, OSError, ValueError) as error:
        # The owner is waiting for the answer to its Hello: this is it.
        hint = error.hint if isinstance(error, MktmeError) else None
        failure = wire.Failure(error=type(error).__name__, message=str(error), hint=hint)
        owner.sendall(wire.frame(failure))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
