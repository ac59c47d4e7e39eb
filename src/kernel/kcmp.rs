//! kcmp(2): are two descriptors, file tables … of two processes the same kernel object? Needs `CONFIG_KCMP` and the
//! right to trace both processes.
#![allow(unsafe_code)]

use std::cmp::Ordering;
use std::os::fd::RawFd;

use nix::errno::Errno;
use nix::unistd::Pid;

const KCMP_FILE: libc::c_int = 0;
const KCMP_VM: libc::c_int = 1;
const KCMP_FILES: libc::c_int = 2;
const KCMP_FS: libc::c_int = 3;
const KCMP_SIGHAND: libc::c_int = 4;
const KCMP_EPOLL_TFD: libc::c_int = 7;

/// What two tasks may have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shared {
    /// The address space (`CLONE_VM`).
    Memory,
    /// The table of file descriptors (`CLONE_FILES`).
    Files,
    /// Root, working directory and umask (`CLONE_FS`).
    Filesystem,
    /// The table of signal handlers (`CLONE_SIGHAND`).
    Handlers,
}

fn kcmp(one: Pid, other: Pid, what: libc::c_int, a: usize, b: usize) -> Result<i64, Errno> {
    // SAFETY: for every `what` used here the arguments are integers, but for KCMP_EPOLL_TFD, whose pointer the caller
    // in this file derives from a live reference of the kernel's layout.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_kcmp, one.as_raw(), other.as_raw(), what, a, b)
    })
}

fn ordering(result: i64) -> Option<Ordering> {
    match result {
        0 => Some(Ordering::Equal),
        1 => Some(Ordering::Less),
        2 => Some(Ordering::Greater),
        _ => None,
    }
}

/// Compares the open file descriptions behind two descriptors: equal if they are the same one, otherwise in an order
/// that is total and stays the same as long as both exist.
pub fn files(one: (Pid, RawFd), other: (Pid, RawFd)) -> Result<Ordering, Errno> {
    let result = kcmp(one.0, other.0, KCMP_FILE, one.1 as usize, other.1 as usize)?;
    ordering(result).ok_or(Errno::EINVAL)
}

/// Compares the tables of file descriptors of two tasks; as [`files`].
pub fn tables(one: Pid, other: Pid) -> Result<Ordering, Errno> {
    ordering(kcmp(one, other, KCMP_FILES, 0, 0)?).ok_or(Errno::EINVAL)
}

/// Whether two tasks have the same one.
pub fn same(one: Pid, other: Pid, what: Shared) -> Result<bool, Errno> {
    let what = match what {
        Shared::Memory => KCMP_VM,
        Shared::Files => KCMP_FILES,
        Shared::Filesystem => KCMP_FS,
        Shared::Handlers => KCMP_SIGHAND,
    };
    kcmp(one, other, what, 0, 0).map(|result| result == 0)
}

#[repr(C)]
struct EpollSlot {
    epoll: u32,
    watched: u32,
    offset: u32,
}

/// Whether the epoll instance at `epoll` watches, as its `nth` entry (from 0) for descriptor number `watched`, the open
/// file description that `candidate` refers to (Linux 4.13). `ENOENT`: the instance has no such entry.
pub fn epoll_watches(
    epoll: (Pid, RawFd),
    watched: RawFd,
    nth: u32,
    candidate: (Pid, RawFd),
) -> Result<bool, Errno> {
    let slot = EpollSlot {
        epoll: epoll.1 as u32,
        watched: watched as u32,
        offset: nth,
    };
    let result = kcmp(
        candidate.0,
        epoll.0,
        KCMP_EPOLL_TFD,
        candidate.1 as usize,
        &raw const slot as usize,
    )?;
    Ok(result == 0)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn tells_a_duplicate_from_a_second_opening() {
        let me = Pid::this();
        let one = File::open("/dev/null").unwrap();
        let duplicate = one.try_clone().unwrap();
        let other = File::open("/dev/null").unwrap();
        let at = |file: &File| (me, file.as_raw_fd());
        assert_eq!(files(at(&one), at(&duplicate)), Ok(Ordering::Equal));
        let order = files(at(&one), at(&other)).unwrap();
        assert_ne!(order, Ordering::Equal);
        assert_eq!(files(at(&other), at(&one)), Ok(order.reverse()));
    }

    #[test]
    fn a_process_shares_with_itself() {
        assert_eq!(same(Pid::this(), Pid::this(), Shared::Files), Ok(true));
    }
}
