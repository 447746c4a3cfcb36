# SPDX-License-Identifier: GPL-2.0-or-later
"""Evidence of what runs on a platform, and its appraisal, offline."""
