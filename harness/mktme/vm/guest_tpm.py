# SPDX-License-Identifier: GPL-2.0-or-later
"""Have a guest answer a verifier's challenge with its TPM, by Debian's tpm2-tools and nothing else.

::

    guest                                     verifier
    EK and AK, their public parts       ──►   the EK is the one in the platform's evidence?
                                        ◄──   a secret, encrypted for a TPM that has both
    the secret, found by the TPM, is what
    the AK quotes the PCRs with; and the
    event log                           ──►   mktme.attest.tpm_quote.verify_quote
"""

from __future__ import annotations

import base64
import binascii
import shlex
from collections.abc import Callable
from typing import Final

from mktme.attest.marshal import TpmFormatError
from mktme.attest.tpm_keys import Challenge, TpmKey, make_credential
from mktme.attest.tpm_quote import QUOTED_PCRS, TpmQuote, quoted_keys
from mktme.vm.console import VmError
from mktme.vm.shell import Shell

EVENT_LOG: Final = "/sys/kernel/security/tpm0/binary_bios_measurements"
_EK_HANDLE: Final = 0x81010001
"""Where the EK of a TPM is by convention (TCG TPM 2.0 Provisioning Guidance, 7.8)."""
_TIMEOUT_S: Final = 120.0
_DIRECTORY: Final = "/run/mktme-quote"

# What tools say goes where it does not mix with what is asked for, and is told if one fails.
_SAID: Final = "set -e; exec 3>&2 2>said; trap '[ $? = 0 ] || cat said >&3' EXIT"
_KEYS: Final = f"""\
rm -rf {{directory}}; mkdir -m 700 {{directory}}; cd {{directory}}; {_SAID}
tpm2_readpublic -c {_EK_HANDLE:#x} -o ek.pub >/dev/null
tpm2_createak -C {_EK_HANDLE:#x} -c ak.ctx -G ecc -g sha256 -s ecdsa -u ak.pub >/dev/null
base64 -w 0 ek.pub; echo; base64 -w 0 ak.pub; echo
"""
_QUOTE: Final = f"""\
cd {{directory}}; {_SAID}
echo {{credential}} | base64 -d >credential
tpm2_startauthsession --policy-session -S session
tpm2_policysecret -S session -c e >/dev/null
tpm2_activatecredential -c ak.ctx -C {_EK_HANDLE:#x} -i credential -o secret \\
    -P session:session >/dev/null
tpm2_flushcontext session
tpm2_quote -c ak.ctx -l sha256:{",".join(map(str, QUOTED_PCRS))} -g sha256 \\
    -q "$(od -An -v -tx1 secret | tr -d ' \\n')" -m message -s signature >/dev/null
for file in message signature {{event_log}}; do base64 -w 0 $file; echo; done
cd /; rm -rf {{directory}}
"""


def take_quote(
    shell: Shell,
    challenge: Callable[[TpmKey, TpmKey], Challenge] = make_credential,
    *,
    event_log: str = EVENT_LOG,
    directory: str = _DIRECTORY,
) -> tuple[TpmQuote, bytes]:
    """Challenge a guest's TPM and have it quote its PCRs.

    Args:
        shell: a root shell in a guest that has tpm2-tools.
        challenge: the verifier's part, given the EK and the AK.
        event_log: where the guest has its event log.
        directory: where it may keep files meanwhile.

    Returns:
        The quote, and the secret that `verify_quote` wants as the nonce.

    Raises:
        VmError: it has no TPM or no tpm2-tools, or its TPM refuses the challenge.
    """
    endorsement_key, attestation_key = _lines(shell, _KEYS.format(directory=directory), 2)
    try:
        asked = challenge(*quoted_keys(endorsement_key, attestation_key))
    except TpmFormatError as error:
        raise VmError(f"the guest's TPM: {error}", hint=error.hint) from error
    command = _QUOTE.format(
        directory=directory,
        credential=base64.b64encode(asked.credential).decode(),
        event_log=shlex.quote(event_log),
    )
    message, signature, log = _lines(shell, command, 3)
    quote = TpmQuote(
        endorsement_key=endorsement_key,
        attestation_key=attestation_key,
        message=message,
        signature=signature,
        event_log=log,
    )
    return quote, asked.secret


def _lines(shell: Shell, command: str, count: int) -> list[bytes]:
    """The files that a command writes, a line in base64 each."""
    result = shell.run(command, _TIMEOUT_S, check=False)
    lines = result.output.split()
    try:
        if result.status == 0 and len(lines) == count:
            return [base64.b64decode(line, validate=True) for line in lines]
    except binascii.Error:
        pass
    said = result.output.strip()[-300:]
    raise VmError(
        f"the guest's TPM gave no quote: {said}",
        hint="it needs --vtpm, and the package tpm2-tools",
    )
