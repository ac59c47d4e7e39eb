//! `--overlay`: a writable layer of the container's own over the root directory of its bundle.
//!
//! It is mounted in a mount namespace of ours, of which the container's is made: the host never sees the mount, and
//! it ends with the container's last process, whatever becomes of us. What is left are the directories of the layer.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::fchdir;

use super::Error;
use super::config::remove_directory;
use crate::kernel::mountinfo::{self, Mount};
use crate::kernel::procfs;

/// Where the writable layer is to be.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place<'a> {
    /// With the container's state; it goes with it.
    State,
    /// Where one is that [`Place::State`] has made, with all that is in it.
    AsItIs,
    /// In this directory, which is there; what was written stays.
    Directory(&'a Path),
}

/// The directory of a container's layer that goes with its state. Beside the state, as libcontainer insists on making
/// that directory itself.
fn own_directory(root: &Path, id: &str) -> PathBuf {
    root.join(".overlays").join(id)
}

/// Whether a container has a layer that goes with its state.
pub(super) fn is_there(root: &Path, id: &str) -> bool {
    own_directory(root, id).is_dir()
}

/// A writable layer, its directories made, not mounted yet.
#[derive(Debug)]
pub(super) struct Layer {
    /// The root directory of the bundle: the lower layer and the mount point.
    rootfs: PathBuf,
    /// Where `upper` and `work` are.
    directory: PathBuf,
    /// The directory if it is the user's.
    pub(super) given: Option<PathBuf>,
}

impl Layer {
    /// Makes the directories. `root` is that of the containers' states.
    pub(super) fn prepare(
        place: Place<'_>,
        root: &Path,
        id: &str,
        rootfs: &Path,
    ) -> Result<Layer, Error> {
        let read = |mounts: io::Result<_>| mounts.map_err(Error::io("reading", "mountinfo"));
        check_lower(rootfs, &read(mountinfo::read_own())?)?;
        let layer = match place {
            Place::AsItIs => Layer {
                rootfs: rootfs.to_owned(),
                directory: own_directory(root, id),
                given: None,
            },
            Place::State => {
                let directory = own_directory(root, id);
                // Of a container whose `create` was killed.
                remove_directory(&directory)?;
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(&directory)
                    .map_err(Error::io("creating", &directory))?;
                Layer {
                    rootfs: rootfs.to_owned(),
                    directory,
                    given: None,
                }
            }
            Place::Directory(given) => {
                let directory = fs::canonicalize(given).map_err(Error::io(
                    "--overlay: the directory has to be there: opening",
                    given,
                ))?;
                if directory.starts_with(rootfs) || rootfs.starts_with(&directory) {
                    return Err(refused(
                        &directory,
                        "it and the root directory must not lie in one another".into(),
                    ));
                }
                if let Some(pid) = user_of(&directory.join("upper"))? {
                    return Err(refused(
                        &directory,
                        format!("process {pid} runs on it; choose another directory"),
                    ));
                }
                Layer {
                    rootfs: rootfs.to_owned(),
                    given: Some(directory.clone()),
                    directory,
                }
            }
        };
        layer.make_directories().inspect_err(|_| {
            if matches!(place, Place::AsItIs) {
                return;
            }
            // The reason of the failure matters more than one of the clean-up.
            let _ = remove(root, id, layer.given.as_deref());
        })?;
        Ok(layer)
    }

    fn upper(&self) -> PathBuf {
        self.directory.join("upper")
    }

    fn work(&self) -> PathBuf {
        self.directory.join("work")
    }

    fn make_directories(&self) -> Result<(), Error> {
        // The upper directory's mode and owner are those of the container's root.
        for (path, mode) in [(self.upper(), 0o755), (self.work(), 0o700)] {
            match DirBuilder::new().mode(mode).create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => (),
                made => made.map_err(Error::io("creating", path))?,
            }
        }
        Ok(())
    }

    /// Does `work` with the overlay in place of the root directory: what is cloned meanwhile has it.
    pub(super) fn mounted<T>(&self, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        let open = |path: &str| File::open(path).map_err(Error::io("opening", path));
        let (before, directory) = (open("/proc/self/ns/mnt")?, open(".")?);
        let kernel = |what: &'static str| Error::kernel(what);
        unshare(CloneFlags::CLONE_NEWNS).map_err(kernel("making a mount namespace"))?;
        let done = self.mount().and_then(|()| work());
        // The way back also changes the working directory.
        setns(&before, CloneFlags::CLONE_NEWNS)
            .and_then(|()| fchdir(directory.as_raw_fd()))
            .map_err(kernel("returning to the mount namespace"))?;
        done
    }

    fn mount(&self) -> Result<(), Error> {
        let none = None::<&str>;
        let slave = MsFlags::MS_SLAVE | MsFlags::MS_REC;
        mount(none, "/", none, slave, none)
            .map_err(Error::kernel("keeping the overlay from the host"))?;
        // The rest has to be as with podman and Docker whatever the kernel's defaults are.
        let mut options = OsString::from("metacopy=off,index=off");
        let (upper, work) = (self.upper(), self.work());
        for (name, path) in [
            ("lowerdir", &self.rootfs),
            ("upperdir", &upper),
            ("workdir", &work),
        ] {
            options.push(format!(",{name}="));
            options.push(escape(path));
        }
        let overlay = Some("overlay");
        mount(
            overlay,
            &self.rootfs,
            overlay,
            MsFlags::empty(),
            Some(options.as_os_str()),
        )
        .map_err(|error| self.explain(error))
    }

    fn explain(&self, error: Errno) -> Error {
        match error {
            Errno::EINVAL => refused(
                &self.directory,
                "its file system can't hold an upper layer (overlays, FAT and network file systems can't); \
                 name a directory on ext4, XFS, btrfs or tmpfs"
                    .into(),
            ),
            Errno::EROFS => refused(&self.directory, "its file system is read-only".into()),
            Errno::ENODEV => refused(&self.directory, "this kernel has no overlayfs".into()),
            other => Error::kernel(format!(
                "mounting an overlay over {} with its upper layer in {}",
                self.rootfs.display(),
                self.directory.display()
            ))(other),
        }
    }
}

/// Removes what a layer leaves: all of one of ours, the work directory of the user's.
pub(super) fn remove(root: &Path, id: &str, given: Option<&Path>) -> Result<(), Error> {
    match given {
        Some(directory) => remove_directory(&directory.join("work")),
        None => {
            let own = own_directory(root, id);
            remove_directory(&own)?;
            // The last one takes the directory above with it; others are in the way.
            let _ = own.parent().map(fs::remove_dir);
            Ok(())
        }
    }
}

fn refused(directory: &Path, reason: String) -> Error {
    Error::Unsupported(format!("--overlay: {}: {reason}", directory.display()))
}

/// Whether the root directory can be a lower layer that shows the container all it would see without an overlay.
fn check_lower(rootfs: &Path, mounts: &[Mount]) -> Result<(), Error> {
    let mounts = mountinfo::visible(mounts);
    let at = mounts.iter().find(|mount| mount.mount_point == rootfs);
    if at.is_some_and(|mount| mount.file_system == "overlay") {
        return Err(refused(
            rootfs,
            "the root directory is an overlay already; leave the option away".into(),
        ));
    }
    let inside = mounts
        .iter()
        .find(|mount| mount.mount_point != rootfs && mount.mount_point.starts_with(rootfs));
    match inside {
        Some(mount) => Err(refused(
            rootfs,
            format!(
                "an overlay would not show what is mounted on {}; put it among the mounts of config.json",
                mount.mount_point.display()
            ),
        )),
        None => Ok(()),
    }
}

/// A process in whose mount namespace an overlay with this upper directory is mounted. Two of them would wreck it.
fn user_of(upper: &Path) -> Result<Option<nix::unistd::Pid>, Error> {
    let mut seen = Vec::new();
    let processes = procfs::numbers(Path::new("/proc")).map_err(Error::io("reading", "/proc"))?;
    let wanted = escape(upper);
    for pid in processes {
        // A process that has exited meanwhile, or a zombie, has none.
        let Ok(namespace) = fs::read_link(procfs::path(pid, "ns/mnt")) else {
            continue;
        };
        if seen.contains(&namespace) {
            continue;
        }
        let Ok(mounts) = mountinfo::read(pid) else {
            continue;
        };
        if mounts.iter().any(|mount| {
            let mut uppers = mount.option("upperdir");
            uppers.any(|found| found == wanted || found == upper.as_os_str())
        }) {
            return Ok(Some(pid));
        }
        seen.push(namespace);
    }
    Ok(None)
}

/// A path as a value among the options of an overlay: the kernel takes one backslash away.
fn escape(path: &Path) -> OsString {
    let mut escaped = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        if matches!(byte, b'\\' | b',' | b':') {
            escaped.push(b'\\');
        }
        escaped.push(byte);
    }
    OsString::from_vec(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_overlay_would_hide_is_refused() {
        let mounts = mountinfo::parse(
            b"1 0 8:1 / / rw - ext4 a rw\n\
              2 1 0:2 / /c/merged rw - overlay o rw\n\
              3 1 0:3 / /b/rootfs/data rw - tmpfs t rw\n\
              4 1 0:4 / /m rw - ext4 a rw\n",
        )
        .unwrap();
        let reason = |path: &str| match check_lower(Path::new(path), &mounts) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        assert!(reason("/c/merged").contains("overlay already"));
        assert!(reason("/b/rootfs").contains("/b/rootfs/data"));
        for fine in ["/b/root", "/m", "/c/merged/below"] {
            assert_eq!(reason(fine), "");
        }
    }
}
