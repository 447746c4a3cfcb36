/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The slice of QEMU's TCG plugin API that we call, declared by ourselves: distributions do not ship
 * qemu-plugin.h. The functions are QEMU's, found in the executable when it loads us.
 *
 * MKTME_QEMU_API picks the version: 4 (QEMU 10.0, which takes 2 to 4) or 7 (QEMU 11.1, which takes
 * 7 only). All that differs between the two for us is here: version 7's vCPU and translation
 * callbacks lost the plugin's id and gained a userdata pointer, and version 6 brought a callback
 * for discontinuities.
 */
#ifndef MKTME_QEMU_API_H
#define MKTME_QEMU_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MKTME_EXPORT __attribute__((visibility("default")))

typedef uint64_t qemu_plugin_id_t;
typedef uint32_t qemu_plugin_meminfo_t;

typedef struct {
	const char *target_name;
	struct {
		int min;
		int cur;
	} version;
	bool system_emulation;
	union {
		struct {
			int smp_vcpus;
			int max_vcpus;
		} system;
	};
} qemu_info_t;

struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_plugin_hwaddr;

enum qemu_plugin_cb_flags {
	QEMU_PLUGIN_CB_NO_REGS,
	QEMU_PLUGIN_CB_R_REGS,
	QEMU_PLUGIN_CB_RW_REGS,
	QEMU_PLUGIN_CB_RW_REGS_PC,
};

enum qemu_plugin_mem_rw {
	QEMU_PLUGIN_MEM_W = 2,
};

typedef void (*qemu_plugin_vcpu_udata_cb_t)(unsigned int vcpu_index, void *userdata);
typedef void (*qemu_plugin_vcpu_mem_cb_t)(unsigned int vcpu_index, qemu_plugin_meminfo_t info,
                                          uint64_t vaddr, void *userdata);

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index);
size_t qemu_plugin_insn_data(const struct qemu_plugin_insn *insn, void *ret, size_t size);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *insn);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *insn);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *insn,
                                            qemu_plugin_vcpu_udata_cb_t callback,
                                            enum qemu_plugin_cb_flags flags, void *userdata);
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *insn,
                                      qemu_plugin_vcpu_mem_cb_t callback,
                                      enum qemu_plugin_cb_flags flags, enum qemu_plugin_mem_rw rw,
                                      void *userdata);
unsigned int qemu_plugin_mem_size_shift(qemu_plugin_meminfo_t info);
struct qemu_plugin_hwaddr *qemu_plugin_get_hwaddr(qemu_plugin_meminfo_t info, uint64_t vaddr);
bool qemu_plugin_hwaddr_is_io(const struct qemu_plugin_hwaddr *hwaddr);
uint64_t qemu_plugin_hwaddr_phys_addr(const struct qemu_plugin_hwaddr *hwaddr);

/* What QEMU looks for in us. */
MKTME_EXPORT extern int qemu_plugin_version;
MKTME_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc,
                                     char **argv);

/*
 * A callback is defined as
 *     static void on_vcpu_init(MKTME_VCPU_CALLBACK(vcpu_index)) { ... }
 *     static void on_translation(MKTME_TB_CALLBACK(tb)) { ... }
 * and registered with mktme_register_*(id, callback), whatever the version.
 */
#define MKTME_UNUSED __attribute__((unused))

#if MKTME_QEMU_API == 4

#define MKTME_VCPU_CALLBACK(vcpu_index) qemu_plugin_id_t id MKTME_UNUSED, unsigned int vcpu_index
#define MKTME_TB_CALLBACK(tb)           qemu_plugin_id_t id MKTME_UNUSED, struct qemu_plugin_tb *tb
#define MKTME_USERDATA_PARAMETER
#define MKTME_NO_USERDATA

#elif MKTME_QEMU_API == 7

#define MKTME_VCPU_CALLBACK(vcpu_index) unsigned int vcpu_index, void *userdata MKTME_UNUSED
#define MKTME_TB_CALLBACK(tb)           struct qemu_plugin_tb *tb, void *userdata MKTME_UNUSED
#define MKTME_USERDATA_PARAMETER        , void *userdata
#define MKTME_NO_USERDATA               , NULL

#else
#error "MKTME_QEMU_API must be 4 (QEMU 10.0) or 7 (QEMU 11.1)"
#endif

enum qemu_plugin_discon_type {
	QEMU_PLUGIN_DISCON_ALL = -1,
};

typedef void (*qemu_plugin_vcpu_discon_cb_t)(unsigned int vcpu_index,
                                             enum qemu_plugin_discon_type type, uint64_t from_pc,
                                             uint64_t to_pc, void *userdata);
typedef void (*mktme_vcpu_callback)(MKTME_VCPU_CALLBACK(vcpu_index));
typedef void (*mktme_tb_callback)(MKTME_TB_CALLBACK(tb));

void qemu_plugin_register_vcpu_init_cb(qemu_plugin_id_t id,
                                       mktme_vcpu_callback callback MKTME_USERDATA_PARAMETER);
void qemu_plugin_register_vcpu_resume_cb(qemu_plugin_id_t id,
                                         mktme_vcpu_callback callback MKTME_USERDATA_PARAMETER);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id,
                                           mktme_tb_callback callback MKTME_USERDATA_PARAMETER);

static inline void mktme_register_vcpu_init(qemu_plugin_id_t id, mktme_vcpu_callback callback)
{
	qemu_plugin_register_vcpu_init_cb(id, callback MKTME_NO_USERDATA);
}

static inline void mktme_register_vcpu_resume(qemu_plugin_id_t id, mktme_vcpu_callback callback)
{
	qemu_plugin_register_vcpu_resume_cb(id, callback MKTME_NO_USERDATA);
}

static inline void mktme_register_translation(qemu_plugin_id_t id, mktme_tb_callback callback)
{
	qemu_plugin_register_vcpu_tb_trans_cb(id, callback MKTME_NO_USERDATA);
}

#if MKTME_QEMU_API >= 6

void qemu_plugin_register_vcpu_discon_cb(qemu_plugin_id_t id, enum qemu_plugin_discon_type type,
                                         qemu_plugin_vcpu_discon_cb_t callback, void *userdata);

static inline void mktme_register_discontinuity(qemu_plugin_id_t id,
                                                qemu_plugin_vcpu_discon_cb_t callback)
{
	qemu_plugin_register_vcpu_discon_cb(id, QEMU_PLUGIN_DISCON_ALL, callback, NULL);
}

#else

/* There is no such callback: it is never called. */
static inline void mktme_register_discontinuity(qemu_plugin_id_t id MKTME_UNUSED,
                                                qemu_plugin_vcpu_discon_cb_t callback MKTME_UNUSED)
{
}

#endif

#if MKTME_QEMU_API >= 7

/*
 * Registers, memory, and callbacks on a condition. GLib's two types are QEMU's, as is the GLib in
 * its process; these members and functions have been the same in all of GLib 2.
 */
typedef struct {
	char *data;
	unsigned int len;
} GArray;

typedef struct {
	uint8_t *data;
	unsigned int len;
} GByteArray;

GByteArray *g_byte_array_sized_new(unsigned int reserved_size);
GByteArray *g_byte_array_set_size(GByteArray *array, unsigned int size);
char *g_array_free(GArray *array, int free_segment);

struct qemu_plugin_register;
struct qemu_plugin_scoreboard;

typedef struct {
	struct qemu_plugin_register *handle;
	const char *name;
	const char *feature;
	bool is_readonly;
} qemu_plugin_reg_descriptor;

typedef struct {
	struct qemu_plugin_scoreboard *score;
	size_t offset;
} qemu_plugin_u64;

enum qemu_plugin_cond {
	QEMU_PLUGIN_COND_NE = 3,
};

GArray *qemu_plugin_get_registers(void);
bool qemu_plugin_read_register(struct qemu_plugin_register *handle, GByteArray *ret);
bool qemu_plugin_write_register(struct qemu_plugin_register *handle, GByteArray *value);
void qemu_plugin_set_pc(uint64_t vaddr);
bool qemu_plugin_read_memory_vaddr(uint64_t vaddr, GByteArray *ret, size_t size);
bool qemu_plugin_write_memory_vaddr(uint64_t vaddr, GByteArray *data);
struct qemu_plugin_scoreboard *qemu_plugin_scoreboard_new(size_t element_size);
void qemu_plugin_u64_set(qemu_plugin_u64 entry, unsigned int vcpu_index, uint64_t value);
void qemu_plugin_register_vcpu_insn_exec_cond_cb(struct qemu_plugin_insn *insn,
                                                 qemu_plugin_vcpu_udata_cb_t callback,
                                                 enum qemu_plugin_cb_flags flags,
                                                 enum qemu_plugin_cond condition,
                                                 qemu_plugin_u64 entry, uint64_t operand,
                                                 void *userdata);

#endif

#endif
