/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What root of a Linux guest finds in the registers of memory encryption, through the kernel's msr
 * module: `guest_msr /dev/cpu/0/msr ...` prints a line for each processor and register,
 *
 *     DEVICE MSR VALUE
 *     DEVICE MSR error NAME
 *
 * and then, for each processor, how a write to IA32_TME_EXCLUDE_MASK ends, which is locked:
 *
 *     DEVICE write done
 *     DEVICE write error NAME
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define EXCLUDE_MASK 0x983

static const off_t registers[] = {0x981, 0x982, 0x983, 0x984};

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		uint64_t value;
		int msrs = open(argv[i], O_RDWR);

		if (msrs < 0) {
			perror(argv[i]);
			return 1;
		}
		for (size_t j = 0; j < sizeof(registers) / sizeof(registers[0]); j++) {
			printf("%s %jx ", argv[i], (intmax_t)registers[j]);
			if (pread(msrs, &value, sizeof(value), registers[j]) == sizeof(value))
				printf("%" PRIx64 "\n", value);
			else
				printf("error %s\n", strerrorname_np(errno));
		}
		value = 1 << 11;
		if (pwrite(msrs, &value, sizeof(value), EXCLUDE_MASK) == sizeof(value))
			printf("%s write done\n", argv[i]);
		else
			printf("%s write error %s\n", argv[i], strerrorname_np(errno));
		close(msrs);
	}
	return 0;
}
