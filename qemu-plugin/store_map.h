/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The store map: one byte per line of RAM, in memory shared with the engine. */
#ifndef MKTME_STORE_MAP_H
#define MKTME_STORE_MAP_H

#include <stdint.h>

#include "link_protocol.h"

struct mktme_store_map {
	int fd;
	uint64_t size_bytes; /* Header included. */
	struct mktme_store_map_header *header;
	uint8_t *lines;
};

/* Make an empty map of a size that nobody can change. Returns 0 or an errno value. */
int mktme_store_map_init(uint64_t line_count, unsigned int vcpus, struct mktme_store_map *ret);

/*
 * Say that LINE was stored to. To be called after the store itself: x86 keeps stores in order (SDM
 * vol. 3A, "Memory Ordering"), so who sees the byte sees the data. That is why a plain store will
 * do; the engine clears the byte before it reads the line, so a store that comes too late for that
 * reading sets the byte again.
 */
static inline void mktme_store_map_mark(uint8_t *lines, uint64_t line)
{
	__atomic_store_n(&lines[line], 1, __ATOMIC_RELAXED);
}

#endif
