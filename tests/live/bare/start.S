/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Into 64-bit mode: the first processor from PVH's entry, in 32-bit protected mode without paging
 * (Xen docs/misc/pvh.pandoc), the second from its start-up IPI. All of 4 GiB is mapped to itself,
 * for all privilege levels.
 */
#define TRAMPOLINE 0x8000
#define STACK_BYTES 0x4000

	.section .note.Xen, "a", @note
	.long	4, 8, 18                        /* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz	"Xen"
	.quad	start

	.text
	.code32
	.globl	start
start:
	movl	$pml4, %edi
	movl	$pdpt + 7, (%edi)
	movl	$pdpt, %edi
	movl	$directories + 7, %eax
	movl	$4, %ecx
1:	movl	%eax, (%edi)
	addl	$0x1000, %eax
	addl	$8, %edi
	loop	1b
	movl	$directories, %edi
	movl	$0x87, %eax                     /* present, writable, user, 2 MiB */
	movl	$2048, %ecx
2:	movl	%eax, (%edi)
	addl	$0x200000, %eax
	addl	$8, %edi
	loop	2b
	movl	$trampoline, %esi
	movl	$TRAMPOLINE, %edi
	movl	$trampoline_end - trampoline, %ecx
	rep movsb
	movl	$first_stack + STACK_BYTES, %esp
	movl	$first_main, %ebx
	jmp	enable_paging

protected_mode:
	movl	$0x10, %eax
	movl	%eax, %ds
	movl	%eax, %ss
	movl	$second_stack + STACK_BYTES, %esp
	movl	$second_main, %ebx
enable_paging:
	lgdt	gdt_pointer
	movl	$pml4, %eax
	movl	%eax, %cr3
	movl	%cr4, %eax
	orl	$0x620, %eax                    /* PAE, OSFXSR, OSXMMEXCPT */
	movl	%eax, %cr4
	movl	$0xc0000080, %ecx               /* EFER: LME */
	rdmsr
	orl	$0x100, %eax
	wrmsr
	movl	%cr0, %eax
	orl	$0x80000001, %eax               /* PG, PE */
	movl	%eax, %cr0
	ljmp	$0x08, $long_mode

	.code64
long_mode:
	movl	$0x10, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	movl	%ebx, %ebx
	call	*%rbx
3:	hlt
	jmp	3b

/* All exceptions end in on_exception, with what they had pushed and all registers. */
	.globl	undefined_opcode, general_protection
undefined_opcode:
	pushq	$0
	pushq	$6
	jmp	exception
general_protection:
	pushq	$13
exception:
	.irp	register, rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15
	pushq	%\register
	.endr
	movq	%rsp, %rdi
	cld
	call	on_exception
	.irp	register, r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax
	popq	%\register
	.endr
	addq	$16, %rsp
	iretq

	.code16
trampoline:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	lgdtl	TRAMPOLINE + trampoline_gdt_pointer - trampoline
	movl	%cr0, %eax
	orl	$1, %eax
	movl	%eax, %cr0
	ljmpl	$0x18, $protected_mode
	.balign	4
trampoline_gdt_pointer:
	.word	gdt_end - gdt - 1
	.long	gdt
trampoline_end:

	.data
	.balign	8
	.globl	gdt, exception_stack_end
gdt:	.quad	0
	.quad	0x00af9b000000ffff              /* 08: 64-bit code */
	.quad	0x00cf93000000ffff              /* 10: data */
	.quad	0x00cf9b000000ffff              /* 18: 32-bit code */
	.quad	0x00affb000000ffff              /* 20: 64-bit code, level 3 */
	.quad	0x00cff3000000ffff              /* 28: data, level 3 */
	.quad	0, 0                            /* 30: the task, of the first processor */
gdt_end:
gdt_pointer:
	.word	gdt_end - gdt - 1
	.long	gdt

	.bss
	.balign	0x1000
pml4:	.skip	0x1000
pdpt:	.skip	0x1000
directories:
	.skip	0x4000
first_stack:
	.skip	STACK_BYTES
second_stack:
	.skip	STACK_BYTES
	.skip	STACK_BYTES
exception_stack_end:

	.section .note.GNU-stack, "", @progbits
