//! System calls that a stop has interrupted: which registers make them go on.

use crate::kernel::ptrace::Registers;
use crate::kernel::runner::goes_on_by_block;

/// The number that `orig_rax` holds when the thread is in no system call.
const NO_CALL: u64 = u64::MAX;

/// Calls that fail with `EINTR` when the thread was merely stopped (signal(7), "Interruption of system calls and library
/// functions by stop signals"), and that have done nothing when they do.
const ENDED_BY_STOP: [libc::c_long; 25] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
    SYS_IO_PGETEVENTS,
    libc::SYS_msgrcv,
    libc::SYS_msgsnd,
    libc::SYS_futex,
    // Sockets with a time limit (SO_RCVTIMEO, SO_SNDTIMEO).
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_sendfile,
];
/// Not in libc for this target (Linux 4.18).
const SYS_IO_PGETEVENTS: libc::c_long = 333;

/// Whether the thread stands at the end of a call that the stop, or else a signal, has made fail with `EINTR`.
pub(super) fn maybe_ended_by_stop(registers: &Registers) -> bool {
    registers.rax as i64 == -i64::from(libc::EINTR)
        && ENDED_BY_STOP.contains(&(registers.orig_rax as i64))
}

/// The registers with which the call that the thread is in starts from its beginning: at the `syscall` instruction, two
/// bytes long, with the arguments, which the kernel leaves in their registers.
pub(super) fn from_the_start(registers: &Registers) -> Registers {
    Registers {
        rax: registers.orig_rax,
        orig_rax: NO_CALL,
        rip: registers.rip - 2,
        ..*registers
    }
}

/// The registers to record of a thread in call `number`. The kernel restarts a call from `orig_rax` wherever the thread is
/// when they are put back, but not by a restart block, which by then belongs to a later call, or to no call at all if the
/// thread was made again.
pub(super) fn to_record(registers: &Registers, number: u64) -> Registers {
    if goes_on_by_block(registers) {
        from_the_start(&Registers {
            orig_rax: number,
            ..*registers
        })
    } else {
        *registers
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::registers::{WORDS, from_words};
    use crate::kernel::runner::ERESTART_RESTARTBLOCK;

    fn in_call(number: libc::c_long, result: i64) -> Registers {
        Registers {
            rax: result as u64,
            orig_rax: number as u64,
            rip: 0x1002,
            rdi: 7,
            ..from_words(&[0; WORDS])
        }
    }

    #[test]
    fn only_calls_that_did_nothing_start_again() {
        let eintr = -i64::from(libc::EINTR);
        assert!(maybe_ended_by_stop(&in_call(libc::SYS_epoll_wait, eintr)));
        assert!(!maybe_ended_by_stop(&in_call(libc::SYS_close, eintr)));
        assert!(!maybe_ended_by_stop(&in_call(libc::SYS_epoll_wait, 1)));
        assert!(!maybe_ended_by_stop(&in_call(-1, eintr)));
    }

    #[test]
    fn a_restart_block_is_replaced_by_the_arguments() {
        let sleeping = in_call(libc::SYS_restart_syscall, -ERESTART_RESTARTBLOCK);
        let again = to_record(&sleeping, libc::SYS_nanosleep as u64);
        assert_eq!(
            (again.rip, again.rax, again.orig_rax, again.rdi),
            (0x1000, libc::SYS_nanosleep as u64, u64::MAX, 7)
        );
        let plain = in_call(libc::SYS_read, -crate::kernel::runner::ERESTARTSYS);
        assert_eq!(to_record(&plain, libc::SYS_read as u64).rip, plain.rip);
    }
}
