/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The end of QEMU: whatever goes wrong once it runs, the guest must never run unprotected. */
#ifndef MKTME_FATAL_H
#define MKTME_FATAL_H

/* Say why on standard error, and stop QEMU with exit status 70 (EX_SOFTWARE). */
_Noreturn __attribute__((format(printf, 1, 2))) void mktme_fatal(const char *format, ...);

#endif
