//! Process descriptors: pidfd_open(2), pidfd_send_signal(2), pidfd_getfd(2).
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;

type Result<T> = std::result::Result<T, Errno>;

fn descriptor(result: libc::c_long) -> Result<OwnedFd> {
    let fd = Errno::result(result)?;
    // SAFETY: the kernel has just returned this descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Opens a descriptor that means this process, also after its PID is reused (Linux 5.3).
pub fn open(pid: Pid) -> Result<OwnedFd> {
    // SAFETY: takes two integers.
    descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })
}

/// Sends a signal; 0 only asks whether the process is there (`ESRCH`: it was reaped).
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<()> {
    // SAFETY: takes integers and a null pointer for the siginfo.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<u8>(),
            0,
        )
    })
    .map(drop)
}

/// Whether the process has ended with all its threads, reaped or not: the descriptor is readable then (pidfd_open(2)).
pub fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let mut set = [PollFd::new(pidfd, PollFlags::POLLIN)];
    poll(&mut set, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Waits until the process has ended with all its threads; `false` if it has not after so long.
pub fn await_end(pidfd: BorrowedFd<'_>, patience: Duration) -> bool {
    let mut set = [PollFd::new(pidfd, PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    poll(&mut set, patience).is_ok_and(|ready| ready > 0)
}

/// Duplicates descriptor `fd` of the process (Linux 5.6): the same open file description, close-on-exec.
pub fn get_fd(pidfd: BorrowedFd<'_>, fd: RawFd) -> Result<OwnedFd> {
    // SAFETY: takes three integers.
    descriptor(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })
}
