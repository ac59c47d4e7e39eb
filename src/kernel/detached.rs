//! Mounts of other mount namespaces, and overlays, without a place in ours (open_tree(2), fsopen(2)).

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Pid, fchdir};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, Statx, StatxFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_string,
    fsmount, fsopen, open_tree,
};

/// A copy of the mount that `process` sees at `path`, that nothing is mounted in and that is mounted nowhere. It shares all
/// files with the mount, and keeps its superblock, but not the mount, from going away.
///
/// `expected` is the id of the mount that is to be there; another one is `ESTALE`.
pub fn copy_of_mount(process: Pid, path: &Path, expected: u64) -> io::Result<OwnedFd> {
    let namespace = std::fs::File::open(format!("/proc/{process}/ns/mnt"))?;
    let root = rustix::fs::open(
        format!("/proc/{process}/root"),
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let below = Path::new(".").join(path.strip_prefix("/").unwrap_or(path));
    // open_tree(2) copies mounts of the caller's own namespace only, and only a thread that shares its directories with no
    // other can enter one (setns(2)).
    let copy = move || -> io::Result<OwnedFd> {
        unshare(CloneFlags::CLONE_FS)?;
        setns(namespace, CloneFlags::CLONE_NEWNS)?;
        fchdir(std::os::fd::AsRawFd::as_raw_fd(&root))?;
        let found = mount_id(&below)?;
        if found != expected {
            return Err(io::Error::from_raw_os_error(libc::ESTALE));
        }
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        Ok(open_tree(CWD, &below, flags)?)
    };
    let thread = std::thread::Builder::new()
        .name("mounts".into())
        .spawn(copy)?;
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread that looks at mounts panicked")))
}

/// As [`copy_of_mount`], of a directory of ours.
pub fn copy_of_ours(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(open_tree(CWD, path, flags)?)
}

/// `STATX_MNT_ID` (Linux 5.8).
fn mount_id(path: &Path) -> io::Result<u64> {
    let found: Statx = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID)?;
    Ok(found.stx_mnt_id)
}

/// A read-only overlay of directories, the uppermost first, that is mounted nowhere. Needs two of them at least.
pub fn overlay(lowers: &[PathBuf]) -> io::Result<OwnedFd> {
    let file_system = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for lower in lowers {
        // `lowerdir+` takes one as it is: no escapes, no limit on their length together (Linux 6.5).
        fsconfig_set_string(&file_system, "lowerdir+", lower.as_os_str().as_bytes())?;
    }
    fsconfig_create(&file_system)?;
    Ok(fsmount(
        &file_system,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY,
    )?)
}
