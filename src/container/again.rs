//! Containers that have ended and are created anew in their place, under the same ID.
//!
//! The new one is made beside the old, below `ROOT/.again`, and takes its place by one renaming when it runs. Until then the old
//! one is there, stopped: whoever is killed in between leaves a container that has ended, and something to be removed.

use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::SigSet;
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::create::{self, Child, Options};
use super::lifecycle::{self, end_processes};
use super::locate::{Located, Status, locate};
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
pub(super) type Lock = Flock<File>;

/// Locks the directory of a container's state; `None`: there is none.
pub(super) fn lock(directory: &Path) -> Result<Option<Lock>, Error> {
    let failed = |error| Error::io("locking", directory)(error);
    loop {
        let file = match File::open(directory) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let locked = Flock::lock(file, FlockArg::LockExclusive);
        let locked = locked.map_err(|(_, errno)| failed(errno.into()))?;
        let held = locked.metadata().map_err(failed)?;
        // Whoever had the lock may have put another in its place.
        match fs::symlink_metadata(directory) {
            Ok(there) if (there.dev(), there.ino()) == (held.dev(), held.ino()) => {
                return Ok(Some(locked));
            }
            _ => {}
        }
    }
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
        let Some(lock) = lock(&root.join(id))? else {
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
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&beside)
            .map_err(Error::io("creating", &beside))?;
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
