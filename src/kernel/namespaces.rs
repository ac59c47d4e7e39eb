//! The namespaces a thread lives in (namespaces(7)), by their inode numbers.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::stat::{fstat, stat};
use nix::unistd::Pid;

/// The kinds that a thread can leave for others of their kind: name in `/proc/PID/ns` and number of the `PIDFD_GET_*`
/// request (`linux/pidfd.h`).
pub const KINDS: [(&str, u8); 8] = [
    ("cgroup", 1),
    ("ipc", 2),
    ("mnt", 3),
    ("net", 4),
    ("pid_for_children", 6),
    ("time_for_children", 8),
    ("user", 9),
    ("uts", 10),
];

/// An inode number for each of [`KINDS`]; 0 if the kernel does not have that kind.
pub type Inodes = [u64; KINDS.len()];

/// Reads them through a pidfd of the thread (Linux 6.11), else from `/proc`.
pub fn of(pidfd: BorrowedFd<'_>, tid: Pid) -> Result<Inodes, Errno> {
    let mut inodes = Inodes::default();
    for (inode, (name, request)) in inodes.iter_mut().zip(KINDS) {
        *inode = match open(pidfd, request) {
            Ok(namespace) => fstat(namespace.as_raw_fd())?.st_ino,
            Err(Errno::EOPNOTSUPP) => 0,
            Err(Errno::ENOTTY | Errno::EINVAL) => {
                match stat(format!("/proc/{tid}/ns/{name}").as_str()) {
                    Ok(stat) => stat.st_ino,
                    Err(Errno::ENOENT) => 0,
                    Err(errno) => return Err(errno),
                }
            }
            Err(errno) => return Err(errno),
        };
    }
    Ok(inodes)
}

fn open(pidfd: BorrowedFd<'_>, request: u8) -> Result<OwnedFd, Errno> {
    /// `_IO(PIDFS_IOCTL_MAGIC, 0)`.
    const MAGIC: libc::c_ulong = 0xff00;
    // SAFETY: takes no argument but 0.
    let fd = Errno::result(unsafe {
        libc::ioctl(pidfd.as_raw_fd(), MAGIC | libc::c_ulong::from(request), 0)
    })?;
    // SAFETY: the kernel has just returned this descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn they_are_those_that_proc_shows() {
        let me = Pid::this();
        let pidfd = crate::kernel::pidfd::open(me).unwrap();
        let inodes = of(pidfd.as_fd(), me).unwrap();
        for (inode, (name, _)) in inodes.iter().zip(KINDS) {
            let link = std::fs::read_link(format!("/proc/self/ns/{name}"));
            let shown = link.map_or(0, |link| {
                let text = link.to_string_lossy().into_owned();
                let digits = text.split(['[', ']']).nth(1).unwrap_or("0");
                digits.parse().unwrap()
            });
            assert_eq!(*inode, shown, "{name}");
        }
    }
}
