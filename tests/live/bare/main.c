/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A kernel that executes what its first serial port asks for, on either of two processors, and
 * tells how each instruction ended:
 *
 *     CPU cpuid LEAF SUBLEAF
 *     CPU rdmsr MSR
 *     CPU Cpuid LEAF SUBLEAF
 *     CPU Rdmsr MSR
 *     CPU wrmsr MSR VALUE
 *     CPU pconfig LEAF OFFSET KEYID CONTROL RESERVED DATA_KEY TWEAK_KEY
 *
 * With a capital they are alone in their block, for QEMU: they follow a load of SS, and what is
 * behind them was executed before, as a block of its own.
 * CPU 2 is the first one again, at privilege level 3, where the last three raise exceptions.
 * Numbers are hexadecimal; OFFSET is added to an aligned RBX, RESERVED is a byte at offset 6 of
 * MKTME_KEY_PROGRAM_STRUCT, and keys are bytes, or - for none. It answers with a line
 *
 *     done RAX RBX RCX RDX RFLAGS
 *     #VECTOR ERROR_CODE RAX RBX RCX RDX RFLAGS
 *
 * RFLAGS are those behind the instruction, or those that the exception pushed; an exception that is
 * not at the instruction is "lost". Before each of them come an exception and a comparison, for its
 * flags (CF, PF, AF, SF), which no other but PCONFIG changes.
 */
#include <stdint.h>

#define COM1        0x3f8
#define LAPIC       0xfee00000u
#define LAPIC_ID    0x20
#define LAPIC_ICR   0x300
#define ICR_INIT    0xc4500 /* To all but this one. */
#define ICR_STARTUP 0xc4608 /* At 8000h. */

struct operation {
	char name; /* Its first character. */
	uint64_t rax, rbx, rcx, rdx;
	uint64_t rflags;
	uint64_t at, resume; /* The instruction, and what is behind it. */
	uint64_t vector;     /* 0: none. */
	uint64_t error_code;
	uint64_t rsp; /* At privilege level 3: where to return to. */
};

struct registers {
	uint64_t r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
	uint64_t vector, error_code, rip, cs, rflags, rsp, ss;
};

struct gate {
	uint16_t offset_low, selector;
	uint8_t ist, type;
	uint16_t offset_middle;
	uint32_t offset_high, reserved;
};

struct task {
	uint32_t reserved;
	uint64_t rsp0;
	uint8_t rest[92];
} __attribute__((packed));

extern void undefined_opcode(void), general_protection(void);
extern uint64_t gdt[];
extern uint8_t exception_stack_end[];
void first_main(void), second_main(void), on_exception(struct registers *registers);

static struct gate idt[32] __attribute__((aligned(16)));
static struct task task;
static struct operation *current[2];
static struct operation *volatile request; /* For the second processor, until it is done. */
static volatile int second_is_up;
static uint8_t program[512] __attribute__((aligned(256)));

static uint8_t in(uint16_t port)
{
	uint8_t value;

	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static void put(char character)
{
	while (!(in(COM1 + 5) & 0x20))
		;
	__asm__ volatile("outb %0, %1" ::"a"(character), "Nd"((uint16_t)COM1));
}

static char get(void)
{
	while (!(in(COM1 + 5) & 1))
		;
	return (char)in(COM1);
}

static void say(const char *text)
{
	while (*text)
		put(*text++);
}

static void say_number(uint64_t value)
{
	put(' ');
	for (int shift = 60; shift >= 0; shift -= 4) {
		if (value >> shift || shift == 0)
			put("0123456789abcdef"[value >> shift & 15]);
	}
}

static volatile uint32_t *lapic(uint32_t offset)
{
	return (volatile uint32_t *)(uintptr_t)(LAPIC + offset);
}

static unsigned int this_cpu(void)
{
	return *lapic(LAPIC_ID) >> 24;
}

static void set_gate(unsigned int vector, void (*handler)(void))
{
	uint64_t offset = (uintptr_t)handler;

	idt[vector] = (struct gate){
	        .offset_low = (uint16_t)offset,
	        .selector = 8,
	        .type = 0x8e,
	        .offset_middle = (uint16_t)(offset >> 16),
	        .offset_high = (uint32_t)(offset >> 32),
	};
}

static void load_idt(void)
{
	struct {
		uint16_t limit;
		uint64_t base;
	} __attribute__((packed)) pointer = {sizeof(idt) - 1, (uintptr_t)idt};

	__asm__ volatile("lidt %0" ::"m"(pointer));
}

/* The stack for exceptions at privilege level 3. */
static void load_task(void)
{
	uint64_t base = (uintptr_t)&task;

	task.rsp0 = (uintptr_t)exception_stack_end;
	gdt[6] = (sizeof(task) - 1) | (base & 0xffffff) << 16 | UINT64_C(0x89) << 40 |
	         (base >> 24 & 0xff) << 56;
	gdt[7] = base >> 32;
	__asm__ volatile("ltr %w0" ::"r"(0x30));
}

void on_exception(struct registers *registers)
{
	struct operation *operation = current[this_cpu()];

	operation->vector = registers->rip == operation->at ? registers->vector : 255;
	operation->error_code = registers->error_code;
	operation->rflags = registers->rflags;
	registers->rip = operation->resume;
	if (registers->cs & 3) {
		registers->cs = 0x08;
		registers->ss = 0x10;
		registers->rsp = operation->rsp;
	}
}

#define EXECUTE(operation, instruction)                                                            \
	__asm__ volatile("leaq 1f(%%rip), %%r8\n\t"                                                \
	                 "movq %%r8, %[at]\n\t"                                                    \
	                 "leaq 2f(%%rip), %%r8\n\t"                                                \
	                 "movq %%r8, %[resume]\n\t"                                                \
	                 "xorl %%r8d, %%r8d\n\t"                                                   \
	                 "cmpq $1, %%r8\n\t"                                                       \
	                 "1:" instruction "\n\t"                                                   \
	                 "pushfq\n\t"                                                              \
	                 "popq %[rflags]\n\t"                                                      \
	                 "2:\n\t"                                                                  \
	                 : "+a"((operation)->rax), "+b"((operation)->rbx), "+c"((operation)->rcx), \
	                   "+d"((operation)->rdx), [rflags] "+m"((operation)->rflags),             \
	                   [at] "=m"((operation)->at), [resume] "=m"((operation)->resume)          \
	                 :                                                                         \
	                 : "r8", "r9", "cc", "memory")

#define EXECUTE_AS_USER(operation, instruction)                                                    \
	__asm__ volatile("leaq 1f(%%rip), %%r8\n\t"                                                \
	                 "movq %%r8, %[at]\n\t"                                                    \
	                 "leaq 2f(%%rip), %%r9\n\t"                                                \
	                 "movq %%r9, %[resume]\n\t"                                                \
	                 "movq %%rsp, %%r9\n\t"                                                    \
	                 "movq %%r9, %[rsp]\n\t"                                                   \
	                 "pushq $0x2b\n\t"                                                         \
	                 "pushq %%r9\n\t"                                                          \
	                 "pushq $0x97\n\t"                                                         \
	                 "pushq $0x23\n\t"                                                         \
	                 "pushq %%r8\n\t"                                                          \
	                 "iretq\n\t"                                                               \
	                 "1:" instruction "\n\t"                                                   \
	                 "ud2\n\t"                                                                 \
	                 "2:\n\t"                                                                  \
	                 : "+a"((operation)->rax), "+b"((operation)->rbx), "+c"((operation)->rcx), \
	                   "+d"((operation)->rdx), [at] "=m"((operation)->at),                     \
	                   [resume] "=m"((operation)->resume), [rsp] "=m"((operation)->rsp)        \
	                 :                                                                         \
	                 : "r8", "r9", "cc", "memory")

static void execute_as_user(struct operation *operation)
{
	current[0] = operation;
	switch (operation->name) {
	case 'r':
		EXECUTE_AS_USER(operation, "rdmsr");
		break;
	case 'w':
		EXECUTE_AS_USER(operation, "wrmsr");
		break;
	case 'p':
		EXECUTE_AS_USER(operation, ".byte 0x0f, 0x01, 0xc5");
		break;
	}
}

static uint64_t skip __attribute__((used));

#define ALONE(instruction)                                                                         \
	"movq %%rcx, %%r9\n\t"                                                                     \
	"movq skip(%%rip), %%rcx\n\t"                                                              \
	"jrcxz 4f\n\t"                                                                             \
	"movq %%r9, %%rcx\n\t"                                                                     \
	"jmp 3f\n\t"                                                                               \
	"4: movq %%r9, %%rcx\n\t"                                                                  \
	"movl %%ss, %%r8d\n\t"                                                                     \
	"movl %%r8d, %%ss\n\t" instruction "\n\t"                                                  \
	"3:\n\t"

static __attribute__((noinline, noclone)) void execute_alone(struct operation *operation)
{
	if (operation->name == 'C')
		EXECUTE(operation, ALONE("cpuid"));
	else
		EXECUTE(operation, ALONE("rdmsr"));
}

static void execute(struct operation *operation)
{
	struct operation warm_up = {0};

	current[this_cpu()] = &warm_up;
	EXECUTE(&warm_up, "ud2");
	current[this_cpu()] = operation;
	switch (operation->name) {
	case 'c':
		EXECUTE(operation, "cpuid");
		break;
	case 'r':
		EXECUTE(operation, "rdmsr");
		break;
	case 'w':
		EXECUTE(operation, "wrmsr");
		break;
	case 'p':
		EXECUTE(operation, ".byte 0x0f, 0x01, 0xc5");
		break;
	case 'C':
	case 'R':
		warm_up = *operation;
		skip = 1;
		execute_alone(&warm_up);
		skip = 0;
		execute_alone(operation);
		break;
	}
}

static int digit(char character)
{
	if (character >= '0' && character <= '9')
		return character - '0';
	return character >= 'a' && character <= 'f' ? character - 'a' + 10 : -1;
}

/* The next word of a line, whose end stays. */
static char *word(char **line)
{
	char *start = *line;

	while (**line > ' ')
		(*line)++;
	if (**line)
		*(*line)++ = '\0';
	return start;
}

static uint64_t number(char **line)
{
	uint64_t value = 0;

	for (const char *one = word(line); digit(*one) >= 0; one++)
		value = value << 4 | (unsigned int)digit(*one);
	return value;
}

static void key(char **line, uint8_t *field)
{
	for (const char *one = word(line); digit(*one) >= 0; one += 2)
		*field++ = (uint8_t)(digit(one[0]) << 4 | digit(one[1]));
}

static void read_program(char **line, struct operation *operation)
{
	uint64_t offset, keyid, control;

	operation->rax = number(line);
	offset = number(line);
	keyid = number(line);
	control = number(line);
	for (unsigned int i = 0; i < sizeof(program); i++)
		program[i] = 0;
	program[offset] = (uint8_t)keyid;
	program[offset + 1] = (uint8_t)(keyid >> 8);
	for (int i = 0; i < 4; i++)
		program[offset + 2 + i] = (uint8_t)(control >> 8 * i);
	program[offset + 6] = (uint8_t)number(line);
	key(line, program + offset + 64);
	key(line, program + offset + 128);
	operation->rbx = (uintptr_t)program + offset;
	/* What must come through: nothing but RAX and flags changes. */
	operation->rcx = 0x1111111111111111;
	operation->rdx = 0x2222222222222222;
}

static void obey(char *line)
{
	struct operation operation = {0};
	uint64_t cpu = number(&line);

	operation.name = *word(&line);
	switch (operation.name) {
	case 'c':
	case 'C':
		operation.rax = number(&line);
		operation.rcx = number(&line);
		break;
	case 'r':
	case 'R':
		operation.rcx = number(&line);
		operation.rdx = 0x2222222222222222;
		break;
	case 'w':
		operation.rcx = number(&line);
		operation.rax = number(&line);
		operation.rdx = operation.rax >> 32;
		break;
	case 'p':
		read_program(&line, &operation);
		break;
	}
	if (cpu == 0) {
		execute(&operation);
	} else if (cpu == 2) {
		execute_as_user(&operation);
	} else {
		request = &operation;
		while (request)
			__asm__ volatile("pause" ::: "memory");
	}
	if (operation.vector == 0) {
		say("done");
	} else if (operation.vector == 255) {
		say("lost");
	} else {
		say(operation.vector == 6 ? "#UD" : "#GP");
		say_number(operation.error_code);
	}
	say_number(operation.rax);
	say_number(operation.rbx == (uintptr_t)program ? 0 : operation.rbx);
	say_number(operation.rcx);
	say_number(operation.rdx);
	say_number(operation.rflags);
	say("\n");
}

void second_main(void)
{
	load_idt();
	second_is_up = 1;
	for (;;) {
		while (!request)
			__asm__ volatile("pause" ::: "memory");
		execute(request);
		request = 0;
	}
}

void first_main(void)
{
	static char line[512];

	set_gate(6, undefined_opcode);
	set_gate(13, general_protection);
	load_idt();
	load_task();
	*lapic(LAPIC_ICR) = ICR_INIT;
	*lapic(LAPIC_ICR) = ICR_STARTUP;
	while (!second_is_up)
		__asm__ volatile("pause" ::: "memory");
	say("bare kernel ready\n");
	for (;;) {
		unsigned int size = 0;
		char one;

		while ((one = get()) != '\n') {
			if (one != '\r' && size < sizeof(line) - 1)
				line[size++] = one;
		}
		line[size] = '\0';
		obey(line);
	}
}
