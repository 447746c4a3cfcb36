/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "ram_link.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "fatal.h"
#include "micro_tlb.h"
#include "userfaultfd.h"

/* How QEMU names the memory of -object memory-backend-memfd, as /proc/PID/maps shows it. */
#define RAM_MAPPING_NAME "/memfd:memory-backend-memfd"

/* The engine only has to look at the hello; it gets that long before QEMU gives up. */
#define ANSWER_TIMEOUT_S 30

#define MAX_DESCRIPTORS (MKTME_MAX_BLOCKS + 4)

struct ram_block {
	dev_t device;
	ino_t inode;
	uint64_t host_address;
	uint64_t size_bytes;
	int fd; /* QEMU's own; -1 until found. */
};

struct message {
	struct mktme_hello hello;
	/* Blocks, then segments. */
	uint8_t tail[MKTME_MAX_BLOCKS * sizeof(struct mktme_hello_block) +
	             MKTME_MAX_SEGMENTS * sizeof(struct mktme_hello_segment)];
	int descriptors[MAX_DESCRIPTORS];
};

/* Add one line of /proc/self/maps to the blocks if it is guest RAM. */
static void add_mapping(const char *line, struct ram_block *blocks, size_t *block_count)
{
	uint64_t start, end, offset, inode;
	unsigned int major, minor;
	char permissions[5];
	int name_at = 0;

	if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %x:%x %" SCNu64 " %n", &start,
	           &end, permissions, &offset, &major, &minor, &inode, &name_at) != 7)
		mktme_fatal("cannot make sense of /proc/self/maps");
	const char *name = line + name_at;
	size_t name_size = strlen(RAM_MAPPING_NAME);

	if (strncmp(name, RAM_MAPPING_NAME, name_size) != 0 ||
	    (name[name_size] != '\0' && name[name_size] != ' ' && name[name_size] != '\n'))
		return;
	if (permissions[3] != 's')
		mktme_fatal("guest RAM is a private mapping: add share=on to memory-backend-memfd");

	for (size_t i = 0; i < *block_count; i++) {
		struct ram_block *block = &blocks[i];

		if (block->device != makedev(major, minor) || block->inode != inode)
			continue;
		/* The kernel shows a mapping in pieces where their flags differ. */
		if (start != block->host_address + block->size_bytes || offset != block->size_bytes)
			mktme_fatal("a guest RAM block is not mapped in one piece (%" PRIx64 ")",
			            start);
		block->size_bytes += end - start;
		return;
	}
	if (*block_count == MKTME_MAX_BLOCKS)
		mktme_fatal("the guest has more than %d RAM blocks", MKTME_MAX_BLOCKS);
	if (offset != 0)
		mktme_fatal("a guest RAM block is not mapped from its start (%" PRIx64 ")", start);
	blocks[(*block_count)++] = (struct ram_block){
	        .device = makedev(major, minor),
	        .inode = inode,
	        .host_address = start,
	        .size_bytes = end - start,
	        .fd = -1,
	};
}

static void find_mappings(struct ram_block *blocks, size_t *block_count)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char *line = NULL;
	size_t size = 0;

	if (!maps)
		mktme_fatal("cannot open /proc/self/maps: %s", strerror(errno));
	while (getline(&line, &size, maps) >= 0)
		add_mapping(line, blocks, block_count);
	free(line);
	fclose(maps);
	if (*block_count == 0)
		mktme_fatal("guest RAM must be a shared memfd: -machine memory-backend=ID "
		            "-object memory-backend-memfd,id=ID,share=on,size=SIZE");
}

/* Find QEMU's own descriptors of the blocks: mappings name only their inodes. */
static void find_descriptors(struct ram_block *blocks, size_t block_count)
{
	DIR *directory = opendir("/proc/self/fd");
	struct dirent *entry;

	if (!directory)
		mktme_fatal("cannot open /proc/self/fd: %s", strerror(errno));
	while ((entry = readdir(directory))) {
		int fd = atoi(entry->d_name); /* "." and ".." are 0, and no harm. */
		struct stat status;

		if (fstat(fd, &status) < 0)
			continue;
		for (size_t i = 0; i < block_count; i++) {
			struct ram_block *block = &blocks[i];

			if (block->device != status.st_dev || block->inode != status.st_ino)
				continue;
			if ((uint64_t)status.st_size != block->size_bytes)
				mktme_fatal("a guest RAM block is mapped in part only (%" PRIx64
				            ")",
				            block->host_address);
			if (block->fd < 0 || fd < block->fd)
				block->fd = fd;
		}
	}
	closedir(directory);
	for (size_t i = 0; i < block_count; i++) {
		if (blocks[i].fd < 0)
			mktme_fatal("a guest RAM block has no open descriptor (%" PRIx64 ")",
			            blocks[i].host_address);
	}
}

static int compare_by_descriptor(const void *left, const void *right)
{
	return ((const struct ram_block *)left)->fd - ((const struct ram_block *)right)->fd;
}

/*
 * The blocks in the order of their RAM offsets. With several NUMA nodes QEMU joins their memory
 * backends in the order of the nodes. It does not tell us that, but backends are made in the order
 * of the command line, which libvirt writes in the order of the nodes, so the order of descriptors
 * is the same.
 */
static size_t find_ram(struct ram_block *ret_blocks)
{
	size_t block_count = 0;

	find_mappings(ret_blocks, &block_count);
	find_descriptors(ret_blocks, block_count);
	qsort(ret_blocks, block_count, sizeof(*ret_blocks), compare_by_descriptor);
	return block_count;
}

/*
 * What datapath=inline cannot be used with. A few pages that are in memory by now do no harm: the
 * engine finds them.
 */
static void check_inline(const struct ram_block *blocks, size_t block_count)
{
	for (size_t i = 0; i < block_count; i++) {
		struct statfs file_system;
		struct stat status;

		if (fstatfs(blocks[i].fd, &file_system) < 0 || fstat(blocks[i].fd, &status) < 0)
			mktme_fatal("cannot tell what guest RAM is made of: %s", strerror(errno));
		if (file_system.f_bsize != MKTME_PAGE_BYTES)
			mktme_fatal("guest RAM is made of pages of %ld KiB, datapath=inline needs "
			            "4 KiB: leave out hugetlb=on, or use datapath=shadow",
			            file_system.f_bsize / 1024);
		if ((uint64_t)status.st_blocks * 512 >= blocks[i].size_bytes)
			mktme_fatal("all of a guest RAM block is in memory before the engine has "
			            "it: leave out prealloc=on, or use datapath=shadow");
	}
}

static size_t lay_out_ram(const struct mktme_link_options *options, uint64_t ram_bytes,
                          struct mktme_hello_segment ret[2])
{
	/*
	 * QEMU leaves the PCI hole at 2 GiB or above unless told otherwise (max-ram-below-4g), so
	 * up to there guest-physical addresses are RAM offsets on every PC machine.
	 */
	const uint64_t always_below_4g = UINT64_C(1) << 31;

	if (options->ram_below_4g_bytes == 0 && ram_bytes > always_below_4g)
		mktme_fatal(
		        "more than 2 GiB of guest RAM is split around the PCI hole: pass "
		        "ram-below-4g=BYTES (the size of the RAM at address 0 in HMP 'info mtree "
		        "-f')");
	return mktme_segments_init(ram_bytes, options->ram_below_4g_bytes ?: always_below_4g, ret);
}

/*
 * Where all blocks are in guest-physical space. Those of the modules are the last, as their -object
 * have to be, and are there before anything is plugged in: QEMU tells nobody of a new RAM block.
 */
static size_t lay_out(const struct mktme_link_options *options, const struct ram_block *blocks,
                      size_t block_count, struct mktme_hello_segment ret[2 + MKTME_MAX_MODULES])
{
	uint64_t ram_bytes = 0;
	size_t count;

	if (block_count <= options->module_count)
		mktme_fatal("%zu RAM blocks are too few for RAM and %zu modules", block_count,
		            options->module_count);
	block_count -= options->module_count;
	for (size_t i = 0; i < block_count; i++)
		ram_bytes += blocks[i].size_bytes;
	count = lay_out_ram(options, ram_bytes, ret);
	for (size_t i = 0; i < options->module_count; i++) {
		const struct ram_block *block = &blocks[block_count + i];
		struct mktme_hello_segment module = options->modules[i];

		if (block->size_bytes != module.size_bytes)
			mktme_fatal("a RAM block has %" PRIu64
			            " bytes where module= has one of %" PRIu64,
			            block->size_bytes, module.size_bytes);
		module.ram_offset = ram_bytes;
		ram_bytes += module.size_bytes;
		ret[count++] = module;
	}
	return count;
}

static int open_pagemap(void)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		mktme_fatal("cannot open /proc/self/pagemap: %s (is /proc mounted?)",
		            strerror(errno));
	return fd;
}

/* Make the register page, for the engine to fill. */
static int make_registers(const struct mktme_registers **ret)
{
	int fd = memfd_create("mktme-registers", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (fd < 0 || ftruncate(fd, MKTME_PAGE_BYTES) < 0 ||
	    fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
		mktme_fatal("cannot make the register page: %s", strerror(errno));
	*ret = mmap(NULL, MKTME_PAGE_BYTES, PROT_READ, MAP_SHARED, fd, 0);
	if (*ret == MAP_FAILED)
		mktme_fatal("cannot map the register page: %s", strerror(errno));
	return fd;
}

static void check_registers(const struct mktme_registers *registers)
{
	if (memcmp(registers->magic, MKTME_REGISTERS_MAGIC, sizeof(registers->magic)) != 0 ||
	    registers->version != MKTME_REGISTERS_VERSION)
		mktme_fatal("the engine's register page is not of version %d",
		            MKTME_REGISTERS_VERSION);
}

static int connect_to_engine(const struct sockaddr_un *address)
{
	const struct timeval timeout = {.tv_sec = ANSWER_TIMEOUT_S};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	if (fd < 0)
		mktme_fatal("cannot make a socket: %s", strerror(errno));
	if (connect(fd, (const struct sockaddr *)address, sizeof(*address)) < 0)
		mktme_fatal(
		        "cannot connect to the engine at %s: %s (is it running, and QEMU's user "
		        "allowed to?)",
		        address->sun_path, strerror(errno));
	if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout)) < 0 ||
	    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout)) < 0)
		mktme_fatal("cannot set the socket's timeout: %s", strerror(errno));
	return fd;
}

static void say_hello(int socket, struct message *message)
{
	const size_t descriptors_bytes = message->hello.descriptor_count * sizeof(int);
	struct iovec data = {.iov_base = message, .iov_len = message->hello.total_bytes};
	union {
		char buffer[CMSG_SPACE(sizeof(message->descriptors))];
		struct cmsghdr align;
	} control = {0};
	struct msghdr header = {
	        .msg_iov = &data,
	        .msg_iovlen = 1,
	        .msg_control = control.buffer,
	        .msg_controllen = CMSG_SPACE(descriptors_bytes),
	};
	struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
	ssize_t sent;

	rights->cmsg_level = SOL_SOCKET;
	rights->cmsg_type = SCM_RIGHTS;
	rights->cmsg_len = CMSG_LEN(descriptors_bytes);
	memcpy(CMSG_DATA(rights), message->descriptors, descriptors_bytes);
	do
		sent = sendmsg(socket, &header, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	if (sent < 0)
		mktme_fatal("cannot send guest RAM to the engine: %s", strerror(errno));
}

static void await_answer(int socket)
{
	struct {
		struct mktme_answer head;
		char reason[MKTME_MAX_REASON_BYTES];
	} answer;
	ssize_t got;

	do
		got = recv(socket, &answer, sizeof(answer), MSG_TRUNC);
	while (got < 0 && errno == EINTR);
	if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
		mktme_fatal("the engine did not answer within %d s", ANSWER_TIMEOUT_S);
	if (got < 0)
		mktme_fatal("cannot receive the engine's answer: %s", strerror(errno));
	if (got == 0)
		mktme_fatal("the engine closed the connection without an answer");
	if ((size_t)got < sizeof(answer.head) || (size_t)got > sizeof(answer) ||
	    memcmp(answer.head.magic, MKTME_ANSWER_MAGIC, sizeof(answer.head.magic)) != 0 ||
	    answer.head.version != MKTME_LINK_VERSION ||
	    answer.head.reason_bytes != (size_t)got - sizeof(answer.head))
		mktme_fatal("the engine's answer is not of protocol version %d",
		            MKTME_LINK_VERSION);
	if (answer.head.status != 0)
		mktme_fatal("the engine refused: %.*s", (int)answer.head.reason_bytes,
		            answer.reason);
}

/*
 * QEMU ends here when the engine does. When QEMU ends first, this thread ends with it and the
 * engine sees the connection close.
 */
static void *watch_engine(void *argument)
{
	struct pollfd engine = {.fd = (int)(intptr_t)argument, .events = POLLRDHUP};

	prctl(PR_SET_NAME, "mktme-link");
	while (poll(&engine, 1, -1) < 0 && errno == EINTR)
		;
	mktme_fatal("the engine is gone; stopping QEMU so that the guest does not run unprotected");
}

static void start_watcher(int socket)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	pthread_t thread;
	int error;

	/* QEMU's signals are for QEMU's threads. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	error = pthread_create(&thread, &attributes, watch_engine, (void *)(intptr_t)socket);
	pthread_attr_destroy(&attributes);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (error)
		mktme_fatal("cannot start a thread: %s", strerror(error));
}

/*
 * Every descriptor made here stays open for life. The engine has copies, but were ours closed when
 * it dies, the userfaultfd would be gone with the last of them: the guest would read zeros in place
 * of its memory. As it is, whoever needs a page waits, until watch_engine ends QEMU.
 */
void mktme_ram_link_init(const struct mktme_link_options *options, struct mktme_ram_link *ret)
{
	struct ram_block blocks[MKTME_MAX_BLOCKS];
	const size_t block_count = find_ram(blocks);
	struct mktme_hello_block hello_blocks[MKTME_MAX_BLOCKS];
	struct message message = {0};
	struct mktme_hello *hello = &message.hello;
	uint8_t *tail = message.tail;
	uint64_t ram_bytes = 0;

	memcpy(hello->magic, MKTME_HELLO_MAGIC, sizeof(hello->magic));
	hello->version = MKTME_LINK_VERSION;
	hello->plugin_api = MKTME_QEMU_API;
	hello->vcpus = (uint16_t)options->vcpus;
	hello->page_bytes = MKTME_PAGE_BYTES;
	memcpy(hello->vm_uuid, options->vm_uuid, sizeof(hello->vm_uuid));

	hello->block_count = (uint16_t)block_count;
	for (size_t i = 0; i < block_count; i++) {
		hello_blocks[i] = (struct mktme_hello_block){
		        .host_address = blocks[i].host_address,
		        .size_bytes = blocks[i].size_bytes,
		};
		message.descriptors[hello->descriptor_count++] = blocks[i].fd;
		ram_bytes += blocks[i].size_bytes;
	}
	tail = mempcpy(tail, hello_blocks, block_count * sizeof(hello_blocks[0]));

	ret->segment_count = lay_out(options, blocks, block_count, ret->segments);
	hello->segment_count = (uint16_t)ret->segment_count;
	tail = mempcpy(tail, ret->segments, ret->segment_count * sizeof(ret->segments[0]));
	hello->total_bytes = (uint32_t)(tail - (uint8_t *)&message);

	if (options->take_faults) {
		check_inline(blocks, block_count);
		hello->capabilities |= MKTME_CAPABILITY_FAULTS;
		/* From here on nothing gets into RAM but through the engine. */
		message.descriptors[hello->descriptor_count++] =
		        mktme_take_faults(hello_blocks, block_count);
	}
	if (options->track_pages) {
		hello->capabilities |= MKTME_CAPABILITY_PAGES;
		message.descriptors[hello->descriptor_count++] =
		        mktme_track_writes(hello_blocks, block_count);
		message.descriptors[hello->descriptor_count++] = open_pagemap();
	}
	if (options->track_stores) {
		int error = mktme_store_map_init(ram_bytes / MKTME_LINE_BYTES, options->vcpus,
		                                 &ret->store_map);

		if (error)
			mktme_fatal("cannot make the store map: %s", strerror(error));
		hello->capabilities |= MKTME_CAPABILITY_STORES;
		hello->store_map_bytes = ret->store_map.size_bytes;
		message.descriptors[hello->descriptor_count++] = ret->store_map.fd;
	}

	if (options->share_registers) {
		hello->capabilities |= MKTME_CAPABILITY_REGISTERS;
		message.descriptors[hello->descriptor_count++] = make_registers(&ret->registers);
	}

	ret->socket = connect_to_engine(&options->engine);
	say_hello(ret->socket, &message);
	await_answer(ret->socket);
	if (options->share_registers)
		check_registers(ret->registers);
	start_watcher(ret->socket);
}
