# SPDX-License-Identifier: GPL-2.0-or-later
"""The key broker: releases tenants' keys and secrets to VMs whose evidence passes their policies.

It speaks the protocol of the Confidential Containers' Key Broker Service (Trustee,
kbs/docs/kbs_attestation_protocol.md, version 0.4): challenge, attestation, resource.

::

    cli_broker ── store      rows sealed with the master key, in SQLite
              ╰── serving    processes, TLS, sockets
                     ╰── app         HTTP: shapes, limits, problems (RFC 7807)
                           ╰── broker      every decision: challenge, attest, release
                                 ├── sessions    cookies, and nonces that serve once
                                 ├── audit       who got what, and why not
                                 ╰── mktme.attest    the appraisal of evidence

It runs on another machine than the platforms: of mktme it needs `mktme.attest` and what that
needs, neither libvirt nor an engine.
"""
