//! The library's face: attach to a process tree, take checkpoints of it, roll it back.
//!
//! ```no_run
//! use snapback::engine::{Engine, RollbackOptions, Target};
//!
//! # fn main() -> Result<(), snapback::engine::Error> {
//! let mut engine = Engine::attach(Target::of_pid(4711))?;
//! let mut clean = engine.checkpoint("clean")?;
//! // … the program does what it likes …
//! let report = clean.rollback(RollbackOptions::default())?;
//! println!("back in {} us", report.stop_us);
//! # Ok(())
//! # }
//! ```

mod ended;
mod lineage;
mod persist;
mod streams;
mod take;

pub use streams::Stream;
pub use take::TakeOptions;

use lineage::Lineage;
use streams::Streams;

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use nix::unistd::Pid;

use crate::checkpoint::{self, Checkpoint as Held, Spaces};
use crate::filesystem::{self, Files};
use crate::freeze::{self, Tree};
use crate::image;
use crate::memory;
use crate::outcome::{self, Outcome, Refusal, Report};
use crate::phases::Phases;
use crate::record::Stats;
use crate::restore::{self, Origin};
use crate::rollback::{self, Failure};

/// The tree to attach to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// PID of its root.
    pub pid: i32,
    /// Its cgroup directory, if it is a container.
    pub cgroup: Option<PathBuf>,
    /// What to call it in messages.
    pub label: String,
    /// If it is a container that may be made again when it has ended, its checkpoints outlive it: what its shadows have is copied
    /// out when its init ends, of which nobody is told before that is done.
    pub outlives: bool,
}

impl Target {
    /// The tree below a process.
    pub fn of_pid(pid: i32) -> Self {
        Self {
            pid,
            cgroup: None,
            label: format!("pid {pid}"),
            outlives: false,
        }
    }
}

/// How to roll back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RollbackOptions {
    /// Compare the whole live state with the checkpoint before anything runs. It reads every page.
    pub verify: bool,
}

/// What is known of a checkpoint.
#[derive(Debug, Clone)]
pub struct CheckpointInfo {
    /// Its name.
    pub name: String,
    /// When its tree was stopped.
    pub taken_at: SystemTime,
    /// Number of processes.
    pub processes: usize,
    /// Number of threads.
    pub threads: usize,
    /// Bytes and counts of headers by kind.
    pub stats: Stats,
    /// The checkpoint that it came from, if it came from one.
    pub parent: Option<String>,
    /// Whether the tree was equal to it last.
    pub is_current: bool,
    /// Whether it is released by name only.
    pub is_pinned: bool,
    /// Populated pages when it was taken; kept copy-on-write.
    pub resident_pages: u64,
    /// Pages that were copied when it was taken.
    pub copied_pages: u64,
    /// Bytes of shared memory kept as a copy.
    pub shared_bytes: u64,
    /// Bytes of content of files that are kept for it, some of them perhaps for others too.
    pub file_bytes: u64,
    /// Where it is besides RAM.
    pub durability: image::Durability,
    /// Whether it is of a container that has ended, which can be made again of it.
    pub has_ended: bool,
}

/// Why an operation did not come about.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing was touched, for this reason.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A rollback failed after changes began, and the tree was killed.
    #[error("the container was killed: the rollback failed half-way: {message}")]
    Lost {
        /// What failed.
        message: String,
    },
    /// It failed; the tree runs as before.
    #[error("{0}")]
    Failed(String),
}

impl From<checkpoint::Error> for Error {
    fn from(error: checkpoint::Error) -> Self {
        match error {
            checkpoint::Error::Refused(refusal) => Self::Refused(refusal),
            other => Self::Failed(other.to_string()),
        }
    }
}

impl From<freeze::Error> for Error {
    fn from(error: freeze::Error) -> Self {
        checkpoint::Error::from(error).into()
    }
}

impl From<memory::Error> for Error {
    fn from(error: memory::Error) -> Self {
        checkpoint::Error::from(error).into()
    }
}

impl From<restore::Error> for Error {
    fn from(error: restore::Error) -> Self {
        match error {
            restore::Error::Refused(refusal) => Self::Refused(refusal),
            other => Self::Failed(other.to_string()),
        }
    }
}

/// A tree with its checkpoints.
///
/// It belongs to the thread that attached: ptrace is bound to that, and shadows die with it. Dropped, it frees all
/// checkpoints.
#[derive(Debug)]
pub struct Engine {
    target: Target,
    tree: Tree,
    spaces: Spaces,
    checkpoints: Vec<Held>,
    /// Those of containers that have ended: the one that runs took their place, or it can be made again of each.
    ended: Vec<Held>,
    /// What a container is about to be made of again, and which of these that is.
    prepared: Option<(String, Origin)>,
    streams: Streams,
    lineage: Lineage,
    /// It was killed: in the middle of a rollback, or when it was on disk.
    is_killed: bool,
    files: Files,
    /// What is on disk of them, by their names.
    on_disk: BTreeMap<String, Arc<image::OnDisk>>,
    bound_to_thread: PhantomData<*const ()>,
}

impl Engine {
    /// Attaches to a tree. It goes on running. No files go back with it.
    ///
    /// # Errors
    ///
    /// Refused if there is no such process, or it is one that can't be taken (a kernel thread, ourselves).
    pub fn attach(target: Target) -> Result<Self, Error> {
        let none = filesystem::Options {
            include: false,
            ..filesystem::Options::default()
        };
        Self::attach_with_files(target, none)
    }

    /// As [`Engine::attach`]; these files go back with it.
    ///
    /// # Errors
    ///
    /// As [`Engine::attach`].
    pub fn attach_with_files(target: Target, files: filesystem::Options) -> Result<Self, Error> {
        let tree = Tree::new(Pid::from_raw(target.pid))?;
        Ok(Self {
            target,
            tree,
            spaces: Spaces::new(),
            checkpoints: Vec::new(),
            ended: Vec::new(),
            prepared: None,
            streams: Streams::default(),
            lineage: Lineage::default(),
            is_killed: false,
            files: Files::new(files),
            on_disk: BTreeMap::new(),
            bound_to_thread: PhantomData,
        })
    }

    /// Makes of the tree, which is the init of a container that was created and not started, what `origin` says; it has that
    /// checkpoint then, called `name`, and runs.
    ///
    /// # Errors
    ///
    /// Refused if no container can be made of it, or failed. Whatever the error, the container is killed.
    pub fn restore(
        &mut self,
        origin: &Origin,
        name: &str,
        options: RollbackOptions,
    ) -> Result<Report, Error> {
        let restored = self.fill(origin, name, options);
        let (mut checkpoint, report) = restored.inspect_err(|_| {
            self.is_killed = true;
            self.tree.kill();
        })?;
        checkpoint.number = self.lineage.grow();
        self.prepare_to_outlive(&checkpoint);
        self.checkpoints.push(checkpoint);
        Ok(report)
    }

    /// Fills the init of a container that waits with what `origin` says.
    fn fill(
        &mut self,
        origin: &Origin,
        name: &str,
        options: RollbackOptions,
    ) -> Result<(Held, Report), Error> {
        let mut phases = Phases::start();
        let (checkpoint, done) = restore::run(
            &mut self.tree,
            &mut self.spaces,
            origin,
            &mut self.files,
            (name, options.verify),
            &mut phases,
        )?;
        let micros = phases.total().as_micros() as u64;
        let report = Report {
            outcome: Outcome::Restored,
            stop_us: micros,
            total_us: micros,
            phases: phases.microseconds(),
            processes: checkpoint.processes,
            threads: checkpoint.threads,
            dirty_pages: checkpoint.resident_pages,
            copied_bytes: checkpoint.resident_pages * memory::PAGE,
            header_bytes: header_bytes(&checkpoint),
            killed: done.killed,
            revived: done.revived,
            reset_connections: done.reset_connections,
            files: files_report(&checkpoint.files),
            refused: None,
        };
        Ok((checkpoint, report))
    }

    /// Which files go back with the next checkpoint.
    pub fn files(&self) -> &filesystem::Options {
        self.files.options()
    }

    /// Changes that. Where content is kept stays the same, and so do the checkpoints there are.
    pub fn set_files(&mut self, options: filesystem::Options) {
        self.files.set_options(options);
    }

    /// One of the checkpoints it holds.
    ///
    /// # Errors
    ///
    /// There is none of that name.
    pub fn held(&mut self, name: &str) -> Result<Checkpoint<'_>, Error> {
        self.get(name)?;
        Ok(Checkpoint {
            engine: self,
            name: name.to_owned(),
        })
    }

    /// Rolls the tree back to a checkpoint, which is kept.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] and [`Error::Failed`]: nothing was touched. [`Error::Lost`]: it failed after changes began, or
    /// the comparison found a difference, and every process of the tree was killed.
    pub fn rollback(&mut self, name: &str, options: RollbackOptions) -> Result<Report, Error> {
        if let Some(ended) = self.find_ended(name) {
            return Err(self.cannot_go_back_to(&self.ended[ended]));
        }
        let to = self.find(name)?;
        let mut phases = Phases::start();
        let result = rollback::run(
            &mut self.tree,
            &mut self.spaces,
            &mut self.checkpoints,
            &mut self.files,
            to,
            options.verify,
            &mut phases,
        );
        let done = match result {
            Ok(done) => done,
            Err(Failure::Untouched(error)) => return Err(error.into()),
            Err(failure @ (Failure::HalfWay(_) | Failure::Different(_))) => {
                self.is_killed = true;
                self.tree.kill();
                return Err(Error::Lost {
                    message: failure.to_string(),
                });
            }
        };
        let micros = phases.total().as_micros() as u64;
        let checkpoint = &self.checkpoints[to];
        self.lineage.go(checkpoint.number);
        let (processes, threads) = (checkpoint.processes, checkpoint.threads);
        let header_bytes = header_bytes(checkpoint);
        let checkpoints = &self.checkpoints;
        self.tree.forget_dead(|pid| {
            checkpoints
                .iter()
                .flat_map(|checkpoint| &checkpoint.spaces)
                .any(|image| image.pid == pid)
        });
        Ok(Report {
            outcome: Outcome::RolledBack,
            stop_us: micros,
            total_us: phases.total().as_micros() as u64,
            phases: phases.microseconds(),
            processes,
            threads,
            dirty_pages: done.copied.pages,
            copied_bytes: done.copied.bytes,
            header_bytes,
            killed: done.killed,
            revived: done.revived,
            reset_connections: done.reset_connections,
            files: outcome::Files {
                files: done.files.changes,
                bytes: done.files.bytes,
                ..files_report(&self.checkpoints[to].files)
            },
            refused: None,
        })
    }

    /// What has become of files since a checkpoint, in the order of paths. The tree is stopped while it is looked at.
    ///
    /// # Errors
    ///
    /// There is no checkpoint of that name; or refused or failed, and the tree runs as before.
    pub fn diff(&mut self, name: &str) -> Result<Vec<filesystem::Change>, Error> {
        let of = self.find(name)?;
        let checkpoint = &self.checkpoints[of];
        Ok(checkpoint::diff(&mut self.tree, &self.files, checkpoint)?)
    }

    /// The checkpoints, oldest first.
    pub fn checkpoints(&self) -> Vec<CheckpointInfo> {
        let all = self.all();
        let names: BTreeMap<u64, &str> = all
            .iter()
            .map(|checkpoint| (checkpoint.number, checkpoint.name.as_str()))
            .collect();
        let parent = |number| {
            let parent = self.lineage.parent(number)?;
            names.get(&parent).map(|name| (*name).to_owned())
        };
        let info = |checkpoint: &&Held| CheckpointInfo {
            name: checkpoint.name.clone(),
            parent: parent(checkpoint.number),
            is_current: self.lineage.current() == Some(checkpoint.number),
            is_pinned: checkpoint.pinned,
            copied_pages: checkpoint.copied_pages,
            taken_at: checkpoint.taken_at,
            processes: checkpoint.processes,
            threads: checkpoint.threads,
            stats: checkpoint.context.stats().clone(),
            resident_pages: checkpoint.resident_pages,
            shared_bytes: checkpoint.shared.iter().map(|shared| shared.bytes()).sum(),
            file_bytes: checkpoint.files.bytes(),
            durability: self.durability(&checkpoint.name),
            has_ended: self.find_ended(&checkpoint.name).is_some(),
        };
        all.iter().map(info).collect()
    }

    /// Frees a checkpoint, or all of them. The tree runs on; with the last one all traces of us are gone from it.
    ///
    /// # Errors
    ///
    /// There is none of that name; or the tree could not be stopped, and then the checkpoint is freed but a window or
    /// a zombie of it may be left in the tree.
    pub fn release(&mut self, name: Option<&str>) -> Result<(), Error> {
        self.prepared = None;
        let to_free = match name {
            Some(name) if self.find_ended(name).is_some() => {
                self.free_ended(name);
                return Ok(());
            }
            Some(name) => {
                let index = self.find(name)?;
                vec![self.checkpoints.remove(index)]
            }
            None => {
                while let Some(ended) = self.ended.first() {
                    self.free_ended(&ended.name.clone());
                }
                std::mem::take(&mut self.checkpoints)
            }
        };
        self.free(to_free)
    }

    /// Collects the deaths of shadows and of what was killed while it was stopped. To be called when a child of ours has died (`SIGCHLD`) while nothing else is
    /// going on: a tree with a PID namespace of its own that is killed does not end before.
    pub fn collect_deaths(&mut self) {
        self.tree.let_stragglers_go();
        self.outlive();
        self.note_end();
        let sources = self.sources();
        for shadow in sources.iter().filter_map(|source| source.shadow()) {
            shadow.is_alive();
        }
    }

    /// One source for each shadow of the tree.
    fn sources(&self) -> Vec<Arc<memory::Source>> {
        let held = self.checkpoints.iter();
        let images = held.flat_map(|checkpoint| &checkpoint.spaces);
        let named = images.map(|image| (image.source.shadow_id(), &image.source));
        let sources: BTreeMap<_, _> = named.collect();
        sources.into_values().cloned().collect()
    }

    /// Whether the root of the tree lives.
    pub fn is_alive(&self) -> bool {
        self.tree.is_alive()
    }

    /// PID of the root of the tree: after a rollback that has made it again it may be another.
    pub fn root(&self) -> i32 {
        self.tree.root().as_raw()
    }

    /// Whether a tree whose root has ended may come back: by a rollback, or, of a container, by [`Engine::make_again`].
    pub fn can_come_back(&self) -> bool {
        let shadows = self
            .checkpoints
            .iter()
            .flat_map(|checkpoint| &checkpoint.spaces)
            .filter_map(|image| image.source.shadow());
        let by_rollback = !self.is_killed
            && self.target.cgroup.is_none()
            && self.tree.can_lose_root()
            && shadows.into_iter().any(|shadow| shadow.is_alive());
        by_rollback || self.can_be_made_again()
    }

    /// The tree it is attached to.
    pub fn target(&self) -> &Target {
        &self.target
    }

    fn find(&self, name: &str) -> Result<usize, Error> {
        self.checkpoints
            .iter()
            .position(|checkpoint| checkpoint.name == name)
            .ok_or_else(|| self.no_such(name))
    }

    /// All checkpoints, oldest first, of containers that have ended too.
    fn all(&self) -> Vec<&Held> {
        let mut all: Vec<&Held> = self.ended.iter().chain(&self.checkpoints).collect();
        all.sort_by_key(|held| held.number);
        all
    }

    /// A checkpoint, be it that its container has ended.
    fn get(&self, name: &str) -> Result<&Held, Error> {
        match self.find_ended(name) {
            Some(index) => Ok(&self.ended[index]),
            None => Ok(&self.checkpoints[self.find(name)?]),
        }
    }

    fn no_such(&self, name: &str) -> Error {
        let all = self.all();
        let names: Vec<_> = all.iter().map(|held| held.name.as_str()).collect();
        Error::Failed(if names.is_empty() {
            format!("{} has no checkpoints", self.target.label)
        } else {
            format!(
                "{} has no checkpoint \"{name}\"; there are: {}",
                self.target.label,
                names.join(", ")
            )
        })
    }
}

/// A checkpoint that an engine holds. Dropped, it is still held: see [`Checkpoint::release`].
#[derive(Debug)]
pub struct Checkpoint<'e> {
    engine: &'e mut Engine,
    name: String,
}

impl Checkpoint<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Rolls the tree back to it; see [`Engine::rollback`].
    ///
    /// # Errors
    ///
    /// As [`Engine::rollback`].
    pub fn rollback(&mut self, options: RollbackOptions) -> Result<Report, Error> {
        self.engine.rollback(&self.name, options)
    }

    /// Frees it; the tree runs on.
    ///
    /// # Errors
    ///
    /// As [`Engine::release`].
    pub fn release(self) -> Result<(), Error> {
        self.engine.release(Some(&self.name))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Err(error) = self.release(None) {
            tracing::warn!(%error, "checkpoints were not freed cleanly");
        }
    }
}

#[cfg(test)]
mod files_tests;
#[cfg(test)]
mod persist_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tree_tests;

fn files_report(image: &filesystem::Image) -> outcome::Files {
    let shown = |path: &std::path::Path| path.display().to_string();
    outcome::Files {
        included: image
            .areas
            .iter()
            .map(|area| shown(&area.area.mount_point))
            .collect(),
        left_out: image
            .left_out
            .iter()
            .map(|mount| outcome::LeftOut {
                mount_point: shown(&mount.mount_point),
                why: mount.why.clone(),
            })
            .collect(),
        files: image.files() as u64,
        bytes: image.bytes(),
    }
}

fn header_bytes(checkpoint: &Held) -> u64 {
    checkpoint.context.stats().bytes
}
