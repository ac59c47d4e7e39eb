//! A mount namespace (mount_namespaces(7)) as one of its processes sees it, held open.
//!
//! It keeps the namespace, but no file system is busier for it than before.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Pid, chroot, fchdir};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::procfs;

/// The namespace, and the root directory from which it is seen.
#[derive(Debug)]
pub struct View {
    namespace: File,
    root: OwnedFd,
    info: File,
}

impl View {
    /// What the process sees.
    ///
    /// # Errors
    ///
    /// Those of opening files of `/proc/PID`.
    pub fn open(pid: Pid) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            namespace: File::open(procfs::path(pid, "ns/mnt"))?,
            root: rustix::fs::open(procfs::path(pid, "root"), flags, Mode::empty())?,
            info: File::open(procfs::path(pid, "mountinfo"))?,
        })
    }

    /// Whether something was mounted, unmounted, moved or remounted in the namespace since this was asked last, or since
    /// it was opened (proc_pid_mounts(5)). A change of propagation is not told.
    ///
    /// # Errors
    ///
    /// Those of poll(2).
    pub fn has_changed(&self) -> Result<bool, Errno> {
        let mut asked = [PollFd::new(self.info.as_fd(), PollFlags::POLLPRI)];
        Ok(poll(&mut asked, PollTimeout::ZERO)? > 0)
    }

    /// The text of `/proc/PID/mountinfo`.
    ///
    /// # Errors
    ///
    /// Those of reading.
    pub fn text(&self) -> io::Result<Vec<u8>> {
        let mut text = vec![0; 4096];
        let mut length = 0;
        loop {
            match self.info.read_at(&mut text[length..], length as u64)? {
                0 => break,
                read => length += read,
            }
            if length == text.len() {
                text.resize(length * 2, 0);
            }
        }
        text.truncate(length);
        Ok(text)
    }

    /// Runs something on a thread that is in the namespace, at this root directory, and in nothing else of the process.
    ///
    /// # Errors
    ///
    /// Those of setns(2) and chroot(2), and what `work` returns.
    pub fn enter<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, Errno> + Send,
    ) -> Result<T, Errno> {
        let inside = || {
            unshare(CloneFlags::CLONE_FS)?;
            setns(&self.namespace, CloneFlags::CLONE_NEWNS)?;
            fchdir(self.root.as_raw_fd())?;
            chroot(".")?;
            work()
        };
        std::thread::scope(|scope| scope.spawn(inside).join().unwrap_or(Err(Errno::ECANCELED)))
    }
}

/// Copies all that is mounted below the root directory: a tree of its own, in no namespace, of the same file systems
/// (open_tree(2), Linux 5.2). What becomes of the originals does not change it.
///
/// # Errors
///
/// Those of open_tree(2) and mount_setattr(2).
pub fn copy_all() -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, "/", flags).map_err(errno)?;
    make_private(tree.as_fd())?;
    Ok(tree)
}

/// Copies the mount at a path below a tree's root, without those below it.
///
/// # Errors
///
/// Those of open_tree(2); `EINVAL` before Linux 6.15.
pub fn copy_one(tree: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    let path = path.strip_prefix("/").unwrap_or(path);
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(tree, path, flags).map_err(errno)
}

/// Mounts a copy at a path.
///
/// # Errors
///
/// Those of move_mount(2).
pub fn attach(copy: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(copy, "", CWD, path, flags).map_err(errno)
}

/// Takes a mount down, with all below it, whoever uses it.
///
/// # Errors
///
/// Those of umount2(2).
pub fn detach(path: &Path) -> Result<(), Errno> {
    umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
}

/// Sets the flags of a mount, as `/proc/PID/mountinfo` has them: `ro,nosuid,relatime`.
///
/// # Errors
///
/// Those of mount(2); `EINVAL` for a flag that is not known here.
pub fn set_flags(path: &Path, flags: &str) -> Result<(), Errno> {
    let mut all = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
    for flag in flags.split(',') {
        all |= match flag {
            "rw" => MsFlags::empty(),
            "ro" => MsFlags::MS_RDONLY,
            "nosuid" => MsFlags::MS_NOSUID,
            "nodev" => MsFlags::MS_NODEV,
            "noexec" => MsFlags::MS_NOEXEC,
            "noatime" => MsFlags::MS_NOATIME,
            "nodiratime" => MsFlags::MS_NODIRATIME,
            "relatime" => MsFlags::MS_RELATIME,
            _ => return Err(Errno::EINVAL),
        };
    }
    if !flags.split(',').any(|flag| flag.ends_with("atime")) {
        all |= MsFlags::MS_STRICTATIME;
    }
    mount(None::<&str>, path, None::<&str>, all, None::<&str>)
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

/// `struct mount_attr` of mount_setattr(2), Linux 5.12.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Has a tree take no part in mounting and unmounting elsewhere.
fn make_private(tree: BorrowedFd<'_>) -> Result<(), Errno> {
    let attributes = Attributes {
        propagation: libc::MS_PRIVATE,
        ..Attributes::default()
    };
    // SAFETY: the path and the structure outlive the call, which only reads them; the size is that of the structure.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_inside_leaves_the_others_where_they_are() {
        let view = View::open(Pid::this()).unwrap();
        let before = std::env::current_dir().unwrap();
        let inside = view.enter(nix::unistd::getcwd).unwrap();
        assert_eq!(inside, Path::new("/"));
        assert_eq!(std::env::current_dir().unwrap(), before);
    }

    #[test]
    fn the_text_is_that_of_proc() {
        let view = View::open(Pid::this()).unwrap();
        let text = String::from_utf8(view.text().unwrap()).unwrap();
        assert!(text.ends_with('\n'));
        // Others may mount things meanwhile, but hardly so.
        let line = text.lines().next().unwrap();
        let again = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert_eq!(again.lines().next(), Some(line));
    }
}
