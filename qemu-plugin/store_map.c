/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "store_map.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int mktme_store_map_init(uint64_t line_count, unsigned int vcpus, struct mktme_store_map *ret)
{
	struct mktme_store_map map = {
	        .size_bytes = sizeof(struct mktme_store_map_header) + line_count,
	};
	int error;

	map.fd = memfd_create("mktme-store-map", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (map.fd < 0)
		return errno;
	/* Sealed, so that neither side can make the other fault by shrinking it. */
	if (ftruncate(map.fd, (off_t)map.size_bytes) < 0 ||
	    fcntl(map.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
		goto fail;
	map.header = mmap(NULL, map.size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, map.fd, 0);
	if (map.header == MAP_FAILED)
		goto fail;

	memcpy(map.header->magic, MKTME_STORE_MAP_MAGIC, sizeof(map.header->magic));
	map.header->version = MKTME_STORE_MAP_VERSION;
	map.header->vcpus = vcpus;
	map.header->line_count = line_count;
	map.header->header_bytes = sizeof(*map.header);
	map.lines = (uint8_t *)(map.header + 1);
	*ret = map;
	return 0;

fail:
	error = errno;
	close(map.fd);
	return error;
}
