//! The namespaces a thread lives in (namespaces(7)), by their inode numbers.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::readlinkat;

/// The kinds that a thread can leave for others of their kind, as `/proc/PID/ns` names them.
pub const KINDS: [&str; 8] = [
    "cgroup",
    "ipc",
    "mnt",
    "net",
    "pid_for_children",
    "time_for_children",
    "user",
    "uts",
];

/// An inode number for each of [`KINDS`]; 0 if the kernel does not have that kind.
pub type Inodes = [u64; KINDS.len()];

/// Reads them from `/proc/PID/ns` (or a thread's), held open.
pub fn of(directory: BorrowedFd<'_>) -> Result<Inodes, Errno> {
    let mut inodes = Inodes::default();
    for (inode, name) in inodes.iter_mut().zip(KINDS) {
        // `net:[4026531840]`. Four times cheaper than opening it, by name or with PIDFD_GET_*_NAMESPACE.
        *inode = match readlinkat(Some(directory.as_raw_fd()), name) {
            Ok(link) => number(link.as_bytes()).ok_or(Errno::EINVAL)?,
            Err(Errno::ENOENT) => 0,
            Err(errno) => return Err(errno),
        };
    }
    Ok(inodes)
}

/// The IPC namespace in a `/proc/PID/ns` that is held open; 0 if the kernel has none.
pub fn ipc(directory: BorrowedFd<'_>) -> Result<u64, Errno> {
    match readlinkat(Some(directory.as_raw_fd()), "ipc") {
        Ok(link) => number(link.as_bytes()).ok_or(Errno::EINVAL),
        Err(Errno::ENOENT) => Ok(0),
        Err(errno) => Err(errno),
    }
}

/// Our own.
pub fn ipc_of_us() -> Result<u64, Errno> {
    match readlinkat(None, "/proc/self/ns/ipc") {
        Ok(link) => number(link.as_bytes()).ok_or(Errno::EINVAL),
        Err(Errno::ENOENT) => Ok(0),
        Err(errno) => Err(errno),
    }
}

fn number(link: &[u8]) -> Option<u64> {
    let digits = link.split(|byte| matches!(byte, b'[' | b']')).nth(1)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn they_are_those_that_proc_shows() {
        let directory = std::fs::File::open("/proc/self/ns").unwrap();
        let inodes = of(directory.as_fd()).unwrap();
        for (inode, name) in inodes.iter().zip(KINDS) {
            let file = std::fs::metadata(format!("/proc/self/ns/{name}"));
            assert_eq!(*inode, file.map_or(0, |file| file.ino()), "{name}");
        }
    }
}
