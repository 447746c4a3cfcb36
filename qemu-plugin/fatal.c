/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "fatal.h"

#include <stdarg.h>
#include <stdio.h>
#include <sysexits.h>
#include <unistd.h>

/*
 * _exit and not exit: QEMU's atexit handlers take locks that the threads they would interrupt hold,
 * and while they wait the guest goes on running.
 */
void mktme_fatal(const char *format, ...)
{
	char line[1024];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(line, sizeof(line), format, arguments);
	va_end(arguments);
	dprintf(STDERR_FILENO, "mktme: %s\n", line);
	_exit(EX_SOFTWARE);
}
