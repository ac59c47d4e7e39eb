//! What is on disk of a checkpoint, and what is being written.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::persist::{Options, Progress, Summary, Why, persist};
use super::{MEMORY_FILE, Parts, Result};

/// How durable a checkpoint is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Durability {
    /// It is in RAM only.
    #[default]
    Resident,
    /// It is being written to disk.
    Persisting {
        /// The directory.
        to: PathBuf,
        /// Bytes of memory that are done.
        done: u64,
        /// Bytes of memory in all; 0 before that is known.
        total: u64,
    },
    /// It is on disk, too.
    Durable {
        /// The directory.
        at: PathBuf,
    },
}

/// What is on disk of one checkpoint. Shared by who holds the checkpoint and who writes it.
#[derive(Debug, Default)]
pub struct OnDisk {
    running: Mutex<Vec<(PathBuf, Arc<Progress>)>>,
    last: Mutex<Option<Written>>,
}

/// An image that was written.
#[derive(Debug)]
struct Written {
    directory: PathBuf,
    /// Device and inode of its memory.
    identity: (u64, u64),
}

/// A checkpoint about to be written; [`Persisting::run`] does it, on whichever thread.
#[derive(Debug)]
pub struct Persisting {
    parts: Parts,
    target: PathBuf,
    options: Options,
    running: Running,
}

/// Shown as being written as long as it is there.
#[derive(Debug)]
struct Running {
    progress: Arc<Progress>,
    on_disk: Arc<OnDisk>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut running = self.on_disk.running.lock();
        running.retain(|(_, other)| !Arc::ptr_eq(other, &self.progress));
    }
}

impl OnDisk {
    /// What there is. An image that was moved or removed since does not count.
    pub fn durability(&self) -> Durability {
        if let Some((to, progress)) = self.running.lock().last() {
            let (done, total) = progress.bytes();
            let to = to.clone();
            return Durability::Persisting { to, done, total };
        }
        match &*self.last.lock() {
            Some(written) if identity(&written.directory) == Some(written.identity) => {
                Durability::Durable {
                    at: written.directory.clone(),
                }
            }
            _ => Durability::Resident,
        }
    }

    /// Has all writing end.
    pub fn cancel(&self, why: Why) {
        let running = self.running.lock();
        running
            .iter()
            .for_each(|(_, progress)| progress.cancel(why));
    }

    /// Begins to write to a directory.
    pub fn begin(self: &Arc<Self>, parts: Parts, target: &Path, options: Options) -> Persisting {
        let progress = Arc::new(Progress::default());
        let shown = (target.to_owned(), Arc::clone(&progress));
        self.running.lock().push(shown);
        Persisting {
            parts,
            target: target.to_owned(),
            options,
            running: Running {
                progress,
                on_disk: Arc::clone(self),
            },
        }
    }
}

impl Persisting {
    /// How far it is, and the way to cancel it.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.running.progress
    }

    /// Does it.
    ///
    /// # Errors
    ///
    /// As [`persist`].
    pub fn run(self) -> Result<Summary> {
        let Self {
            parts,
            target,
            options,
            running,
        } = self;
        let is_passing = options.lend;
        let done = persist(parts, &target, options, &running.progress);
        if done.is_ok() && !is_passing {
            let identity = identity(&target);
            *running.on_disk.last.lock() = identity.map(|identity| Written {
                directory: target,
                identity,
            });
        }
        done
    }
}

fn identity(directory: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(directory.join(MEMORY_FILE)).ok()?;
    Some((metadata.dev(), metadata.ino()))
}
