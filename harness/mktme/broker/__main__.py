# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m mktme.broker``: the commands of `mktme broker`, on a machine without libvirt."""

from __future__ import annotations

import sys

from mktme.broker.errors import BrokerSetupError
from mktme.cli_broker import broker_app
from mktme.cli_output import err
from mktme.engine.errors import MktmeError
from mktme.engine.text import shown


def main() -> None:
    """Entry point: errors and exit codes as `mktme` has them."""
    try:
        broker_app(prog_name="python -m mktme.broker")
    except MktmeError as error:
        for line, style in ((f"mktme: {error}", "red"), (f"  hint: {error.hint}", "")):
            if error.hint is not None or style:
                err.print(shown(line), style=style, markup=False, highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, BrokerSetupError) else 4)


if __name__ == "__main__":
    main()
