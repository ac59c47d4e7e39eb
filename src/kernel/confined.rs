//! Paths inside another root directory: openat2(2), Linux 5.6.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

/// Opens the directory `path` as a process with the root directory `root` would: absolute links and `..` do not lead
/// out of it.
pub fn open_directory(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    open(root, path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)
}

/// Opens `path` in the same way, with these flags and close-on-exec.
pub fn open(root: BorrowedFd<'_>, path: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlag::O_CLOEXEC;
    let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let how = OpenHow::new().flags(flags).resolve(resolve);
    let fd = openat2(root.as_raw_fd(), path, how)?;
    // SAFETY: the kernel has just returned this descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::fs::{File, create_dir_all};
    use std::os::fd::AsFd;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn links_do_not_lead_out() {
        let root = tempfile::tempdir().unwrap();
        create_dir_all(root.path().join("run")).unwrap();
        symlink("/run", root.path().join("link")).unwrap();
        let opened = open_directory(
            File::open(root.path()).unwrap().as_fd(),
            Path::new("/../link"),
        )
        .unwrap();
        let inside = std::fs::metadata(root.path().join("run")).unwrap();
        assert_eq!(File::from(opened).metadata().unwrap().ino(), inside.ino());
    }
}
