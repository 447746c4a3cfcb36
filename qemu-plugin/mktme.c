/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The QEMU plugin: finds the guest's RAM, hands it to the engine, and tells the engine where vCPUs
 * store. Its arguments (parse_arguments) are
 *     socket=PATH,vm=UUID,track=stores+pages[,datapath=inline][,ram-below-4g=BYTES]
 *     [,module=BYTES@ADDRESS]...[,check-tlb=on][,visible=on]
 *
 * What vCPUs store is seen here, line by line. What else writes to RAM is not: devices, firmware
 * loading, exception frames, page-table accessed and dirty bits, and the instructions that QEMU
 * lets write through a host pointer (XSAVE, FXSAVE: target/i386/tcg/access.c). Page tracking sees
 * all of it; the plugin only sets that up (ram_link.c). With datapath=inline so do page faults:
 * the engine serves them all, and stores only tell which lines of a page changed.
 *
 * With visible=on the guest also sees the platform's memory encryption: tme_port.c.
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "link_protocol.h"
#include "micro_tlb.h"
#include "qemu_api.h"
#include "ram_link.h"
#include "store_map.h"
#include "tme_port.h"

/* The longest x86 instruction. */
#define MAX_INSTRUCTION_BYTES 15

MKTME_EXPORT int qemu_plugin_version = MKTME_QEMU_API;

static struct mktme_link_options options;
static bool check_tlb;
static pthread_once_t link_once = PTHREAD_ONCE_INIT;
static struct mktme_ram_link ram_link;
static struct mktme_micro_tlb *micro_tlbs; /* One per vCPU. */
static uint8_t *lines;                     /* Of the store map. */

/*
 * Ask QEMU where a store went. Only valid in the callback of the store itself: QEMU answers from
 * its TLB, where the store has just been.
 */
static bool resolve(qemu_plugin_meminfo_t info, uint64_t vaddr, uint64_t *ret_offset)
{
	const struct qemu_plugin_hwaddr *hwaddr = qemu_plugin_get_hwaddr(info, vaddr);

	return hwaddr && !qemu_plugin_hwaddr_is_io(hwaddr) &&
	       mktme_ram_offset(ram_link.segments, ram_link.segment_count,
	                        qemu_plugin_hwaddr_phys_addr(hwaddr), ret_offset);
}

/* Compare a hit with what QEMU says. */
static void check_hit(unsigned int vcpu_index, qemu_plugin_meminfo_t info, uint64_t vaddr,
                      uint64_t line)
{
	struct mktme_vcpu_counters *counters = &ram_link.store_map.header->counters[vcpu_index];
	uint64_t offset;

	counters->tlb_checked++;
	if (!resolve(info, vaddr, &offset) || offset / MKTME_LINE_BYTES != line)
		counters->tlb_errors++;
}

/* Mark the line of one address. What is not RAM never enters the micro-TLB. */
static void mark(unsigned int vcpu_index, qemu_plugin_meminfo_t info, uint64_t vaddr)
{
	struct mktme_micro_tlb *tlb = &micro_tlbs[vcpu_index];
	uint64_t line, offset;

	if (mktme_micro_tlb_lookup(tlb, vaddr, &line)) {
		if (check_tlb)
			check_hit(vcpu_index, info, vaddr, line);
	} else {
		ram_link.store_map.header->counters[vcpu_index].tlb_misses++;
		if (!resolve(info, vaddr, &offset))
			return;
		mktme_micro_tlb_insert(tlb, vaddr, offset);
		line = offset / MKTME_LINE_BYTES;
	}
	mktme_store_map_mark(lines, line);
}

/* The line of a store's last byte, if it is another than that of its first. */
static __attribute__((noinline)) void mark_end(unsigned int vcpu_index, qemu_plugin_meminfo_t info,
                                               uint64_t vaddr)
{
	uint64_t last;

	if (mktme_crosses_line(vaddr, qemu_plugin_mem_size_shift(info), &last))
		mark(vcpu_index, info, last);
}

static __attribute__((noinline)) void on_store_slow(unsigned int vcpu_index,
                                                    qemu_plugin_meminfo_t info, uint64_t vaddr,
                                                    void *userdata MKTME_UNUSED)
{
	mark(vcpu_index, info, vaddr);
	mark_end(vcpu_index, info, vaddr);
}

/* The hot path: every store of the guest comes here. */
static void on_store(unsigned int vcpu_index, qemu_plugin_meminfo_t info, uint64_t vaddr,
                     void *userdata)
{
	uint64_t line;

	if (!mktme_micro_tlb_lookup_recent(&micro_tlbs[vcpu_index], vaddr, &line)) {
		on_store_slow(vcpu_index, info, vaddr, userdata);
		return;
	}
	mktme_store_map_mark(lines, line);
	if (mktme_may_cross_line(vaddr))
		mark_end(vcpu_index, info, vaddr);
}

/*
 * An instruction that flushes the TLB flushes the micro-TLB before it executes, for that is when
 * QEMU calls plugins. That is enough if nothing enters the micro-TLB between then and the flush
 * proper. Few of these instructions store (a far CALL its return address, a task switch the old
 * task's state); what they store bypasses the micro-TLB.
 */
static void on_store_of_flush(unsigned int vcpu_index MKTME_UNUSED, qemu_plugin_meminfo_t info,
                              uint64_t vaddr, void *userdata MKTME_UNUSED)
{
	uint64_t offset, last;

	if (resolve(info, vaddr, &offset))
		mktme_store_map_mark(lines, offset / MKTME_LINE_BYTES);
	if (mktme_crosses_line(vaddr, qemu_plugin_mem_size_shift(info), &last) &&
	    resolve(info, last, &offset))
		mktme_store_map_mark(lines, offset / MKTME_LINE_BYTES);
}

static void flush(unsigned int vcpu_index, void *userdata MKTME_UNUSED)
{
	ram_link.store_map.header->counters[vcpu_index].tlb_flushes++;
	mktme_micro_tlb_flush(&micro_tlbs[vcpu_index]);
}

/*
 * Some TLB flushes have no instruction:
 * - A reset, INIT, SIPI, incoming migration or snapshot: it finds the vCPU halted or stopped, see
 *   on_vcpu_resume. With -accel tcg,thread=single QEMU does not tell of that; a reset still shows
 *   at the reset vector.
 * - An exception or a hardware interrupt through a task gate: a discontinuity, of which QEMU tells
 *   from API 6 on. It does not tell which went through one, so each flushes: a tenth more flushes.
 * - SMM entry: an SMI that an OUT to port B2h raised follows that OUT, which flushes; one from
 *   elsewhere does not. For QEMU 11.1 it is no discontinuity.
 * - #VMEXIT.
 * What a stale translation misplaces until the next flush is found by page tracking, as is all
 * else that stores do not show.
 */
static void track_stores(struct qemu_plugin_insn *insn, const uint8_t *bytes, size_t size)
{
	qemu_plugin_vcpu_mem_cb_t callback = check_tlb ? on_store_slow : on_store;

	if (mktme_flushes_tlb(bytes, size) || qemu_plugin_insn_vaddr(insn) == MKTME_RESET_VECTOR) {
		qemu_plugin_register_vcpu_insn_exec_cb(insn, flush, QEMU_PLUGIN_CB_NO_REGS, NULL);
		callback = on_store_of_flush;
	}
	qemu_plugin_register_vcpu_mem_cb(insn, callback, QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_W,
	                                 NULL);
}

static void on_translation(MKTME_TB_CALLBACK(tb))
{
	size_t count = qemu_plugin_tb_n_insns(tb);

	if (options.share_registers)
		mktme_tme_port_translate_block(tb);
	for (size_t i = 0; i < count; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
		bool may_be_ours = options.share_registers &&
		                   mktme_tme_port_may_be(qemu_plugin_insn_size(insn));
		uint8_t bytes[MAX_INSTRUCTION_BYTES];
		size_t size;

		if (!options.track_stores && !may_be_ours)
			continue;
		size = qemu_plugin_insn_data(insn, bytes, sizeof(bytes));
		if (may_be_ours)
			mktme_tme_port_translate(tb, i, bytes, size);
		if (options.track_stores)
			track_stores(insn, bytes, size);
	}
}

static void on_vcpu_resume(MKTME_VCPU_CALLBACK(vcpu_index))
{
	flush(vcpu_index, NULL);
}

static void on_discontinuity(unsigned int vcpu_index,
                             enum qemu_plugin_discon_type type MKTME_UNUSED,
                             uint64_t from_pc MKTME_UNUSED, uint64_t to_pc,
                             void *userdata MKTME_UNUSED)
{
	if (options.track_stores)
		flush(vcpu_index, NULL);
	if (options.share_registers)
		mktme_tme_port_discontinuity(vcpu_index, to_pc);
}

static void link_up(void)
{
	mktme_ram_link_init(&options, &ram_link);
	lines = ram_link.store_map.lines;
	if (options.share_registers)
		mktme_tme_port_init(ram_link.registers, ram_link.socket, options.vcpus);
}

/*
 * RAM is mapped by the time of the first of these calls. A vCPU gets its own before it executes
 * anything, and waits here until the engine has accepted the RAM.
 */
static void on_vcpu_init(MKTME_VCPU_CALLBACK(vcpu_index MKTME_UNUSED))
{
	pthread_once(&link_once, link_up);
}

static __attribute__((format(printf, 1, 2))) int refuse(const char *format, ...)
{
	va_list arguments;

	fputs("mktme: ", stderr);
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	return -1;
}

static bool parse_socket(const char *text)
{
	/* Absolute: QEMU may change its directory (-daemonize does). */
	if (text[0] != '/' || strlen(text) >= sizeof(options.engine.sun_path))
		return false;
	options.engine.sun_family = AF_UNIX;
	strcpy(options.engine.sun_path, text);
	return true;
}

static int hex_digit(char digit)
{
	if (digit >= '0' && digit <= '9')
		return digit - '0';
	if (digit >= 'a' && digit <= 'f')
		return digit - 'a' + 10;
	if (digit >= 'A' && digit <= 'F')
		return digit - 'A' + 10;
	return -1;
}

/* RFC 4122: 8-4-4-4-12 hexadecimal digits. */
static bool parse_uuid(const char *text)
{
	for (size_t i = 0; i < sizeof(options.vm_uuid); i++) {
		int high, low;

		if ((i == 4 || i == 6 || i == 8 || i == 10) && *text++ != '-')
			return false;
		high = hex_digit(text[0]);
		low = high < 0 ? -1 : hex_digit(text[1]);
		if (low < 0)
			return false;
		options.vm_uuid[i] = (uint8_t)(high << 4 | low);
		text += 2;
	}
	return *text == '\0';
}

static bool parse_track(const char *text)
{
	options.track_stores = strcmp(text, "stores") == 0 || strcmp(text, "stores+pages") == 0;
	options.track_pages = strcmp(text, "pages") == 0 || strcmp(text, "stores+pages") == 0;
	return options.track_stores || options.track_pages || strcmp(text, "off") == 0;
}

static bool parse_datapath(const char *text)
{
	options.take_faults = strcmp(text, "inline") == 0;
	return options.take_faults || strcmp(text, "shadow") == 0;
}

/* Whole pages in decimal, no more than MOST, up to the character END. */
static bool parse_pages(const char *text, char end, uint64_t most, uint64_t *ret,
                        const char **ret_end)
{
	char *stop;

	/* strtoull would take a sign or blanks; too many digits give ULLONG_MAX. */
	if (text[0] < '0' || text[0] > '9')
		return false;
	*ret = strtoull(text, &stop, 10);
	*ret_end = stop;
	return *stop == end && *ret > 0 && *ret <= most && *ret % MKTME_PAGE_BYTES == 0;
}

static bool parse_ram_below_4g(const char *text)
{
	return parse_pages(text, '\0', UINT32_MAX, &options.ram_below_4g_bytes, &text);
}

static bool parse_module(const char *text)
{
	const uint64_t most = UINT64_C(1) << 51; /* The sum is an address of 52 bits at most. */
	struct mktme_hello_segment *module = &options.modules[options.module_count];

	if (options.module_count == MKTME_MAX_MODULES)
		return false;
	options.module_count++;
	return parse_pages(text, '@', most, &module->size_bytes, &text) &&
	       parse_pages(text + 1, '\0', most, &module->guest_physical, &text);
}

static bool parse_check_tlb(const char *text)
{
	check_tlb = strcmp(text, "on") == 0;
	return check_tlb || strcmp(text, "off") == 0;
}

static bool parse_visible(const char *text)
{
	options.share_registers = strcmp(text, "on") == 0;
	return options.share_registers || strcmp(text, "off") == 0;
}

/* QEMU turns a bare NAME into NAME=on, so every argument has a value. */
static int parse_arguments(int argc, char **argv)
{
	static const struct {
		const char *name;
		bool (*parse)(const char *value);
		const char *expected;
		bool required;
	} arguments[] = {
	        {"socket=", parse_socket, "the absolute path of the engine's socket", true},
	        {"vm=", parse_uuid, "the UUID of the VM", true},
	        {"track=", parse_track, "stores, pages, stores+pages or off", true},
	        {"datapath=", parse_datapath, "shadow or inline", false},
	        {"ram-below-4g=", parse_ram_below_4g,
		 "the bytes of RAM below the PCI hole, in decimal and whole pages", false},
	        {"module=", parse_module,
		 "BYTES@ADDRESS of an NVDIMM or a DIMM, in decimal and whole pages, up to 8 times",
		 false},
	        {"check-tlb=", parse_check_tlb, "on or off", false},
	        {"visible=", parse_visible, "on or off", false},
	};
	const size_t known = sizeof(arguments) / sizeof(arguments[0]);
	bool given[sizeof(arguments) / sizeof(arguments[0])] = {false};

	for (int i = 0; i < argc; i++) {
		size_t which = 0, name_size = 0;

		for (; which < known; which++) {
			name_size = strlen(arguments[which].name);
			if (strncmp(argv[i], arguments[which].name, name_size) == 0)
				break;
		}
		if (which == known)
			return refuse("unknown argument '%s'", argv[i]);
		if (!arguments[which].parse(argv[i] + name_size))
			return refuse("'%s': expected %s", argv[i], arguments[which].expected);
		given[which] = true;
	}
	for (size_t which = 0; which < known; which++) {
		if (arguments[which].required && !given[which])
			return refuse("missing argument '%s': expected %s", arguments[which].name,
			              arguments[which].expected);
	}
	return 0;
}

static int check_combination(void)
{
	if (options.share_registers && MKTME_QEMU_API < 7)
		return refuse("visible=on needs QEMU 11.1: before it a plugin cannot write "
		              "registers");
	if (check_tlb && !options.track_stores)
		return refuse(
		        "check-tlb=on checks what track=stores uses: add it, or leave it out");
	if (options.take_faults && options.track_pages)
		return refuse("datapath=inline does not track pages, it serves their faults: use "
		              "track=stores or track=off");
	if (!options.take_faults && !options.track_stores && !options.track_pages)
		return refuse("track=off is for datapath=inline: datapath=shadow would see no "
		              "write at all");
	return 0;
}

static int prepare_stores(void)
{
	/*
	 * QEMU 10.0 aborts in qemu_plugin_get_hwaddr (iotlb_to_section: Assertion section_index <
	 * d->map.sections_nb failed) when one vCPU stores to a device while another moves it, about
	 * one boot in three. QEMU 11 keeps the section in the TLB entry.
	 */
	if (MKTME_QEMU_API < 7 && options.vcpus > 1)
		return refuse(
		        "track=stores with more than one vCPU needs QEMU 11.1: before it QEMU "
		        "can abort when two vCPUs boot; use track=%s or one vCPU",
		        options.take_faults ? "off" : "pages");
	if (options.vcpus > MKTME_STORE_MAP_MAX_VCPUS)
		return refuse("track=stores takes at most %d vCPUs, hot-plugged ones included",
		              MKTME_STORE_MAP_MAX_VCPUS);

	micro_tlbs = aligned_alloc(MKTME_PAGE_BYTES, options.vcpus * sizeof(*micro_tlbs));
	if (!micro_tlbs)
		return refuse("out of memory");
	for (unsigned int i = 0; i < options.vcpus; i++)
		mktme_micro_tlb_flush(&micro_tlbs[i]);
	return 0;
}

MKTME_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc,
                                     char **argv)
{
	if (!info->system_emulation || strcmp(info->target_name, "x86_64") != 0)
		return refuse("this plugin is for qemu-system-x86_64");
	options.vcpus = (unsigned int)info->system.max_vcpus;
	if (parse_arguments(argc, argv) < 0 || check_combination() < 0)
		return -1;

	if (options.track_stores) {
		if (prepare_stores() < 0)
			return -1;
		mktme_register_vcpu_resume(id, on_vcpu_resume);
	}
	if (options.share_registers)
		mktme_tme_port_install();
	if (options.track_stores || options.share_registers) {
		mktme_register_discontinuity(id, on_discontinuity);
		mktme_register_translation(id, on_translation);
	}
	mktme_register_vcpu_init(id, on_vcpu_init);
	return 0;
}
