# SPDX-License-Identifier: GPL-2.0-or-later
"""How guest memory reaches the engine: the link to QEMU, the trackers, the data paths."""
