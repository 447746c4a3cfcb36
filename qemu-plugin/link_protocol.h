/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the plugin and the engine say to each other, byte for byte.
 *
 * The plugin connects to the engine's AF_UNIX/SOCK_SEQPACKET socket and sends one message: a hello,
 * its RAM blocks, its segments, and with them (SCM_RIGHTS) one descriptor per RAM block, then the
 * userfaultfd if it has the engine serve faults, or the userfaultfd and /proc/self/pagemap if it
 * tracks pages (it never does both), then the store map if it tracks stores, then the register page
 * if the guest is to see the platform's registers.
 * The engine answers with one message. After that a plugin with a register page calls, one call at
 * a time, and each is answered; no other speaks. Either side closing the socket is the end.
 *
 * All integers are little-endian; every structure is laid out without padding, so that the Python
 * side can describe it with "<" formats. The engine checks every length and range in here: it does
 * not trust QEMU.
 */
#ifndef MKTME_LINK_PROTOCOL_H
#define MKTME_LINK_PROTOCOL_H

#include <assert.h>
#include <stdint.h>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire format is the host's");

#define MKTME_LINK_VERSION         1
#define MKTME_HELLO_MAGIC          "MKTMELNK"
#define MKTME_ANSWER_MAGIC         "MKTMEANS"
#define MKTME_MAX_BLOCKS           16
#define MKTME_MAX_SEGMENTS         17
#define MKTME_MAX_REASON_BYTES     480
#define MKTME_CAPABILITY_STORES    (1u << 0)
#define MKTME_CAPABILITY_PAGES     (1u << 1)
#define MKTME_CAPABILITY_FAULTS    (1u << 2)
#define MKTME_CAPABILITY_REGISTERS (1u << 3)

/* The unit of page tracking, and of the micro-TLB. */
#define MKTME_PAGE_BYTES 4096u
/* The unit of encryption (the XTS data unit), and of store tracking. */
#define MKTME_LINE_BYTES 64u

struct mktme_hello {
	char magic[8];
	uint16_t version;
	uint16_t plugin_api;
	uint16_t vcpus; /* The most there can be, hot-plugged ones included. */
	uint16_t block_count;
	uint16_t segment_count;
	uint16_t descriptor_count;
	uint32_t capabilities;
	uint8_t vm_uuid[16];      /* RFC 4122 byte order, as in the text form. */
	uint64_t store_map_bytes; /* The whole memfd, header included; 0 if there is none. */
	uint32_t page_bytes;
	uint32_t total_bytes; /* This message, blocks and segments included. */
	uint64_t reserved;
};
static_assert(sizeof(struct mktme_hello) == 64, "wire format");

/* A RAM block of QEMU. Joined in this order, the blocks are the space of RAM offsets. */
struct mktme_hello_block {
	uint64_t host_address; /* Where QEMU maps it: what userfaultfd and PAGEMAP_SCAN speak of. */
	uint64_t size_bytes;
};
static_assert(sizeof(struct mktme_hello_block) == 16, "wire format");

/* A run of guest-physical addresses and the RAM offsets behind it. */
struct mktme_hello_segment {
	uint64_t guest_physical;
	uint64_t ram_offset;
	uint64_t size_bytes;
};
static_assert(sizeof(struct mktme_hello_segment) == 24, "wire format");

/* Followed by reason_bytes of UTF-8 that say why, when the status is not 0. */
struct mktme_answer {
	char magic[8];
	uint16_t version;
	uint16_t status; /* 0: accepted. */
	uint16_t reason_bytes;
	uint16_t reserved;
};
static_assert(sizeof(struct mktme_answer) == 16, "wire format");

/*
 * The store map: a memfd with this header, then one byte per line of RAM, 1 if a vCPU stored to the
 * line since the engine last cleared the byte.
 */
#define MKTME_STORE_MAP_MAGIC     "MKTMEMAP"
#define MKTME_STORE_MAP_VERSION   1
#define MKTME_STORE_MAP_MAX_VCPUS 64

/* Written by one vCPU's thread, read by anyone: statistics, not synchronisation. */
struct mktme_vcpu_counters {
	uint64_t tlb_misses;
	uint64_t tlb_flushes;
	uint64_t tlb_checked; /* check-tlb=on: hits compared with QEMU's own translation, ... */
	uint64_t tlb_errors;  /* ... and those that differed. */
};
static_assert(sizeof(struct mktme_vcpu_counters) == 32, "wire format");

struct mktme_store_map_header {
	char magic[8];
	uint32_t version;
	uint32_t vcpus;
	uint64_t line_count;
	uint64_t header_bytes;
	uint64_t reserved[4];
	struct mktme_vcpu_counters counters[MKTME_STORE_MAP_MAX_VCPUS];
	uint8_t padding[4096 - 64 - 64 * 32];
};
static_assert(sizeof(struct mktme_store_map_header) == 4096, "wire format");

/*
 * The register page: a memfd of one page, what RDMSR and CPUID give. The engine fills it before it
 * answers the hello, and writes it again whenever a register changes; the sequence is odd while it
 * does.
 */
#define MKTME_REGISTERS_MAGIC     "MKTMEREG"
#define MKTME_REGISTERS_VERSION   1
#define MKTME_REGISTERS_MAX_CPUID 8
#define MKTME_REGISTERS_MAX_MSRS  16

/* What a leaf has beside what QEMU says of it: to be ORed to EAX, EBX, ECX and EDX. */
struct mktme_cpuid {
	uint32_t leaf;
	uint32_t subleaf;
	uint32_t bits[4];
};
static_assert(sizeof(struct mktme_cpuid) == 24, "wire format");

struct mktme_msr {
	uint32_t number;
	uint32_t faults; /* Whether RDMSR is a #GP. */
	uint64_t value;
};
static_assert(sizeof(struct mktme_msr) == 16, "wire format");

struct mktme_registers {
	char magic[8];
	uint32_t version;
	uint32_t sequence;
	uint32_t has_pconfig; /* Whether there is the instruction. */
	uint16_t cpuid_count;
	uint16_t msr_count;
	struct mktme_cpuid cpuid[MKTME_REGISTERS_MAX_CPUID];
	struct mktme_msr msrs[MKTME_REGISTERS_MAX_MSRS];
};
static_assert(sizeof(struct mktme_registers) == 472, "wire format");

/* A call: what changes a register or a key, as the vCPU executes it at privilege level 0. */
#define MKTME_CALL_WRMSR     1
#define MKTME_CALL_PCONFIG   2
#define MKTME_PCONFIG_STRUCT 192

struct mktme_call {
	uint32_t operation;
	uint32_t number;                       /* ECX; EAX of PCONFIG. */
	uint64_t value;                        /* EDX:EAX; RBX of PCONFIG. */
	uint8_t program[MKTME_PCONFIG_STRUCT]; /* What PCONFIG has at RBX. */
};
static_assert(sizeof(struct mktme_call) == 208, "wire format");

struct mktme_call_answer {
	uint32_t faults; /* 1: #GP(0), and the rest is 0. */
	uint32_t rax;    /* Of PCONFIG; so is ZF. */
	uint32_t zf;
	uint32_t reserved;
};
static_assert(sizeof(struct mktme_call_answer) == 16, "wire format");

#endif
