//! A directory that is there whole or not at all.
//!
//! It is filled under a name beside its own, synced, and renamed. At any time its own name leads to the old one or to the new
//! one; what was left under the other name by a program that was killed is removed by the next that writes there.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};

use super::{CONTEXT_FILE, Error, Result};
use crate::fault;
use crate::outcome::Refusal;

/// A directory that is being filled. Dropped before it was [published](Staging::publish), it is removed.
#[derive(Debug)]
pub(super) struct Staging {
    target: PathBuf,
    path: PathBuf,
    /// Locked: it shows that somebody is at work here.
    directory: File,
    is_published: bool,
}

impl Staging {
    /// Begins to make the directory `target`, which may be there: an image, or empty.
    ///
    /// # Errors
    ///
    /// Refused if something else is there, or another is at work on it.
    pub(super) fn begin(target: &Path) -> Result<Self> {
        check_target(target)?;
        let name = target.file_name().ok_or_else(|| {
            refuse(
                "the name",
                target,
                "it has none of its own; give a directory below it",
            )
        })?;
        let mut staged = std::ffi::OsString::from(".");
        staged.push(name);
        staged.push(".persisting");
        let path = target.with_file_name(staged);
        let directory = lock(target, &path)?;
        let staging = Self {
            target: target.to_owned(),
            path,
            directory,
            is_published: false,
        };
        staging.clear()?;
        Ok(staging)
    }

    /// Makes a file in it. Its path is for messages.
    pub(super) fn create(&self, name: &str) -> Result<(PathBuf, File)> {
        let path = self.path.join(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(Error::file("create", &path))?;
        Ok((path, file))
    }

    /// Gives it its name. If it is to be durable all files in it have to be synced before.
    pub(super) fn publish(mut self, is_durable: bool) -> Result<()> {
        let sync = |directory: &File, path: &Path| match is_durable {
            true => directory.sync_all().map_err(Error::file("sync", path)),
            false => Ok(()),
        };
        sync(&self.directory, &self.path)?;
        fault::point("persist.synced");
        let failed = |errno: rustix::io::Errno| {
            Error::file("put an image at", &self.target)(io::Error::from(errno))
        };
        let rename = |flags| renameat_with(CWD, &self.path, CWD, &self.target, flags);
        let is_exchanged = match rename(RenameFlags::NOREPLACE) {
            Ok(()) => false,
            Err(rustix::io::Errno::EXIST) => {
                check_target(&self.target)?;
                rename(RenameFlags::EXCHANGE).map_err(failed)?;
                true
            }
            Err(errno) => return Err(failed(errno)),
        };
        self.is_published = true;
        fault::point("persist.renamed");
        let above = above(&self.target);
        let opened = File::open(above).map_err(Error::file("open", above))?;
        sync(&opened, above)?;
        if is_exchanged && let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "what was replaced is left");
        }
        Ok(())
    }

    /// Removes what is in it.
    fn clear(&self) -> Result<()> {
        let failed = || Error::file("remove what was left in", &self.path);
        for entry in fs::read_dir(&self.path).map_err(failed())? {
            let path = entry.map_err(failed())?.path();
            let removed = match fs::symlink_metadata(&path).map_err(failed())?.is_dir() {
                true => fs::remove_dir_all(&path),
                false => fs::remove_file(&path),
            };
            removed.map_err(failed())?;
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.is_published
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "what was begun is left");
        }
    }
}

/// Makes the staging directory, or takes over what is left of one, and locks it.
fn lock(target: &Path, path: &Path) -> Result<File> {
    loop {
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(Error::file("create", path)(error));
            }
            _ => {}
        }
        let opened = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(path);
        let directory = match opened {
            Ok(directory) => directory,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::file("open", path)(error)),
        };
        match flock(directory.as_fd(), FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let remedy = "another image is being written there; wait for it, or choose another directory";
                return Err(refuse("the place", target, remedy).into());
            }
            Err(errno) => return Err(Error::file("lock", path)(errno.into())),
        }
        let held = directory.metadata().map_err(Error::file("look at", path))?;
        if held.uid() != geteuid().as_raw() || held.mode() & 0o077 != 0 {
            let remedy = "others may look into it, who would see all memory; remove it";
            return Err(refuse("the directory", path, remedy).into());
        }
        // Whoever had the lock may have renamed or removed it.
        let there = fs::symlink_metadata(path);
        if there.is_ok_and(|there| (there.dev(), there.ino()) == (held.dev(), held.ino())) {
            return Ok(directory);
        }
    }
}

/// Refuses a target that is neither an image nor empty.
fn check_target(target: &Path) -> Result<()> {
    let entries = match fs::read_dir(target) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::file("look into", target)(error)),
    };
    if entries.count() == 0 || target.join(CONTEXT_FILE).is_file() {
        return Ok(());
    }
    let remedy =
        "they are not those of an image; choose a directory that is empty or does not exist";
    Err(refuse("the files", target, remedy).into())
}

fn above(target: &Path) -> &Path {
    match target.parent() {
        Some(above) if !above.as_os_str().is_empty() => above,
        _ => Path::new("."),
    }
}

fn refuse(object: &str, target: &Path, remedy: &str) -> Refusal {
    Refusal {
        object: object.into(),
        holder: target.display().to_string(),
        remedy: remedy.into(),
    }
}
