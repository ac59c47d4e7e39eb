//! Containers that have ended and are created anew in their place, under the same ID.
//!
//! The new one is made beside the old, below `ROOT/.again`, and takes its place by one renaming when it runs. Until then the old
//! one is there, stopped: whoever is killed in between leaves a container that has ended, and something to be removed.

use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::SigSet;
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::create::{self, Child, Options};
use super::lifecycle::{self, end_processes};
use super::locate::{Located, Status, check_id, locate};
use super::overlay::{self, Place};
use super::{Error, cgroups, config};
use crate::fault;

/// A container that has ended, locked, about to be created anew.
#[derive(Debug)]
pub(crate) struct Again {
    root: PathBuf,
    located: Located,
    _lock: Lock,
}

/// Nobody else creates this container anew or deletes it.
///
/// A lock of fcntl(2), which a process made by fork does not have: the new init would hold any other for as long as it waits.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    _file: File,
}

/// Locks a container's ID; `None`: there is none.
pub(super) fn lock(root: &Path, id: &str) -> Result<Option<Lock>, Error> {
    if !root.join(id).exists() && !beside(root).join(id).exists() {
        return Ok(None);
    }
    let directory = root.join(".locks");
    let path = directory.join(id);
    let failed = |error| Error::io("locking", &path)(error);
    loop {
        make_private(&directory)?;
        let mut options = File::options();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = match options.open(&path) {
            // Whoever had the lock has just removed the directory.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            opened => opened.map_err(failed)?,
        };
        let whole = libc::flock {
            l_type: libc::F_WRLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(file.as_raw_fd(), FcntlArg::F_SETLKW(&whole))
            .map_err(|errno| failed(errno.into()))?;
        let held = file.metadata().map_err(failed)?;
        let there = fs::symlink_metadata(&path);
        if there.is_ok_and(|there| (there.dev(), there.ino()) == (held.dev(), held.ino())) {
            return Ok(Some(Lock { path, _file: file }));
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // What is left is taken by the next that locks.
        let _ = fs::remove_file(&self.path);
        let _ = self.path.parent().map(fs::remove_dir);
    }
}

fn make_private(directory: &Path) -> Result<(), Error> {
    let mut builder = DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(directory);
    made.map_err(Error::io("creating", directory))
}

/// Where containers are made that are to take the place of others.
fn beside(root: &Path) -> PathBuf {
    root.join(".again")
}

/// Removes what a command that was killed has left of a container that was to take the place of `id`; if that runs, it takes
/// it.
pub(super) fn recover(root: &Path, id: &str) -> Result<(), Error> {
    let beside = beside(root);
    if !beside.join(id).exists() {
        return Ok(());
    }
    match locate(&beside, id) {
        Ok(made) if made.status == Status::Running => replace(root, id),
        Ok(_) => lifecycle::delete(&beside, id, true),
        Err(Error::Unknown { .. } | Error::BadState { .. }) => {
            config::remove_directory(&beside.join(id))
        }
        Err(error) => Err(error),
    }?;
    // The last one takes the directory above with it.
    let _ = fs::remove_dir(&beside);
    Ok(())
}

/// The same, if nobody is at work on it; waits for who is.
pub(crate) fn settle(root: &Path, id: &str) -> Result<(), Error> {
    check_id(id)?;
    if beside(root).join(id).exists() {
        let _lock = lock(root, id)?;
        recover(root, id)?;
    }
    Ok(())
}

/// Has the container that was made beside the old one take its place.
fn replace(root: &Path, id: &str) -> Result<(), Error> {
    let (old, new) = (root.join(id), beside(root).join(id));
    renameat_with(CWD, &new, CWD, &old, RenameFlags::EXCHANGE)
        .map_err(|errno| Error::io("replacing", &old)(errno.into()))?;
    config::remove_directory(&new)
}

impl Again {
    /// Takes a container that has ended. `None`: it has not, or not any more.
    pub(crate) fn begin(root: &Path, id: &str) -> Result<Option<Self>, Error> {
        let root = fs::canonicalize(root).map_err(Error::io("opening", root))?;
        locate(&root, id)?;
        let Some(lock) = lock(&root, id)? else {
            return Ok(None);
        };
        recover(&root, id)?;
        let located = locate(&root, id)?;
        Ok((located.status == Status::Stopped).then_some(Self {
            root,
            located,
            _lock: lock,
        }))
    }

    /// Creates it, with the standard streams that we have; its init waits. Only from a process without threads.
    pub(crate) fn create(&self, mask: SigSet) -> Result<Child, Error> {
        let Self { root, located, .. } = self;
        end_processes(located)?;
        cgroups::remove(&located.cgroups()?)?;
        let beside = beside(root);
        make_private(&beside)?;
        let overlay = match &located.overlay {
            Some(given) => Some(Place::Directory(given)),
            None => overlay::is_there(root, &located.id).then_some(Place::AsItIs),
        };
        let child = create::create(&Options {
            root,
            again: Some(&beside),
            id: &located.id,
            bundle: &located.bundle,
            console_socket: None,
            pid_file: None,
            preserve_fds: 0,
            no_pivot: located.making.no_pivot,
            no_new_keyring: located.making.no_new_keyring,
            is_deleted_at_end: false,
            overlay,
            mask,
        })?;
        fault::point("again.created");
        Ok(child)
    }

    /// It runs, and takes the place of the old one.
    pub(crate) fn finish(self, child: &Child) -> Result<(), Error> {
        let id = &self.located.id;
        create::note_running(&beside(&self.root), id)?;
        fault::point("again.running");
        recover(&self.root, id)?;
        match &self.located.making.pid_file {
            Some(path) => {
                let pid = child.pid.to_string();
                super::locate::write_whole(path, pid.as_bytes())
            }
            None => Ok(()),
        }
    }

    /// It was not made: what there is of it goes.
    pub(crate) fn give_up(self) -> Result<(), Error> {
        recover(&self.root, &self.located.id)
    }
}
