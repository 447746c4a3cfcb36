/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The platform's memory encryption as the guest sees it: CPUID, RDMSR, WRMSR and PCONFIG are
 * answered with what the engine says. There are no rules of Intel's here, but for how an
 * instruction ends: which registers and flags it leaves, and how it faults.
 */
#ifndef MKTME_TME_PORT_H
#define MKTME_TME_PORT_H

#include "link_protocol.h"
#include "qemu_api.h"

/* Where a CPU starts after a reset (SDM vol. 3A, "First Instruction Executed"). */
#define MKTME_RESET_VECTOR UINT64_C(0xfffffff0)

/* Whether an instruction may be one of ours: two bytes of opcode, and hardly ever a prefix. */
static inline bool mktme_tme_port_may_be(size_t size)
{
	return size >= 2 && size <= 4;
}

#if MKTME_QEMU_API >= 7

/* Before there is any vCPU. */
void mktme_tme_port_install(void);

/*
 * When the engine has accepted the VM, in the first vCPU's initialisation.
 * SOCKET is the link to the engine; failures end QEMU.
 */
void mktme_tme_port_init(const struct mktme_registers *registers, int socket, unsigned int vcpus);

/* At an exception or interrupt, before its handler executes anything. */
void mktme_tme_port_discontinuity(unsigned int vcpu_index, uint64_t handler);

/* Ask for callbacks on a block, then on its instructions that may be one of ours, in their order.
 */
void mktme_tme_port_translate_block(struct qemu_plugin_tb *tb);
void mktme_tme_port_translate(struct qemu_plugin_tb *tb, size_t index, const uint8_t *bytes,
                              size_t size);

#else

/* A plugin cannot write registers: the options are refused. */
static inline void mktme_tme_port_install(void)
{
}

static inline void mktme_tme_port_init(const struct mktme_registers *registers MKTME_UNUSED,
                                       int socket MKTME_UNUSED, unsigned int vcpus MKTME_UNUSED)
{
}

static inline void mktme_tme_port_discontinuity(unsigned int vcpu_index MKTME_UNUSED,
                                                uint64_t handler MKTME_UNUSED)
{
}

static inline void mktme_tme_port_translate_block(struct qemu_plugin_tb *tb MKTME_UNUSED)
{
}

static inline void mktme_tme_port_translate(struct qemu_plugin_tb *tb MKTME_UNUSED,
                                            size_t index MKTME_UNUSED,
                                            const uint8_t *bytes MKTME_UNUSED,
                                            size_t size MKTME_UNUSED)
{
}

#endif

#endif
