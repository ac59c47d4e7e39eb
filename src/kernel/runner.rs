//! The only code of ours that ever runs in a target: a loop over the steps of a batch, and the way home.
//!
//! The window, a shared mapping of which keeper and target both have a view, begins with [`CODE_SIZE`] bytes of
//! code, then a [`Control`] block, then steps and data. The runner executes system calls and memory copies, stops
//! with a signal to itself for its tracer, and when it is resumed, or finds its tracer dead instead, puts back the thread's
//! signal mask, flags and registers and jumps to where the thread was. It uses general registers only, so the
//! extended state of the thread stays as it is, and no stack but the window's.
#![allow(unsafe_code)]

use std::arch::global_asm;

use super::ptrace::Registers;

/// Bytes at the start of the window for the runner's code; the control block follows.
pub const CODE_SIZE: usize = 1024;

/// Set by the kernel in the lock word of a robust futex whose owner died (`FUTEX_OWNER_DIED`).
const OWNER_DIED: u32 = 0x4000_0000;

global_asm!(
    ".pushsection .rodata",
    ".balign 16",
    ".globl snapback_runner_start",
    ".globl snapback_runner_end",
    "snapback_runner_start:",
    "    mov r13, [rip + snapback_runner_start + {control} + {steps}]",
    "    mov r14, [rip + snapback_runner_start + {control} + {count}]",
    "2:  test r14, r14",
    "    jz 9f",
    "    mov r15d, [r13 + 4]",
    "    mov rdi, [r13 + 16]",
    "    test r15d, 1",
    "    jz 3f",
    "    mov rdi, [rdi]",
    "3:  mov rsi, [r13 + 24]",
    "    test r15d, 2",
    "    jz 3f",
    "    mov rsi, [rsi]",
    "3:  mov rdx, [r13 + 32]",
    "    test r15d, 4",
    "    jz 3f",
    "    mov rdx, [rdx]",
    "3:  mov r10, [r13 + 40]",
    "    test r15d, 8",
    "    jz 3f",
    "    mov r10, [r10]",
    "3:  mov r8, [r13 + 48]",
    "    test r15d, 16",
    "    jz 3f",
    "    mov r8, [r8]",
    "3:  mov r9, [r13 + 56]",
    "    test r15d, 32",
    "    jz 3f",
    "    mov r9, [r9]",
    "3:  cmp dword ptr [r13], {op_copy}",
    "    je 5f",
    "    mov rax, [r13 + 8]",
    "    syscall",
    "    mov [r13 + 64], rax",
    "    test r15d, {required}",
    "    jz 6f",
    "    cmp rax, -4095",
    "    jae 9f",
    "    jmp 6f",
    "5:  mov rcx, rdx",
    "    rep movsb",
    "    mov qword ptr [r13 + 64], 0",
    "6:  add r13, {step_size}",
    "    dec r14",
    "    jmp 2b",
    "9:  mov eax, [rip + snapback_runner_start + {liveness}]",
    "    test eax, {owner_died}",
    "    jnz 7f",
    // Not `int3`: the kernel forces the signal of a trap, and for that sets its action to the default if the signal is
    // blocked or ignored. A signal that is sent reaches the tracer first and leaves the action alone.
    "    mov eax, {sys_gettid}",
    "    syscall",
    "    mov edi, eax",
    "    mov esi, {sigtrap}",
    "    mov eax, {sys_tkill}",
    "    mov dword ptr [rip + snapback_runner_start + {control} + {done}], 1",
    "    syscall",
    "7:  mov eax, {sys_rt_sigprocmask}",
    "    mov edi, 2",
    "    lea rsi, [rip + snapback_runner_start + {control} + {mask}]",
    "    xor edx, edx",
    "    mov r10d, 8",
    "    syscall",
    "    lea rsp, [rip + snapback_runner_start + {control} + {flags}]",
    "    popfq",
    "    mov rax, [rip + snapback_runner_start + {control} + {home} + 0]",
    "    mov rbx, [rip + snapback_runner_start + {control} + {home} + 8]",
    "    mov rcx, [rip + snapback_runner_start + {control} + {home} + 16]",
    "    mov rdx, [rip + snapback_runner_start + {control} + {home} + 24]",
    "    mov rsi, [rip + snapback_runner_start + {control} + {home} + 32]",
    "    mov rdi, [rip + snapback_runner_start + {control} + {home} + 40]",
    "    mov rbp, [rip + snapback_runner_start + {control} + {home} + 48]",
    "    mov r8, [rip + snapback_runner_start + {control} + {home} + 56]",
    "    mov r9, [rip + snapback_runner_start + {control} + {home} + 64]",
    "    mov r10, [rip + snapback_runner_start + {control} + {home} + 72]",
    "    mov r11, [rip + snapback_runner_start + {control} + {home} + 80]",
    "    mov r12, [rip + snapback_runner_start + {control} + {home} + 88]",
    "    mov r13, [rip + snapback_runner_start + {control} + {home} + 96]",
    "    mov r14, [rip + snapback_runner_start + {control} + {home} + 104]",
    "    mov r15, [rip + snapback_runner_start + {control} + {home} + 112]",
    "    mov rsp, [rip + snapback_runner_start + {control} + {home} + 120]",
    "    jmp [rip + snapback_runner_start + {control} + {home} + 128]",
    "snapback_runner_end:",
    ".popsection",
    control = const CODE_SIZE,
    liveness = const LIVENESS_OFFSET,
    steps = const std::mem::offset_of!(Control, steps),
    count = const std::mem::offset_of!(Control, count),
    mask = const std::mem::offset_of!(Control, mask),
    flags = const std::mem::offset_of!(Control, flags),
    home = const std::mem::offset_of!(Control, home),
    op_copy = const OP_COPY,
    required = const REQUIRED,
    step_size = const size_of::<Step>(),
    owner_died = const OWNER_DIED,
    done = const std::mem::offset_of!(Control, done),
    sigtrap = const libc::SIGTRAP,
    sys_gettid = const libc::SYS_gettid,
    sys_tkill = const libc::SYS_tkill,
    sys_rt_sigprocmask = const libc::SYS_rt_sigprocmask,
);

unsafe extern "C" {
    static snapback_runner_start: u8;
    static snapback_runner_end: u8;
}

/// The runner's code, to be placed at the very start of a window.
pub fn code() -> &'static [u8] {
    let start = &raw const snapback_runner_start;
    let end = &raw const snapback_runner_end;
    // SAFETY: both symbols are defined by the assembly above, in this order, in one read-only section.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// One step of a batch as the runner reads it.
#[repr(C)]
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    zerocopy::IntoBytes,
    zerocopy::FromBytes,
    zerocopy::Immutable,
)]
pub struct Step {
    /// [`OP_CALL`] or [`OP_COPY`].
    pub op: u32,
    /// Bits 0 to 5: that argument is the address of the value to use. [`REQUIRED`].
    pub flags: u32,
    /// Number of the system call.
    pub number: u64,
    /// Arguments of the call; of a copy: destination, source, length.
    pub arguments: [u64; 6],
    /// What the call returned, set by the runner.
    pub result: u64,
}

/// A system call.
pub const OP_CALL: u32 = 0;
/// A memory copy.
pub const OP_COPY: u32 = 1;
/// In [`Step::flags`]: if this call fails the rest of the batch is skipped.
pub const REQUIRED: u32 = 1 << 8;

/// Bytes from the start of the window to the part that the target may only read. It begins with the page of the
/// tracer's liveness lock; the page store follows.
pub const LIVENESS_OFFSET: usize = 1 << 20;

/// What the runner knows besides its steps.
#[repr(C)]
#[derive(Debug, Clone, Copy, zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::Immutable)]
pub struct Control {
    /// Address of the first step in the target.
    pub steps: u64,
    /// Number of steps.
    pub count: u64,
    /// The signal mask to go home with.
    pub mask: u64,
    /// The flags register to go home with.
    pub flags: u64,
    /// The registers to go home with, `rip` last.
    pub home: [u64; 17],
    /// Set by the runner to 1 before it stops.
    pub done: u64,
}

/// The signals that are blocked while the runner runs: all but the one by which it stops.
pub const BLOCKED: u64 = !(1 << (libc::SIGTRAP - 1));

/// The registers a thread goes home with if its tracer dies: those of `regs`, with the restart of an interrupted
/// system call done here, since the kernel only does it on the way out of that call.
pub fn home(regs: &Registers) -> ([u64; 17], u64) {
    let mut rax = regs.rax;
    let mut rip = regs.rip;
    if regs.orig_rax as i64 >= 0 {
        match -(regs.rax as i64) {
            ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => (rax, rip) = (regs.orig_rax, rip - 2),
            ERESTART_RESTARTBLOCK => (rax, rip) = (libc::SYS_restart_syscall as u64, rip - 2),
            _ => {}
        }
    }
    let home = [
        rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15, regs.rsp, rip,
    ];
    (home, regs.eflags)
}

/// The kernel's own restart codes (`include/linux/errno.h`), seen in `rax` of a thread stopped in a system call.
pub const ERESTARTSYS: i64 = 512;
/// Restart always.
pub const ERESTARTNOINTR: i64 = 513;
/// Restart if there is no handler to run.
pub const ERESTARTNOHAND: i64 = 514;
/// Restart by restart_syscall(2) from the thread's restart block.
pub const ERESTART_RESTARTBLOCK: i64 = 516;

/// Whether a stopped thread is in a system call that goes on by restart_syscall(2).
pub fn goes_on_by_block(regs: &Registers) -> bool {
    regs.orig_rax as i64 >= 0 && regs.rax as i64 == -ERESTART_RESTARTBLOCK
}

/// Code that makes up to four system calls, leaves their results in `r12` to `r15` and stops with `int3`. The task it
/// runs in never runs on by itself.
pub fn calls(calls: &[(libc::c_long, [u64; 3])]) -> Vec<u8> {
    assert!(calls.len() <= 4, "there are four registers for results");
    let mut code = Vec::new();
    for ((number, [rdi, rsi, rdx]), result_register) in calls.iter().zip([0xc4, 0xc5, 0xc6, 0xc7]) {
        for (opcode, value) in [
            (0xb8, *number as u64),
            (0xbf, *rdi),
            (0xbe, *rsi),
            (0xba, *rdx),
        ] {
            code.extend([0x48, opcode]); // movabs
            code.extend(value.to_le_bytes());
        }
        code.extend([0x0f, 0x05]); // syscall
        code.extend([0x49, 0x89, result_register]); // mov r12.., rax
    }
    code.push(0xcc); // int3
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_fits_its_place() {
        assert!(!code().is_empty() && code().len() <= CODE_SIZE);
    }

    #[test]
    fn the_layout_is_what_the_assembly_assumes() {
        assert_eq!(size_of::<Step>(), 72);
        assert_eq!(std::mem::offset_of!(Step, result), 64);
        assert_eq!(std::mem::offset_of!(Control, steps), 0);
    }
}
