/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The micro-TLB: from the virtual address of a store to the line of RAM it went to, without asking
 * QEMU. A CPU may keep a translation until an instruction (or a reset) flushes its TLB; so may we,
 * for the same guest code is correct on both. Nothing here knows of QEMU: the tests drive it as it
 * stands.
 */
#ifndef MKTME_MICRO_TLB_H
#define MKTME_MICRO_TLB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "link_protocol.h"

/*
 * A power of two; this many make one page. More do not help: from 32 sets to 1024, a boot and a
 * SHA-256 of 64 MiB always had some 2 million misses in 1500 million stores, 15 after each flush.
 *
 * A set has two entries, since where the kernel's address randomisation puts two busy pages into
 * one set, such as a stack and the buffer that is filled from there, they would throw each other
 * out at every store: with one entry, one boot in a dozen had 62 million misses.
 */
#define MKTME_TLB_SETS 128

struct mktme_tlb_entry {
	uint64_t page;   /* Virtual address / page size; UINT64_MAX: empty, no address has it. */
	uint64_t addend; /* RAM offset = virtual address + addend, modulo 2^64. */
};

/* One vCPU's, and no other thread touches it. */
struct mktme_micro_tlb {
	struct {
		struct mktme_tlb_entry recent;
		struct mktme_tlb_entry other;
	} sets[MKTME_TLB_SETS];
} __attribute__((aligned(MKTME_PAGE_BYTES)));

void mktme_micro_tlb_flush(struct mktme_micro_tlb *tlb);

/* Remember that the page of VADDR is at the page of RAM_OFFSET. */
void mktme_micro_tlb_insert(struct mktme_micro_tlb *tlb, uint64_t vaddr, uint64_t ram_offset);

/* The line (RAM offset / line size) of VADDR, if the micro-TLB knows it. */
bool mktme_micro_tlb_lookup(struct mktme_micro_tlb *tlb, uint64_t vaddr, uint64_t *ret_line);

/* The same, if VADDR's page is also the one of its set that was asked for last: the hot path. */
inline bool mktme_micro_tlb_lookup_recent(const struct mktme_micro_tlb *tlb, uint64_t vaddr,
                                          uint64_t *ret_line)
{
	uint64_t page = vaddr / MKTME_PAGE_BYTES;
	const struct mktme_tlb_entry *entry = &tlb->sets[page % MKTME_TLB_SETS].recent;

	if (entry->page != page)
		return false;
	*ret_line = (vaddr + entry->addend) / MKTME_LINE_BYTES;
	return true;
}

/*
 * Whether a store that starts at VADDR can reach into the next line, whatever its size. The largest
 * that QEMU reports is 16 bytes (MO_128; a 32-byte AVX store is two of them).
 */
inline bool mktme_may_cross_line(uint64_t vaddr)
{
	return vaddr % MKTME_LINE_BYTES > MKTME_LINE_BYTES - 16;
}

/* Whether a store of 2^SIZE_SHIFT bytes at VADDR does, and if so the address of its last byte. */
inline bool mktme_crosses_line(uint64_t vaddr, unsigned int size_shift, uint64_t *ret_last)
{
	*ret_last = vaddr + (UINT64_C(1) << size_shift) - 1;
	return (vaddr ^ *ret_last) >= MKTME_LINE_BYTES;
}

/*
 * Lay out a PC's RAM in guest-physical space: up to RAM_BELOW_4G_BYTES at 0, the rest at 4 GiB,
 * above the PCI hole. Both sizes are multiples of the page size. Returns how many segments that
 * took.
 */
size_t mktme_segments_init(uint64_t ram_bytes, uint64_t ram_below_4g_bytes,
                           struct mktme_hello_segment ret[2]);

/* The RAM offset of a guest-physical address; false if it is not RAM (video memory, ROM). */
bool mktme_ram_offset(const struct mktme_hello_segment *segments, size_t segment_count,
                      uint64_t guest_physical, uint64_t *ret_offset);

/* Whether the instruction can flush the TLB of the CPU that executes it, or lead to that. */
bool mktme_flushes_tlb(const uint8_t *instruction, size_t size);

#endif
