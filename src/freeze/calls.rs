//! Which system calls go on by restart_syscall(2).
//!
//! A call with a time limit that a stop interrupts goes on as `restart_syscall`, from a restart block that the kernel keeps
//! in the task (`include/linux/restart_block.h`). Stopped again, the thread shows that number, and not the one of its call.
//! The restart block can't be recorded, so the call is recorded instead, whose number has to be remembered from the stop
//! before, or told by where the thread sleeps.

use std::collections::BTreeMap;

use nix::unistd::Pid;

use crate::kernel::procfs;
use crate::kernel::ptrace::Registers;
use crate::kernel::remote_memory::{self, Range};
use crate::kernel::runner::{ERESTART_RESTARTBLOCK, goes_on_by_block};

/// The calls that threads were in when they were stopped last.
#[derive(Debug, Default)]
pub(super) struct Calls(BTreeMap<Pid, Call>);

/// A call that was interrupted. While it goes on, nothing of this changes but what the kernel sees as its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Call {
    number: u64,
    /// Instruction and stack pointers, and arguments.
    place: [u64; 8],
}

impl Calls {
    /// Takes note of threads that have been stopped, all there are; forgets others.
    pub(super) fn note(&mut self, stopped: impl Iterator<Item = (Pid, Registers)>) {
        let was = std::mem::take(&mut self.0);
        let still = |(tid, registers): (Pid, Registers)| {
            if !goes_on_by_block(&registers) {
                return None;
            }
            if registers.orig_rax != RESTART {
                return Some((tid, Call::of(&registers, registers.orig_rax)));
            }
            let call = was.get(&tid)?;
            (call.place == place(&registers)).then_some((tid, *call))
        };
        self.0 = stopped.filter_map(still).collect();
    }

    /// The number of the call that a stopped thread is in, if it is in one; `None`: it is not known.
    pub(super) fn number(&self, tid: Pid, registers: &Registers) -> Option<u64> {
        if !goes_on_by_block(registers) || registers.orig_rax != RESTART {
            return Some(registers.orig_rax);
        }
        let call = self.0.get(&tid)?;
        (call.place == place(registers)).then_some(call.number)
    }

    /// Takes note of a thread that is made to wait in call `number`, interrupted with these registers.
    pub(super) fn enter(&mut self, tid: Pid, registers: &Registers, number: u64) {
        self.0.insert(tid, Call::of(registers, number));
    }

    /// Learns the number of a call that a thread was stopped in with these registers, and sleeps in again by now.
    /// `false`: it does not yet, or the kernel does not tell.
    pub(super) fn learn(&mut self, (pid, tid): (Pid, Pid), registers: &Registers) -> bool {
        let sleeps = || procfs::call(pid, tid).is_some_and(|call| call == as_shown(registers));
        if !sleeps() {
            return false;
        }
        let stack = procfs::stack(pid, tid).unwrap_or_default();
        let Some(number) = number_by_stack(&stack, registers) else {
            return false;
        };
        self.0.insert(tid, Call::of(registers, number));
        sleeps()
    }
}

const RESTART: u64 = libc::SYS_restart_syscall as u64;
/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// The registers of a thread that still was in the call, if it stands at an instruction that will make it go on: it was let go
/// and is stopped again before it got there. The kernel makes the one of the other when the thread runs on.
pub(super) fn back_in_call(pid: Pid, registers: &Registers) -> Option<Registers> {
    if registers.rax != RESTART {
        return None;
    }
    let mut code = [0; SYSCALL.len()];
    let (start, len) = (registers.rip, code.len());
    remote_memory::read(pid, &[Range { start, len }], &mut code).ok()?;
    (code == SYSCALL).then_some(Registers {
        rax: -ERESTART_RESTARTBLOCK as u64,
        orig_rax: RESTART,
        rip: registers.rip + SYSCALL.len() as u64,
        ..*registers
    })
}

fn place(registers: &Registers) -> [u64; 8] {
    let Registers {
        rip,
        rsp,
        rdi,
        rsi,
        rdx,
        r10,
        r8,
        r9,
        ..
    } = *registers;
    [rip, rsp, rdi, rsi, rdx, r10, r8, r9]
}

impl Call {
    fn of(registers: &Registers, number: u64) -> Self {
        Self {
            number,
            place: place(registers),
        }
    }
}

/// The number, the arguments, and where stack and code are, as `/proc/PID/syscall` shows them.
fn as_shown(registers: &Registers) -> [u64; 9] {
    let [rip, rsp, rdi, rsi, rdx, r10, r8, r9] = place(registers);
    [registers.orig_rax, rdi, rsi, rdx, r10, r8, r9, rsp, rip]
}

/// The call by the kernel's stack of a thread that sleeps in it after restart_syscall(2) (`/proc/PID/stack`). There are three
/// sorts; the functions of the third, being of the scheduler, do not show. `None`: it sleeps on the way there.
fn number_by_stack(stack: &str, registers: &Registers) -> Option<u64> {
    let functions = || {
        let lines = stack
            .lines()
            .filter_map(|line| line.split_whitespace().nth(1));
        lines.map(|function| function.split(['+', '.']).next().unwrap_or_default())
    };
    let is_of_sleep = |function: &str| {
        function.ends_with("sleep_restart")
            || function.ends_with("nanosleep")
            || function.ends_with("nsleep")
    };
    let number = if functions().any(|function| function == "futex_wait_restart") {
        libc::SYS_futex
    } else if functions().any(|function| function == "do_restart_poll") {
        libc::SYS_poll
    } else if functions().count() > 0
        && functions().all(|function| ENTRY.contains(&function) || is_of_sleep(function))
    {
        // The first argument is the address of a time, or the number of a clock.
        match registers.rdi {
            LOWEST_ADDRESS..USER_END => libc::SYS_nanosleep,
            _ => libc::SYS_clock_nanosleep,
        }
    } else {
        return None;
    };
    Some(number as u64)
}

/// The way of a system call into the kernel.
const ENTRY: [&str; 5] = [
    "__x64_sys_restart_syscall",
    "__do_sys_restart_syscall",
    "x64_sys_call",
    "do_syscall_64",
    "entry_SYSCALL_64_after_hwframe",
];

/// No program has memory below (`vm.mmap_min_addr`, 64 KiB by default, and never 0), and there are not so many clocks.
const LOWEST_ADDRESS: u64 = 4096;
/// The clocks of processes have negative numbers (clock_getcpuclockid(3)), which no address is.
const USER_END: u64 = 1 << 47;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::registers::{WORDS, from_words};

    fn interrupted(number: u64, rdi: u64) -> Registers {
        Registers {
            rax: -ERESTART_RESTARTBLOCK as u64,
            orig_rax: number,
            rip: 0x1002,
            rdi,
            ..from_words(&[0; WORDS])
        }
    }

    #[test]
    fn a_call_is_known_as_long_as_it_goes_on() {
        let tid = Pid::from_raw(7);
        let mut calls = Calls::default();
        let (first, again) = (interrupted(7, 0x5000), interrupted(RESTART, 0x5000));
        calls.note([(tid, first)].into_iter());
        assert_eq!(calls.number(tid, &first), Some(7));
        for _ in 0..2 {
            calls.note([(tid, again)].into_iter());
            assert_eq!(calls.number(tid, &again), Some(7));
        }
        let other = interrupted(RESTART, 0x6000);
        assert_eq!(calls.number(tid, &other), None);
        calls.note([(tid, other)].into_iter());
        assert_eq!(calls.number(tid, &again), None);
    }

    #[test]
    fn a_stack_tells_the_call() {
        let number = |functions: &[&str], rdi| {
            let line = |function: &&str| format!("[<0>] {function}+0x47/0x80\n");
            let stack: String = functions.iter().map(line).collect();
            number_by_stack(&stack, &interrupted(RESTART, rdi))
        };
        let futex = [
            "futex_do_wait",
            "__futex_wait",
            "futex_wait_restart",
            "do_syscall_64",
        ];
        assert_eq!(number(&futex, 0x5000), Some(202));
        let poll = [
            "poll_schedule_timeout.constprop.0",
            "do_restart_poll",
            "do_syscall_64",
        ];
        assert_eq!(number(&poll, 0), Some(7));
        let sleep = ["do_syscall_64", "entry_SYSCALL_64_after_hwframe"];
        assert_eq!(number(&sleep, 0x5000), Some(35));
        assert_eq!(number(&sleep, 1), Some(230));
        assert_eq!(
            number(&["do_cpu_nanosleep", "do_syscall_64"], -6i64 as u64),
            Some(230)
        );
        let fault = ["exc_page_fault", "do_syscall_64"];
        assert_eq!(number(&fault, 0x5000), None);
        assert_eq!(number(&[], 0x5000), None);
    }
}
