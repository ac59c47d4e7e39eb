//! Descriptors without a file: eventfd(2), epoll_create(2), timerfd_create(2), signalfd(2), inotify(7), and the calls on
//! them that nix does not have or offers only for its own types.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

type Result<T> = std::result::Result<T, Errno>;

fn descriptor(result: libc::c_int) -> Result<OwnedFd> {
    let fd = Errno::result(result)?;
    // SAFETY: the kernel has just returned this descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes an eventfd with a count of 0, close-on-exec.
pub fn eventfd(semaphore: bool, nonblocking: bool) -> Result<OwnedFd> {
    let mut flags = libc::EFD_CLOEXEC;
    if semaphore {
        flags |= libc::EFD_SEMAPHORE;
    }
    if nonblocking {
        flags |= libc::EFD_NONBLOCK;
    }
    // SAFETY: takes two integers.
    descriptor(unsafe { libc::eventfd(0, flags) })
}

/// Makes an empty epoll instance, close-on-exec.
pub fn epoll() -> Result<OwnedFd> {
    // SAFETY: takes an integer.
    descriptor(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })
}

/// Makes a disarmed timerfd, close-on-exec.
pub fn timerfd(clock: i32) -> Result<OwnedFd> {
    // SAFETY: takes two integers.
    descriptor(unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) })
}

/// Sets a timerfd; value and interval in (seconds, nanoseconds). Its count of expirations becomes 0.
pub fn set_timerfd(
    fd: impl AsFd,
    flags: i32,
    value: (i64, i64),
    interval: (i64, i64),
) -> Result<()> {
    let time = |(tv_sec, tv_nsec)| libc::timespec { tv_sec, tv_nsec };
    let new = libc::itimerspec {
        it_interval: time(interval),
        it_value: time(value),
    };
    // SAFETY: `new` outlives the call; the old value is not asked for.
    let result = unsafe {
        libc::timerfd_settime(
            fd.as_fd().as_raw_fd(),
            flags,
            &raw const new,
            std::ptr::null_mut(),
        )
    };
    Errno::result(result).map(drop)
}

/// Sets a timerfd's count of expirations, not 0 (`TFD_IOC_SET_TICKS`, Linux 3.17, `CONFIG_CHECKPOINT_RESTORE`).
pub fn set_timerfd_ticks(fd: impl AsFd, ticks: u64) -> Result<()> {
    const TFD_IOC_SET_TICKS: libc::c_ulong = nix::request_code_write!(b'T', 0, size_of::<u64>());
    // SAFETY: the request reads 8 bytes from `ticks`, which outlives the call.
    let result =
        unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) };
    Errno::result(result).map(drop)
}

/// The time of a clock as (seconds, nanoseconds).
pub fn clock(clock: i32) -> Result<(i64, i64)> {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` outlives the call.
    Errno::result(unsafe { libc::clock_gettime(clock, &raw mut now) })?;
    Ok((now.tv_sec, now.tv_nsec))
}

/// Makes a signalfd for the signals in `mask` (bit `n - 1` for signal `n`), close-on-exec.
pub fn signalfd(mask: u64) -> Result<OwnedFd> {
    signalfd4(-1, mask).and_then(|fd| descriptor(fd as libc::c_int))
}

/// Changes the signals an existing signalfd accepts.
pub fn set_signalfd(fd: impl AsFd, mask: u64) -> Result<()> {
    signalfd4(fd.as_fd().as_raw_fd(), mask).map(drop)
}

fn signalfd4(fd: libc::c_int, mask: u64) -> Result<libc::c_long> {
    // SAFETY: the kernel reads its 8-byte sigset_t from `mask`, which outlives the call.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_signalfd4,
            fd,
            &raw const mask,
            size_of::<u64>(),
            libc::SFD_CLOEXEC,
        )
    })
}

/// Makes an inotify instance without watches, close-on-exec.
pub fn inotify(nonblocking: bool) -> Result<OwnedFd> {
    let flags = libc::IN_CLOEXEC | if nonblocking { libc::IN_NONBLOCK } else { 0 };
    // SAFETY: takes an integer.
    descriptor(unsafe { libc::inotify_init1(flags) })
}

/// Adds a watch, or changes that of the same file, and returns its number.
pub fn add_watch(inotify: impl AsFd, path: &CStr, mask: u32) -> Result<i32> {
    // SAFETY: `path` is a C string that outlives the call.
    Errno::result(unsafe {
        libc::inotify_add_watch(inotify.as_fd().as_raw_fd(), path.as_ptr(), mask)
    })
}

/// Removes a watch; an `IN_IGNORED` event is queued for it.
pub fn remove_watch(inotify: impl AsFd, wd: i32) -> Result<()> {
    // SAFETY: takes two integers.
    Errno::result(unsafe { libc::inotify_rm_watch(inotify.as_fd().as_raw_fd(), wd) }).map(drop)
}

/// Bytes that can be read at once (`FIONREAD`): of a pipe, socket or inotify instance.
pub fn readable_bytes(fd: impl AsFd) -> Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: the request writes an int to `count`, which outlives the call.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Takes, changes or (`F_UNLCK`) drops a lease on a file (`F_SETLEASE`). Whoever takes it becomes the owner of a description
/// that has none.
pub fn set_lease(fd: impl AsFd, kind: i32) -> Result<()> {
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETLEASE, kind) }).map(drop)
}

/// Opens the file of a handle as name_to_handle_at(2) and fdinfo give it, with `O_PATH`, through a descriptor on the same
/// file system. Needs `CAP_DAC_READ_SEARCH`.
pub fn open_by_handle(mount: impl AsFd, kind: i32, handle: &[u8]) -> Result<OwnedFd> {
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        handle: [u8; libc::MAX_HANDLE_SZ as usize],
    }
    let mut argument = Handle {
        bytes: handle.len() as u32,
        kind,
        handle: [0; libc::MAX_HANDLE_SZ as usize],
    };
    argument
        .handle
        .get_mut(..handle.len())
        .ok_or(Errno::EINVAL)?
        .copy_from_slice(handle);
    // SAFETY: `argument` has the layout of struct file_handle with room for `bytes` bytes, and outlives the call.
    let fd = Errno::result(unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_fd().as_raw_fd(),
            &raw mut argument,
            libc::O_PATH | libc::O_CLOEXEC,
        )
    })?;
    descriptor(fd as libc::c_int)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn timerfd_ticks_can_be_set() {
        let timer = timerfd(libc::CLOCK_MONOTONIC).unwrap();
        set_timerfd(&timer, 0, (100, 0), (7, 0)).unwrap();
        set_timerfd_ticks(&timer, 3).unwrap();
        let mut ticks = [0; 8];
        std::fs::File::from(timer).read_exact(&mut ticks).unwrap();
        assert_eq!(u64::from_ne_bytes(ticks), 3);
    }

    #[test]
    fn eventfd_counts_and_pipes_have_bytes() {
        let mut counter = std::fs::File::from(eventfd(true, true).unwrap());
        counter.write_all(&5u64.to_ne_bytes()).unwrap();
        let mut one = [0; 8];
        counter.read_exact(&mut one).unwrap();
        assert_eq!(u64::from_ne_bytes(one), 1);
        let (read, write) = std::io::pipe().unwrap();
        (&write).write_all(b"abc").unwrap();
        assert_eq!(readable_bytes(&read), Ok(3));
    }

    #[test]
    fn watches_are_numbered_from_one() {
        let inotify = inotify(true).unwrap();
        assert_eq!(add_watch(&inotify, c"/tmp", libc::IN_CREATE), Ok(1));
        assert_eq!(add_watch(&inotify, c"/", libc::IN_CREATE), Ok(2));
        remove_watch(&inotify, 1).unwrap();
        assert!(
            readable_bytes(&inotify).unwrap() > 0,
            "IN_IGNORED is queued"
        );
    }
}
