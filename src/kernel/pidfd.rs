//! Process descriptors: pidfd_open(2), pidfd_send_signal(2), pidfd_getfd(2).
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
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

/// Opens a descriptor that means this one thread (`PIDFD_THREAD`, Linux 6.9).
pub fn open_thread(tid: Pid) -> Result<OwnedFd> {
    const PIDFD_THREAD: libc::c_int = libc::O_EXCL;
    // SAFETY: takes two integers.
    descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, tid.as_raw(), PIDFD_THREAD) })
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

/// Duplicates descriptor `fd` of the process (Linux 5.6): the same open file description, close-on-exec.
pub fn get_fd(pidfd: BorrowedFd<'_>, fd: RawFd) -> Result<OwnedFd> {
    // SAFETY: takes three integers.
    descriptor(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })
}
