# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading DRAM images: what they hold, analysis, pictures, exports."""
