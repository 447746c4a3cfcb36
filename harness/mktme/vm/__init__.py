# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests under libvirt: their images, their domains, their consoles."""

from __future__ import annotations

import os

# libvirt reads this once, when it is loaded; whatever it would log as an error it also raises.
os.environ.setdefault("LIBVIRT_LOG_OUTPUTS", "4:file:/dev/null")
