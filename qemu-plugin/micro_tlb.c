/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "micro_tlb.h"

#include <string.h>

static_assert((MKTME_TLB_SETS & (MKTME_TLB_SETS - 1)) == 0, "the index is a mask");

/* The out-of-line copies of the header's inline functions, for whoever calls them through ctypes.
 */
extern bool mktme_micro_tlb_lookup_recent(const struct mktme_micro_tlb *tlb, uint64_t vaddr,
                                          uint64_t *ret_line);
extern bool mktme_may_cross_line(uint64_t vaddr);
extern bool mktme_crosses_line(uint64_t vaddr, unsigned int size_shift, uint64_t *ret_last);

void mktme_micro_tlb_flush(struct mktme_micro_tlb *tlb)
{
	memset(tlb, 0xff, sizeof(*tlb));
}

void mktme_micro_tlb_insert(struct mktme_micro_tlb *tlb, uint64_t vaddr, uint64_t ram_offset)
{
	uint64_t page = vaddr / MKTME_PAGE_BYTES;

	tlb->sets[page % MKTME_TLB_SETS].other = tlb->sets[page % MKTME_TLB_SETS].recent;
	tlb->sets[page % MKTME_TLB_SETS].recent = (struct mktme_tlb_entry){
	        .page = page,
	        .addend = ram_offset - vaddr,
	};
}

bool mktme_micro_tlb_lookup(struct mktme_micro_tlb *tlb, uint64_t vaddr, uint64_t *ret_line)
{
	uint64_t page = vaddr / MKTME_PAGE_BYTES;
	struct mktme_tlb_entry other = tlb->sets[page % MKTME_TLB_SETS].other;

	if (mktme_micro_tlb_lookup_recent(tlb, vaddr, ret_line))
		return true;
	if (other.page != page)
		return false;
	tlb->sets[page % MKTME_TLB_SETS].other = tlb->sets[page % MKTME_TLB_SETS].recent;
	tlb->sets[page % MKTME_TLB_SETS].recent = other;
	*ret_line = (vaddr + other.addend) / MKTME_LINE_BYTES;
	return true;
}

size_t mktme_segments_init(uint64_t ram_bytes, uint64_t ram_below_4g_bytes,
                           struct mktme_hello_segment ret[2])
{
	const uint64_t four_gib = UINT64_C(1) << 32;

	ret[0] = (struct mktme_hello_segment){.size_bytes = ram_bytes};
	if (ram_bytes <= ram_below_4g_bytes)
		return 1;
	ret[0].size_bytes = ram_below_4g_bytes;
	ret[1] = (struct mktme_hello_segment){
	        .guest_physical = four_gib,
	        .ram_offset = ram_below_4g_bytes,
	        .size_bytes = ram_bytes - ram_below_4g_bytes,
	};
	return 2;
}

bool mktme_ram_offset(const struct mktme_hello_segment *segments, size_t segment_count,
                      uint64_t guest_physical, uint64_t *ret_offset)
{
	for (size_t i = 0; i < segment_count; i++) {
		uint64_t into = guest_physical - segments[i].guest_physical;

		if (into < segments[i].size_bytes) {
			*ret_offset = segments[i].ram_offset + into;
			return true;
		}
	}
	return false;
}

static bool is_legacy_prefix(uint8_t byte)
{
	switch (byte) {
	case 0x26: /* ES, CS, SS, DS, FS, GS */
	case 0x2e:
	case 0x36:
	case 0x3e:
	case 0x64:
	case 0x65:
	case 0x66: /* operand size, address size */
	case 0x67:
	case 0xf0: /* LOCK, REPNE, REP */
	case 0xf2:
	case 0xf3:
		return true;
	default:
		return false;
	}
}

static bool is_memory_form(uint8_t modrm)
{
	return modrm >> 6 != 3;
}

static unsigned int modrm_reg(uint8_t modrm)
{
	return modrm >> 3 & 7;
}

/* Opcodes 0F xx; CODE is what follows the 0F. */
static bool two_byte_flushes_tlb(const uint8_t *code, size_t size, bool operand_size_prefix)
{
	if (size == 0)
		return false;
	switch (code[0]) {
	case 0x22: /* MOV to CRn: CR3 and the paging bits of CR0 and CR4 */
	case 0x30: /* WRMSR: EFER */
	case 0xaa: /* RSM */
		return true;
	case 0x38: /* 66 0F 38 82: INVPCID */
		return size > 1 && code[1] == 0x82 && operand_size_prefix;
	case 0x01:
		if (size < 2)
			return false;
		if (modrm_reg(code[1]) == 6) /* LMSW: can set CR0.PE */
			return true;
		if (is_memory_form(code[1])) /* INVLPG; otherwise SGDT, SIDT, LGDT, LIDT, SMSW */
			return modrm_reg(code[1]) == 7;
		/*
		 * WRMSRNS, and AMD's SVM: VMRUN, VMMCALL, VMLOAD, VMSAVE, STGI, CLGI, SKINIT,
		 * INVLPGA. Not all of SVM's flush, but STGI is the first that a hypervisor executes
		 * after a #VMEXIT, which has no instruction of its own; and all are rare. The other
		 * register forms (SWAPGS, STAC, CLAC, XGETBV, ...) are frequent and flush nothing.
		 */
		return code[1] == 0xc6 || (code[1] >= 0xd8 && code[1] <= 0xdf);
	default:
		return false;
	}
}

/*
 * Sources: Intel SDM vol. 3A, "Invalidation of TLBs and Paging-Structure Caches" and "Task
 * Switching" (a task switch loads CR3); AMD APM vol. 2, "Implicit Invalidations" and "Secure
 * Virtual Machine".
 *
 * When in doubt it says yes: a flush too many costs some misses, one too few loses a store. So
 * 40-4F count as REX prefixes wherever prefixes may stand. In 32-bit code they are INC and DEC,
 * which are instructions by themselves and so never followed by anything here.
 */
bool mktme_flushes_tlb(const uint8_t *instruction, size_t size)
{
	bool operand_size_prefix = false;
	bool rex_w = false;
	size_t i;

	for (i = 0; i < size; i++) {
		if (is_legacy_prefix(instruction[i])) {
			operand_size_prefix |= instruction[i] == 0x66;
			rex_w = false; /* A REX counts only right before the opcode. */
		} else if ((instruction[i] & 0xf0) == 0x40) {
			rex_w = (instruction[i] & 8) != 0;
		} else {
			break;
		}
	}
	if (i == size)
		return false;

	switch (instruction[i]) {
	case 0x0f:
		return two_byte_flushes_tlb(instruction + i + 1, size - i - 1, operand_size_prefix);
	/* Far CALL and JMP, direct and (FF /3, /5) through memory: the target can be a task. */
	case 0x9a:
	case 0xea:
		return true;
	case 0xff:
		return size - i > 1 && is_memory_form(instruction[i + 1]) &&
		       (modrm_reg(instruction[i + 1]) == 3 || modrm_reg(instruction[i + 1]) == 5);
	/* INT3, INT n, INTO, INT1: can go through a task gate. */
	case 0xcc:
	case 0xcd:
	case 0xce:
	case 0xf1:
		return true;
	/* IRET: to the previous task if NT is set. 64-bit code has no tasks, but many IRETQ. */
	case 0xcf:
		return !rex_w;
	/*
	 * OUTS and OUT: port 92h and the keyboard controller have the A20 gate, for which QEMU
	 * flushes (x86_cpu_set_a20); port B2h raises an SMI, and SMM entry has no instruction.
	 */
	case 0x6e:
	case 0x6f:
	case 0xe6:
	case 0xe7:
	case 0xee:
	case 0xef:
		return true;
	default:
		return false;
	}
}
