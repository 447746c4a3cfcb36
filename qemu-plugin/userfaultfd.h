/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the kernel is to tell the engine about accesses to guest RAM: userfaultfd(2). */
#ifndef MKTME_USERFAULTFD_H
#define MKTME_USERFAULTFD_H

#include <stddef.h>

#include "link_protocol.h"

/*
 * Have the kernel keep a record, page by page, of whoever writes to the blocks (the shadow data
 * path). Returns the userfaultfd; the record is read through /proc/PID/pagemap.
 */
int mktme_track_writes(const struct mktme_hello_block *blocks, size_t block_count);

/*
 * Have every access to a page of the blocks that is not in memory, or is write-protected, wait for
 * the engine (the inline data path), system calls included. Returns the userfaultfd. When the last
 * copy of it is closed, what is not in memory reads as zeros.
 */
int mktme_take_faults(const struct mktme_hello_block *blocks, size_t block_count);

#endif
