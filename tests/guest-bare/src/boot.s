# From the PVH entry (32-bit protected mode, paging off, ebx = start info) to Rust code in ring 3.
#
# Ring 0 does as little as possible: some hypervisors emulate it instruction by instruction, while
# ring 3 runs at full speed everywhere. The permission bitmap of the task state lets ring 3 use the ports
# itself; I/O privilege level 3 would be simpler, but not every hypervisor honours it.

    .section .note.pvh, "a", @note
    .balign 4
    .long 4                     # length of the name
    .long 8                     # length of the value: QEMU reads 64 bits from a 64-bit ELF
    .long 18                    # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start

    .set USER_DATA, 0x18 | 3
    .set USER_CODE, 0x20 | 3
    .set TSS_SELECTOR, 0x28

    .section .text.boot, "ax", @progbits
    .code32
    .globl pvh_start
pvh_start:
    cli
    cld
    movl %ebx, start_info_address

    # The first GiB, in 2 MiB pages that ring 3 may use. Rust adds more when the guest has it.
    movl $page_directories, %edi
    movl $0x87, %eax            # present, writable, user, large
    movl $512, %ecx
1:  movl %eax, (%edi)
    movl $0, 4(%edi)
    addl $0x200000, %eax
    addl $8, %edi
    decl %ecx
    jnz 1b
    movl $page_directories, %eax
    orl $7, %eax
    movl %eax, page_directory_pointers
    movl $page_directory_pointers, %eax
    orl $7, %eax
    movl %eax, page_map

    # Long mode needs PAE; OSFXSR and OSXMMEXCPT let the compiler's SSE2 code run.
    movl %cr4, %eax
    orl $0x620, %eax
    movl %eax, %cr4
    movl $page_map, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    andl $~0x4, %eax            # no x87 emulation
    orl $0x80010022, %eax       # paging, write protect, numeric error, monitor coprocessor
    movl %eax, %cr0

    # The descriptor's fields are scattered, so the assembler cannot fill them in.
    movl $tss, %eax
    movw %ax, gdt + TSS_SELECTOR + 2
    shrl $16, %eax
    movb %al, gdt + TSS_SELECTOR + 4
    movb %ah, gdt + TSS_SELECTOR + 7

    lgdt gdt_pointer
    ljmp $0x08, $long_mode

    .code64
long_mode:
    movw $0x10, %ax
    movw %ax, %ss
    movw %ax, %ds
    movw %ax, %es
    movl $kernel_stack_top, %esp
    movw $TSS_SELECTOR, %ax
    ltr %ax
    lidt idt_pointer

    # To ring 3: SS, RSP, RFLAGS (interrupts off), CS, RIP.
    pushq $USER_DATA
    # As after a call: 16-byte aligned less the return address.
    pushq $(user_stack_top - 8)
    pushq $0x2
    pushq $USER_CODE
    pushq $user_main
    iretq

# General protection fault. Ring 3 raises it on purpose by `hlt`, which is not its to do: halt until the
# next timer tick, then go on behind the instruction. (Of the ways into ring 0 exceptions are the one that
# works under every hypervisor; some lack `syscall` and `int` for guests like this.)
    .globl halt_gate
halt_gate:
    addq $8, %rsp               # error code
    pushq %rax
    movq 8(%rsp), %rax
    cmpb $0xf4, (%rax)
    jne stuck
    incq 8(%rsp)
    popq %rax
    sti
    hlt
    cli
    iretq
stuck:
    hlt
    jmp stuck

# IRQ 0: it only has to end the hlt.
    .globl timer_gate
timer_gate:
    pushq %rax
    movb $0x20, %al
    outb %al, $0x20
    popq %rax
    iretq

    .section .data.boot, "aw", @progbits
    .balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # 0x08 ring 0 code, 64 bits
    .quad 0x00cf93000000ffff    # 0x10 ring 0 data
    .quad 0x00cff3000000ffff    # 0x18 ring 3 data
    .quad 0x00affb000000ffff    # 0x20 ring 3 code, 64 bits
    .quad 0x00008900000000e8    # 0x28 task state, base filled in above
    .quad 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad interrupt_gates
    .balign 16
tss:
    .long 0
    .quad kernel_stack_top      # stack of ring 0 when ring 3 is interrupted
    .fill 88, 1, 0
    .word 0
    .word 104                   # where the permission bitmap begins
    .fill 128, 1, 0             # ports below 0x400 are permitted
    .byte 0xff
    .globl start_info_address
    .balign 8
start_info_address:
    .quad 0

    .section .bss.boot, "aw", @nobits
    .balign 4096
page_map:
    .skip 4096
    .globl page_directory_pointers
page_directory_pointers:
    .skip 4096
    .globl page_directories
page_directories:
    .skip 4096 * 64
    .globl interrupt_gates
interrupt_gates:
    .skip 4096
kernel_stack:
    .skip 4096
kernel_stack_top:
    .skip 65536
user_stack_top:
