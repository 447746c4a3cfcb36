/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tme_port.h"

#if MKTME_QEMU_API >= 7

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fatal.h"

/*
 * QEMU executes the instruction itself, and answers of our own are put in place of its answers
 * before the vCPU executes anything else: a callback is all there is, and it comes before an
 * instruction. So what is to be done afterwards is noted (`after`), and done by what comes next:
 * - the next instruction of the block,
 * - the next block, if the instruction ended its own. Not each block has a callback, for that would
 *   cost as much as all else; those do that are known to follow such an instruction (`followers`),
 * - an exception or interrupt (a discontinuity): GPRs are still what they were. Where PC is to be
 *   changed, its handler is such a follower.
 *
 * A plugin cannot raise an exception; but QEMU can be made to:
 * - #GP of RDMSR and WRMSR: they are given an operand that QEMU refuses; afterwards that is taken
 *   back.
 * - PCONFIG is #UD for QEMU, whose frame on the guest's stack has all flags as they were. The frame
 *   is made one that returns behind PCONFIG, with the flags it leaves, and an IRETQ of the guest's
 *   kernel returns through it. Or, for #GP, the frame is dropped, an RDMSR of the kernel's is
 *   executed that QEMU refuses, and that frame is made PCONFIG's.
 * It is done in this way because QEMU keeps the arithmetic flags where a plugin cannot write them
 * (CC_OP), and knows them exactly only between blocks, where set_pc leaves one.
 */
enum after {
	AFTER_NOTHING,
	AFTER_CPUID,
	AFTER_RDMSR,
	AFTER_REFUSAL,
	AFTER_PCONFIG,
	AFTER_PCONFIG_REFUSAL,
	AFTER_PCONFIG_FAULT,
};

enum gpr {
	RAX,
	RBX,
	RCX,
	RDX,
	RSP,
	CS,
	EFLAGS,
	CR0,
	EFER,
	REGISTERS,
};

static const char *const register_names[REGISTERS] = {
        [RAX] = "rax", [RBX] = "rbx",       [RCX] = "rcx", [RDX] = "rdx",   [RSP] = "rsp",
        [CS] = "cs",   [EFLAGS] = "eflags", [CR0] = "cr0", [EFER] = "efer",
};

/* MSRs that QEMU refuses with #GP, and does nothing else (target/i386/tcg/system/misc_helper.c). */
#define REFUSED_RDMSR 0x8ff /* No register of the x2APIC. */
#define REFUSED_WRMSR 0x6e1 /* IA32_PKRS, if EDX is not 0. */

#define CR0_PE    (1u << 0)
#define EFER_LMA  (1u << 10)
#define EFLAGS_VM (1u << 17)
#define EFLAGS_CF (1u << 0)
#define EFLAGS_PF (1u << 2)
#define EFLAGS_AF (1u << 4)
#define EFLAGS_ZF (1u << 6)
#define EFLAGS_SF (1u << 7)
#define EFLAGS_OF (1u << 11)
#define EFLAGS_RF (1u << 16)

#define EFLAGS_ARITHMETIC (EFLAGS_CF | EFLAGS_PF | EFLAGS_AF | EFLAGS_ZF | EFLAGS_SF | EFLAGS_OF)

#define PCONFIG_BYTES 3

/* What an exception leaves on the stack in IA-32e mode, above an error code if it has one. */
struct frame {
	uint64_t rip;
	uint64_t cs;
	uint64_t rflags;
	uint64_t rsp;
	uint64_t ss;
};

/* One vCPU's, and no other thread touches it. */
struct vcpu {
	enum after after;
	uint32_t bits[4];                /* AFTER_CPUID: of EAX, EBX, ECX, EDX. */
	uint64_t value;                  /* AFTER_RDMSR: EDX:EAX. */
	uint64_t rcx, rdx;               /* AFTER_REFUSAL, AFTER_PCONFIG_FAULT: what they were. */
	uint64_t pc;                     /* AFTER_PCONFIG...: where it is. */
	uint64_t rflags;                 /* AFTER_PCONFIG_FAULT: what they were. */
	uint64_t rdmsr;                  /* AFTER_PCONFIG_FAULT: where QEMU refuses it. */
	struct mktme_call_answer answer; /* AFTER_PCONFIG. */
	GByteArray *bytes;
};

/* Where blocks begin that follow an instruction of ours which ended its own. */
#define FOLLOWERS 32

static uint64_t followers[FOLLOWERS];
static unsigned int next_follower;

/* Where the guest's kernel has an instruction of two bytes, the latest first. */
#define LANDMARKS 8

struct landmarks {
	uint16_t bytes;
	unsigned int next;
	uint64_t addresses[LANDMARKS];
};

static struct landmarks iretqs = {.bytes = 0xcf48};
static struct landmarks rdmsrs = {.bytes = 0x320f};

static const struct mktme_registers *registers;
static int engine;
static pthread_mutex_t calling = PTHREAD_MUTEX_INITIALIZER;
static struct qemu_plugin_register *handles[REGISTERS];
static struct vcpu *vcpus;
static qemu_plugin_u64 pending; /* Whether `after` is not AFTER_NOTHING, where QEMU's code looks. */

static uint64_t read_register(struct vcpu *vcpu, enum gpr which)
{
	uint64_t value = 0;

	g_byte_array_set_size(vcpu->bytes, 0);
	if (!qemu_plugin_read_register(handles[which], vcpu->bytes) ||
	    vcpu->bytes->len > sizeof(value))
		mktme_fatal("QEMU does not tell the register %s", register_names[which]);
	memcpy(&value, vcpu->bytes->data, vcpu->bytes->len);
	return value;
}

static void write_register(enum gpr which, uint64_t value)
{
	GByteArray bytes = {.data = (uint8_t *)&value, .len = sizeof(value)};

	if (!qemu_plugin_write_register(handles[which], &bytes))
		mktme_fatal("QEMU does not take the register %s", register_names[which]);
}

static bool read_memory(struct vcpu *vcpu, uint64_t vaddr, void *ret, size_t size)
{
	if (!qemu_plugin_read_memory_vaddr(vaddr, vcpu->bytes, size))
		return false;
	memcpy(ret, vcpu->bytes->data, size);
	explicit_bzero(vcpu->bytes->data, size);
	return true;
}

/*
 * Nothing that store tracking sees; but page tracking does (mktme.c), as it does exception frames,
 * which this is for.
 */
static void write_memory(uint64_t vaddr, const void *data, size_t size)
{
	GByteArray bytes = {.data = (uint8_t *)data, .len = (unsigned int)size};

	if (!qemu_plugin_write_memory_vaddr(vaddr, &bytes))
		mktme_fatal("the guest's memory at %" PRIx64 " cannot be written", vaddr);
}

static void set_after(unsigned int vcpu_index, enum after after)
{
	vcpus[vcpu_index].after = after;
	qemu_plugin_u64_set(pending, vcpu_index, after != AFTER_NOTHING);
}

static bool is_follower(uint64_t vaddr)
{
	for (size_t i = 0; i < FOLLOWERS; i++) {
		if (__atomic_load_n(&followers[i], __ATOMIC_RELAXED) == vaddr)
			return true;
	}
	return false;
}

/*
 * Have the block at an address call on_pending. One that was translated before does not: writing a
 * byte of it, the one that is there, makes QEMU translate it again.
 */
static void add_follower(struct vcpu *vcpu, uint64_t vaddr)
{
	unsigned int next;
	uint8_t byte;

	if (is_follower(vaddr))
		return;
	next = __atomic_fetch_add(&next_follower, 1, __ATOMIC_RELAXED);
	__atomic_store_n(&followers[next % FOLLOWERS], vaddr, __ATOMIC_SEQ_CST);
	if (read_memory(vcpu, vaddr, &byte, sizeof(byte)))
		write_memory(vaddr, &byte, sizeof(byte));
}

static bool is_supervisor(struct vcpu *vcpu)
{
	if (!(read_register(vcpu, CR0) & CR0_PE))
		return true;
	return !(read_register(vcpu, EFLAGS) & EFLAGS_VM) && (read_register(vcpu, CS) & 3) == 0;
}

static bool knows_landmark(const struct landmarks *landmarks, uint64_t vaddr)
{
	for (size_t i = 0; i < LANDMARKS; i++) {
		if (__atomic_load_n(&landmarks->addresses[i], __ATOMIC_RELAXED) == vaddr)
			return true;
	}
	return false;
}

static void note_landmark(struct landmarks *landmarks, uint64_t vaddr)
{
	unsigned int next;

	if (knows_landmark(landmarks, vaddr))
		return;
	next = __atomic_fetch_add(&landmarks->next, 1, __ATOMIC_RELAXED);
	__atomic_store_n(&landmarks->addresses[next % LANDMARKS], vaddr, __ATOMIC_RELAXED);
}

/* The address of one that is still there; 0 if there is none. */
static uint64_t find_landmark(struct vcpu *vcpu, struct landmarks *landmarks)
{
	unsigned int next = __atomic_load_n(&landmarks->next, __ATOMIC_RELAXED);

	for (unsigned int i = 1; i <= LANDMARKS; i++) {
		uint64_t vaddr = __atomic_load_n(&landmarks->addresses[(next - i) % LANDMARKS],
		                                 __ATOMIC_RELAXED);
		uint16_t bytes;

		if (vaddr && read_memory(vcpu, vaddr, &bytes, sizeof(bytes)) &&
		    bytes == landmarks->bytes)
			return vaddr;
	}
	return 0;
}

/*
 * Copy the register page as it was at one moment.
 * A page is written in microseconds and hardly ever; whoever comes then tries again.
 */
static void read_page(struct mktme_registers *ret)
{
	uint32_t before, after;

	do {
		before = __atomic_load_n(&registers->sequence, __ATOMIC_ACQUIRE);
		memcpy(ret, registers, sizeof(*ret));
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		after = __atomic_load_n(&registers->sequence, __ATOMIC_RELAXED);
	} while (before & 1 || before != after);
	if (ret->cpuid_count > MKTME_REGISTERS_MAX_CPUID ||
	    ret->msr_count > MKTME_REGISTERS_MAX_MSRS)
		mktme_fatal("the engine's register page has too many entries");
}

static bool find_msr(uint32_t number, struct mktme_msr *ret)
{
	struct mktme_registers page;

	read_page(&page);
	for (size_t i = 0; i < page.msr_count; i++) {
		if (page.msrs[i].number == number) {
			*ret = page.msrs[i];
			return true;
		}
	}
	return false;
}

/* Ask the engine, which alone knows the rules. One that is gone ends QEMU (ram_link.c). */
static struct mktme_call_answer call_engine(const struct mktme_call *call)
{
	struct mktme_call_answer answer;
	ssize_t moved;

	pthread_mutex_lock(&calling);
	do
		moved = send(engine, call, sizeof(*call), MSG_NOSIGNAL);
	while (moved < 0 && (errno == EINTR || errno == EAGAIN));
	if (moved == sizeof(*call)) {
		do
			moved = recv(engine, &answer, sizeof(answer), MSG_TRUNC);
		while (moved < 0 && (errno == EINTR || errno == EAGAIN));
	}
	pthread_mutex_unlock(&calling);
	if (moved != sizeof(answer))
		mktme_fatal("the engine does not answer a guest's call; stopping QEMU");
	return answer;
}

static void on_cpuid(unsigned int vcpu_index, void *userdata MKTME_UNUSED)
{
	struct vcpu *vcpu = &vcpus[vcpu_index];
	uint32_t leaf = (uint32_t)read_register(vcpu, RAX);
	uint32_t subleaf = (uint32_t)read_register(vcpu, RCX);
	struct mktme_registers page;

	read_page(&page);
	for (size_t i = 0; i < page.cpuid_count; i++) {
		const struct mktme_cpuid *cpuid = &page.cpuid[i];

		if (cpuid->leaf == leaf && cpuid->subleaf == subleaf) {
			memcpy(vcpu->bits, cpuid->bits, sizeof(vcpu->bits));
			set_after(vcpu_index, AFTER_CPUID);
			return;
		}
	}
}

static void on_rdmsr(unsigned int vcpu_index, void *userdata)
{
	struct vcpu *vcpu = &vcpus[vcpu_index];
	struct mktme_msr msr;

	if (!is_supervisor(vcpu))
		return; /* QEMU raises #GP. */
	note_landmark(&rdmsrs, (uint64_t)userdata);
	if (!find_msr((uint32_t)read_register(vcpu, RCX), &msr))
		return;
	vcpu->value = msr.value;
	if (!msr.faults) {
		set_after(vcpu_index, AFTER_RDMSR);
		return;
	}
	vcpu->rcx = read_register(vcpu, RCX);
	vcpu->rdx = read_register(vcpu, RDX);
	write_register(RCX, REFUSED_RDMSR);
	set_after(vcpu_index, AFTER_REFUSAL);
}

static void on_wrmsr(unsigned int vcpu_index, void *userdata MKTME_UNUSED)
{
	struct vcpu *vcpu = &vcpus[vcpu_index];
	struct mktme_call call = {.operation = MKTME_CALL_WRMSR};
	struct mktme_msr msr;

	call.number = (uint32_t)read_register(vcpu, RCX);
	if (!find_msr(call.number, &msr) || !is_supervisor(vcpu))
		return;
	vcpu->rcx = read_register(vcpu, RCX);
	vcpu->rdx = read_register(vcpu, RDX);
	call.value = vcpu->rdx << 32 | (uint32_t)read_register(vcpu, RAX);
	if (!call_engine(&call).faults)
		return; /* QEMU has no such register, and ignores what it is given. */
	write_register(RCX, REFUSED_WRMSR);
	write_register(RDX, 1);
	set_after(vcpu_index, AFTER_REFUSAL);
}

static void on_iretq(unsigned int vcpu_index, void *userdata)
{
	/* A kernel has one or two, and executes them at each page fault. */
	if (!knows_landmark(&iretqs, (uint64_t)userdata) && is_supervisor(&vcpus[vcpu_index]))
		note_landmark(&iretqs, (uint64_t)userdata);
}

/* Said once: a guest could say it without end. No error, so not as mktme_fatal says them. */
static void leave_undefined(const char *why)
{
	static bool said;

	if (!__atomic_exchange_n(&said, true, __ATOMIC_RELAXED))
		dprintf(STDERR_FILENO, "mktme warning: a PCONFIG stays #UD: %s\n", why);
}

static void on_pconfig(unsigned int vcpu_index, void *userdata)
{
	struct vcpu *vcpu = &vcpus[vcpu_index];
	struct mktme_call call = {.operation = MKTME_CALL_PCONFIG};
	struct mktme_registers page;

	read_page(&page);
	/* Whatever else is wrong, the instruction is #UD then (SDM vol. 2B, PCONFIG). */
	if (!page.has_pconfig || !is_supervisor(vcpu))
		return;
	call.number = (uint32_t)read_register(vcpu, RAX);
	call.value = read_register(vcpu, RBX);
	vcpu->rcx = read_register(vcpu, RCX);
	vcpu->pc = (uint64_t)userdata;
	vcpu->rdmsr = find_landmark(vcpu, &rdmsrs);
	if (!(read_register(vcpu, EFER) & EFER_LMA) || !vcpu->rdmsr ||
	    !find_landmark(vcpu, &iretqs)) {
		leave_undefined("so far no 64-bit code has executed an IRETQ and an RDMSR");
		return;
	}
	if (!read_memory(vcpu, call.value, call.program, sizeof(call.program))) {
		leave_undefined("its structure is not in memory");
		return;
	}
	vcpu->answer = call_engine(&call);
	explicit_bzero(&call, sizeof(call));
	set_after(vcpu_index, vcpu->answer.faults ? AFTER_PCONFIG_REFUSAL : AFTER_PCONFIG);
}

/* Whether this is the handler of the exception at an address; anything else (an NMI) comes first.
 */
static bool read_frame(struct vcpu *vcpu, uint64_t vaddr, uint64_t rip, struct frame *ret)
{
	return read_memory(vcpu, vaddr, ret, sizeof(*ret)) && ret->rip == rip;
}

/* PCONFIG is done: return behind it. */
static void finish_pconfig(unsigned int vcpu_index)
{
	struct vcpu *vcpu = &vcpus[vcpu_index];
	uint64_t rsp = read_register(vcpu, RSP);
	uint64_t iretq = find_landmark(vcpu, &iretqs);
	struct frame frame;

	if (!read_frame(vcpu, rsp, vcpu->pc, &frame))
		return;
	if (!iretq)
		mktme_fatal("the guest's IRETQ is gone");
	frame.rip += PCONFIG_BYTES;
	frame.rflags &= ~(uint64_t)(EFLAGS_ARITHMETIC | EFLAGS_RF);
	frame.rflags |= vcpu->answer.zf ? EFLAGS_ZF : 0;
	write_memory(rsp, &frame, sizeof(frame));
	write_register(RAX, vcpu->answer.rax);
	set_after(vcpu_index, AFTER_NOTHING);
	qemu_plugin_set_pc(iretq);
}

/* PCONFIG is refused: raise #GP as if the #UD had not been. */
static void refuse_pconfig(unsigned int vcpu_index)
{
	struct vcpu *vcpu = &vcpus[vcpu_index];
	struct frame frame;

	if (!read_frame(vcpu, read_register(vcpu, RSP), vcpu->pc, &frame))
		return;
	vcpu->rflags = frame.rflags;
	write_register(RSP, frame.rsp);
	write_register(RCX, REFUSED_RDMSR);
	set_after(vcpu_index, AFTER_PCONFIG_FAULT);
	qemu_plugin_set_pc(vcpu->rdmsr);
}

/* The #GP is there: have it come from PCONFIG. */
static void fault_pconfig(unsigned int vcpu_index)
{
	struct vcpu *vcpu = &vcpus[vcpu_index];
	uint64_t above_error_code = read_register(vcpu, RSP) + sizeof(uint64_t);
	struct frame frame;

	if (!read_frame(vcpu, above_error_code, vcpu->rdmsr, &frame))
		return;
	frame.rip = vcpu->pc;
	frame.rflags = vcpu->rflags;
	write_memory(above_error_code, &frame, sizeof(frame));
	write_register(RCX, vcpu->rcx);
	set_after(vcpu_index, AFTER_NOTHING);
}

static void add_cpuid(struct vcpu *vcpu)
{
	static const enum gpr of_bits[4] = {RAX, RBX, RCX, RDX};

	for (size_t i = 0; i < 4; i++)
		write_register(of_bits[i],
		               (uint32_t)read_register(vcpu, of_bits[i]) | vcpu->bits[i]);
}

/* Before whatever a vCPU executes next. What calls set_pc does not return from there. */
static void mend(unsigned int vcpu_index)
{
	struct vcpu *vcpu = &vcpus[vcpu_index];

	switch (vcpu->after) {
	case AFTER_NOTHING:
		break;
	case AFTER_CPUID:
		add_cpuid(vcpu);
		break;
	case AFTER_RDMSR:
		write_register(RAX, (uint32_t)vcpu->value);
		write_register(RDX, vcpu->value >> 32);
		break;
	case AFTER_REFUSAL:
		write_register(RCX, vcpu->rcx);
		write_register(RDX, vcpu->rdx);
		break;
	case AFTER_PCONFIG:
		finish_pconfig(vcpu_index);
		return;
	case AFTER_PCONFIG_REFUSAL:
		refuse_pconfig(vcpu_index);
		return;
	case AFTER_PCONFIG_FAULT:
		fault_pconfig(vcpu_index);
		return;
	}
	set_after(vcpu_index, AFTER_NOTHING);
}

static void on_pending(unsigned int vcpu_index, void *userdata MKTME_UNUSED)
{
	mend(vcpu_index);
}

/* What was to be done afterwards is not to be done after a reset. */
static void on_reset(unsigned int vcpu_index, void *userdata MKTME_UNUSED)
{
	set_after(vcpu_index, AFTER_NOTHING);
}

void mktme_tme_port_discontinuity(unsigned int vcpu_index, uint64_t handler)
{
	struct vcpu *vcpu = &vcpus[vcpu_index];

	switch (vcpu->after) {
	case AFTER_NOTHING:
		break;
	case AFTER_PCONFIG:
	case AFTER_PCONFIG_REFUSAL:
		/* Here set_pc would have QEMU raise the exception again. */
		add_follower(vcpu, handler);
		break;
	default:
		mend(vcpu_index);
	}
}

void mktme_tme_port_install(void)
{
	pending.score = qemu_plugin_scoreboard_new(sizeof(uint64_t));
}

void mktme_tme_port_init(const struct mktme_registers *page, int socket, unsigned int vcpu_count)
{
	GArray *all = qemu_plugin_get_registers();
	const qemu_plugin_reg_descriptor *descriptors = (const void *)all->data;

	for (size_t i = 0; i < REGISTERS; i++) {
		size_t j = 0;

		while (j < all->len && strcmp(descriptors[j].name, register_names[i]) != 0)
			j++;
		if (j == all->len)
			mktme_fatal("QEMU has no register %s", register_names[i]);
		handles[i] = descriptors[j].handle; /* NULL, for one of them. */
	}
	g_array_free(all, 1);

	vcpus = calloc(vcpu_count, sizeof(*vcpus));
	if (!vcpus)
		mktme_fatal("out of memory");
	for (unsigned int i = 0; i < vcpu_count; i++)
		vcpus[i].bytes = g_byte_array_sized_new(MKTME_PCONFIG_STRUCT);
	registers = page;
	engine = socket;
}

/* Skip prefixes that these instructions ignore; in 32-bit code 40-4F begin none of them. */
static size_t skip_prefixes(const uint8_t *bytes, size_t size)
{
	static const uint8_t legacy[] = {0x26, 0x2e, 0x36, 0x3e, 0x64,
	                                 0x65, 0x66, 0x67, 0xf2, 0xf3};
	size_t i = 0;

	while (i < size && ((bytes[i] & 0xf0) == 0x40 || memchr(legacy, bytes[i], sizeof(legacy))))
		i++;
	return i;
}

/* HAS_ANSWER: after it registers are to be written. */
struct instruction {
	qemu_plugin_vcpu_udata_cb_t callback;
	bool has_answer;
};

static const struct instruction *find_instruction(const uint8_t *bytes, size_t size)
{
	static const struct instruction cpuid = {on_cpuid, true}, rdmsr = {on_rdmsr, true},
	                                wrmsr = {on_wrmsr, false}, iretq = {on_iretq, false},
	                                pconfig = {on_pconfig, false};
	size_t at;

	if (size == 2 && memcmp(bytes, "\x48\xcf", 2) == 0)
		return &iretq;
	if (size == PCONFIG_BYTES && memcmp(bytes, "\x0f\x01\xc5", 3) == 0)
		return &pconfig;
	at = skip_prefixes(bytes, size);
	if (at + 2 != size || bytes[at] != 0x0f)
		return NULL;
	switch (bytes[at + 1]) {
	case 0x30:
		return &wrmsr;
	case 0x32:
		return &rdmsr;
	case 0xa2:
		return &cpuid;
	default:
		return NULL;
	}
}

/* An instruction that ends its block, with the address behind it. */
static void on_last(unsigned int vcpu_index, void *userdata)
{
	struct vcpu *vcpu = &vcpus[vcpu_index];

	if (vcpu->after == AFTER_CPUID || vcpu->after == AFTER_RDMSR)
		add_follower(vcpu, (uint64_t)userdata);
}

static void call_if_pending(struct qemu_plugin_insn *insn)
{
	qemu_plugin_register_vcpu_insn_exec_cond_cb(insn, on_pending, QEMU_PLUGIN_CB_RW_REGS_PC,
	                                            QEMU_PLUGIN_COND_NE, pending, 0, NULL);
}

void mktme_tme_port_translate_block(struct qemu_plugin_tb *tb)
{
	struct qemu_plugin_insn *first = qemu_plugin_tb_get_insn(tb, 0);
	uint64_t vaddr = qemu_plugin_insn_vaddr(first);

	if (is_follower(vaddr))
		call_if_pending(first);
	if (vaddr == MKTME_RESET_VECTOR)
		qemu_plugin_register_vcpu_insn_exec_cb(first, on_reset, QEMU_PLUGIN_CB_NO_REGS,
		                                       NULL);
}

void mktme_tme_port_translate(struct qemu_plugin_tb *tb, size_t index, const uint8_t *bytes,
                              size_t size)
{
	struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, index);
	const struct instruction *instruction = find_instruction(bytes, size);
	uint64_t vaddr;

	if (!instruction)
		return;
	vaddr = qemu_plugin_insn_vaddr(insn);
	qemu_plugin_register_vcpu_insn_exec_cb(insn, instruction->callback, QEMU_PLUGIN_CB_RW_REGS,
	                                       (void *)vaddr);
	if (!instruction->has_answer)
		return;
	if (index + 1 < qemu_plugin_tb_n_insns(tb))
		call_if_pending(qemu_plugin_tb_get_insn(tb, index + 1));
	else
		qemu_plugin_register_vcpu_insn_exec_cb(insn, on_last, QEMU_PLUGIN_CB_RW_REGS,
		                                       (void *)(vaddr + size));
}

#endif
