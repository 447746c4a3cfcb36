# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run shows, each check next to a control that shows it can fail."""
