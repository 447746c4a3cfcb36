/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "userfaultfd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "fatal.h"

/* linux/userfaultfd.h of Linux 6.7, for older headers (Debian 12 has those of 6.1). */
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif

/*
 * The device gives one that stops the kernel's own faults, too. Without access to it the system
 * call does so for CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1, and with UFFD_USER_MODE_ONLY
 * (Linux 5.11) in FLAGS gives anyone one that does not. Returns -1 and errno if there is none.
 */
static int open_userfaultfd(int flags)
{
	const int always = O_CLOEXEC | O_NONBLOCK;
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	int fd;

	if (device >= 0) {
		fd = ioctl(device, USERFAULTFD_IOC_NEW, always);
		close(device);
		if (fd >= 0)
			return fd;
	}
	return (int)syscall(SYS_userfaultfd, always | flags);
}

static void register_blocks(int fd, const struct mktme_hello_block *blocks, size_t block_count,
                            uint64_t mode)
{
	for (size_t i = 0; i < block_count; i++) {
		struct uffdio_register range = {
		        .range = {.start = blocks[i].host_address, .len = blocks[i].size_bytes},
		        .mode = mode,
		};

		if (ioctl(fd, UFFDIO_REGISTER, &range) < 0)
			mktme_fatal("cannot watch guest RAM: %s (does something else in QEMU, such "
			            "as a background snapshot, use userfaultfd?)",
			            strerror(errno));
	}
}

int mktme_track_writes(const struct mktme_hello_block *blocks, size_t block_count)
{
	struct uffdio_api api = {
	        .api = UFFD_API,
	        .features = UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED |
		            UFFD_FEATURE_WP_ASYNC,
	};
	/*
	 * WP_ASYNC stops no fault at all, it only takes notes, so those of the kernel are in them
	 * nevertheless.
	 */
	int fd = open_userfaultfd(UFFD_USER_MODE_ONLY);

	if (fd < 0)
		mktme_fatal("cannot make a userfaultfd: %s (allow QEMU's user to open "
		            "/dev/userfaultfd, or use track=stores)",
		            strerror(errno));
	if (ioctl(fd, UFFDIO_API, &api) < 0)
		mktme_fatal("the kernel has no asynchronous write tracking: %s (it needs Linux "
		            "6.7; on an older one use track=stores)",
		            strerror(errno));
	register_blocks(fd, blocks, block_count, UFFDIO_REGISTER_MODE_WP);
	return fd;
}

/*
 * When khugepaged joins pages to a huge one it fills the holes among them with zeros, which the
 * engine would never hear of. Since Linux 6.4 it leaves memory like ours alone by itself
 * ("mm/khugepaged: skip shmem with userfaultfd").
 */
static void forbid_huge_pages(const struct mktme_hello_block *block)
{
	/* EINVAL: a kernel without huge pages. */
	if (madvise((void *)(uintptr_t)block->host_address, block->size_bytes, MADV_NOHUGEPAGE) <
	            0 &&
	    errno != EINVAL)
		mktme_fatal("cannot keep huge pages out of guest RAM: %s", strerror(errno));
}

int mktme_take_faults(const struct mktme_hello_block *blocks, size_t block_count)
{
	struct uffdio_api api = {
	        .api = UFFD_API,
	        /*
		 * REMOVE: what QEMU gives back (balloon, free page reporting) is announced. EXACT:
		 * faults name the line and not just the page. WP: a page can be kept as it is while
		 * the engine takes it away.
		 */
	        .features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_EVENT_REMOVE |
		            UFFD_FEATURE_EXACT_ADDRESS | UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
	};
	/* Not UFFD_USER_MODE_ONLY: devices have system calls write to guest RAM. */
	int fd = open_userfaultfd(0);

	if (fd < 0)
		mktme_fatal("cannot make a userfaultfd that stops the kernel's own accesses to "
		            "guest RAM: %s (allow QEMU's user to open /dev/userfaultfd, or use "
		            "datapath=shadow)",
		            strerror(errno));
	if (ioctl(fd, UFFDIO_API, &api) < 0)
		mktme_fatal("the kernel cannot hold accesses to shared memory for the engine: %s "
		            "(it needs Linux 5.19; on an older one use datapath=shadow)",
		            strerror(errno));
	for (size_t i = 0; i < block_count; i++)
		forbid_huge_pages(&blocks[i]);
	register_blocks(fd, blocks, block_count,
	                UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP);
	return fd;
}
