/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Finds the guest's RAM inside QEMU and hands it to the engine. */
#ifndef MKTME_RAM_LINK_H
#define MKTME_RAM_LINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/un.h>

#include "link_protocol.h"
#include "store_map.h"

/* NVDIMMs and DIMMs; more than anybody plugs in. */
#define MKTME_MAX_MODULES 8

struct mktme_link_options {
	struct sockaddr_un engine;
	uint8_t vm_uuid[16];
	bool track_stores;
	bool track_pages;
	bool take_faults;            /* Instead of track_pages. */
	bool share_registers;        /* The guest sees the platform's. */
	uint64_t ram_below_4g_bytes; /* 0: not given. */
	/* Where the last blocks are, plugged in or not, in their order; RAM offsets are not set. */
	struct mktme_hello_segment modules[MKTME_MAX_MODULES];
	size_t module_count;
	unsigned int vcpus;
};

struct mktme_ram_link {
	struct mktme_hello_segment segments[2 + MKTME_MAX_MODULES];
	size_t segment_count;
	struct mktme_store_map store_map; /* Only if stores are tracked. */
	/* The engine's, only if registers are shared; calls about them go over the socket. */
	const struct mktme_registers *registers;
	int socket;
};

/*
 * Find the RAM, set the trackers up, and have the engine accept it. From then on QEMU lives no
 * longer than the engine. There is no failure to return: whatever goes wrong, QEMU is stopped with
 * a message (exit status 70, EX_SOFTWARE), since the guest must never run unprotected.
 */
void mktme_ram_link_init(const struct mktme_link_options *options, struct mktme_ram_link *ret);

#endif
