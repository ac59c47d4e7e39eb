//! An area that is open: its files are reached through the tree's own mount, so that the kernel's caches agree.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use rustix::fs::{Mode, OFlags};

use super::area::{Area, Kind};
use super::meta::open_directory;
use super::{Error, Result};
use crate::kernel::detached;
use crate::outcome::Refusal;

/// An area, for the time of one operation.
#[derive(Debug)]
pub struct Mounted {
    /// Its root: a copy of the tree's mount that nothing else is mounted in.
    pub root: OwnedFd,
    /// The upper directory of an overlay.
    pub upper: Option<OwnedFd>,
    /// The lower layers of an overlay as one tree.
    pub lower: Option<OwnedFd>,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// A directory of the file system that has the files, to keep content beside them.
    pub beside: PathBuf,
}

impl Mounted {
    /// Opens it; `root` is a process that sees it.
    ///
    /// # Errors
    ///
    /// Refused if another mount is there, or none.
    pub fn open(root: Pid, area: &Area) -> Result<Self> {
        let copy = detached::copy_of_mount(root, &area.mount_point, area.mount_id);
        let copy = copy.map_err(|error| match error.raw_os_error() {
            Some(libc::ESTALE | libc::ENOENT | libc::ENOTDIR | libc::EINVAL) => {
                Error::Refused(Refusal {
                    object: format!("the mount at {}", area.mount_point.display()),
                    holder: format!("pid {root}"),
                    remedy: "it is not the one that was there at the checkpoint; mount it again, or take a new checkpoint".into(),
                })
            }
            _ => file_error("open the mount", &area.mount_point)(error),
        })?;
        let directory = |path: &Path| {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOATIME | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty())
                .map_err(|errno| file_error("open", path)(errno.into()))
        };
        let (upper, lower, beside) = match &area.kind {
            Kind::Overlay { upper, lowers } => {
                let lower = match lowers.as_slice() {
                    [one] => detached::copy_of_ours(one).map_err(file_error("open", one))?,
                    _ => detached::overlay(lowers)
                        .map_err(file_error("mount the lower layers of", &area.mount_point))?,
                };
                (Some(directory(upper)?), Some(lower), upper.clone())
            }
            Kind::Volume { source } => (None, None, source.clone()),
            Kind::Tmpfs => (None, None, PathBuf::from("/proc/self/fd")),
        };
        Ok(Self {
            root: copy,
            upper,
            lower,
            mount_point: area.mount_point.clone(),
            beside,
        })
    }

    /// A path in it as the tree sees it.
    pub fn path(&self, below: &Path) -> PathBuf {
        match below == Path::new("") {
            true => self.mount_point.clone(),
            false => self.mount_point.join(below),
        }
    }

    /// An error about a path in it.
    pub fn error(
        &self,
        what: &'static str,
        below: &Path,
    ) -> impl FnOnce(io::Error) -> Error + use<> {
        file_error(what, &self.path(below))
    }
}

/// An error about a path.
pub fn file_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |error| Error::File { what, path, error }
}

/// Opens a directory by its path below another, name by name: links are not followed, and paths may be of any length.
pub fn descend(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let mut at = root.try_clone_to_owned()?;
    for name in path {
        at = open_directory(at.as_fd(), name)?;
    }
    Ok(at)
}

/// Opens a regular file for reading.
pub fn open_file(directory: BorrowedFd<'_>, name: &OsStr, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::NOATIME | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(
        directory,
        name,
        flags,
        Mode::empty(),
    )?))
}

/// The directory part of a path, and its last name.
pub fn split(path: &Path) -> (&Path, &OsStr) {
    let parent = path.parent().unwrap_or(Path::new(""));
    (parent, path.file_name().unwrap_or_default())
}
