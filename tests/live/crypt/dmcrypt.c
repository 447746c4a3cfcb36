// SPDX-License-Identifier: GPL-2.0-or-later
// dmcrypt DEVICE SECTORS KEY: make /dev/dm-0, DEVICE under dm-crypt with aes-xts-plain64. KEY is in
// hexadecimal, data key then tweak key.
//
// What cryptsetup(8) would ask the kernel for, without the libraries that it needs: an initramfs
// has none of them. Documentation/admin-guide/device-mapper/dm-crypt.rst has the table's line.

#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

struct request {
	struct dm_ioctl head;
	struct dm_target_spec target;
	char line[512];
};

static void ask(int control, unsigned long what, struct request *request)
{
	request->head.version[0] = DM_VERSION_MAJOR;
	request->head.data_size = sizeof(*request);
	strcpy(request->head.name, "crypt");
	if (ioctl(control, what, request)) {
		perror("dmcrypt");
		exit(1);
	}
}

int main(int argc, char **argv)
{
	struct request create = {0}, table = {0}, resume = {0};
	int control = open("/dev/mapper/control", O_RDWR);

	if (control < 0 || argc != 4) {
		fprintf(stderr, "dmcrypt: no device mapper, or not three arguments\n");
		return 1;
	}
	ask(control, DM_DEV_CREATE, &create);
	table.head.data_start = offsetof(struct request, target);
	table.head.target_count = 1;
	table.target.length = strtoull(argv[2], NULL, 10);
	strcpy(table.target.target_type, "crypt");
	snprintf(table.line, sizeof(table.line), "aes-xts-plain64 %s 0 %s 0", argv[3], argv[1]);
	ask(control, DM_TABLE_LOAD, &table);
	ask(control, DM_DEV_SUSPEND, &resume); // without the flag, that resumes
	memset(argv[3], 0, strlen(argv[3]));
	return 0;
}
