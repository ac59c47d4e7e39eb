//! The capture phases.
//!
//! A checkpoint either is taken whole or refused, and then the tree is as it was. Nothing of it is undone by hand but
//! what the capture itself added: shadows and windows.

mod diff;
mod release;
mod spaces;
mod uses;

pub use diff::diff;
pub use release::release;
pub(crate) use uses::find as files_in_use;

use release::{discard, end_shadows, forget_unused};

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::SystemTime;

use nix::unistd::Pid;

use crate::filesystem::{self, Files};
use crate::freeze::{self, OnTracerDeath, Process, Stopped, Tree};
use crate::kernel::kcmp;
use crate::memory::{self, SharedImage, Space, SpaceImage};
use crate::outcome::Refusal;
use crate::phases::Phases;
use crate::record::{self, Context};
use crate::{fault, objects, task};

/// What can go wrong while a checkpoint is taken or a tree rolled back.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be done, and nothing was touched.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Stopping the tree or running code in it failed.
    #[error(transparent)]
    Freeze(freeze::Error),
    /// An address space.
    #[error(transparent)]
    Memory(memory::Error),
    /// Descriptors.
    #[error(transparent)]
    Objects(objects::Error),
    /// Threads and processes.
    #[error(transparent)]
    Task(task::Error),
    /// Files.
    #[error(transparent)]
    Files(filesystem::Error),
    /// The context.
    #[error(transparent)]
    Record(#[from] record::Error),
}

impl From<freeze::Error> for Error {
    fn from(error: freeze::Error) -> Self {
        match error {
            freeze::Error::Refused(refusal) => Self::Refused(refusal),
            other => Self::Freeze(other),
        }
    }
}

impl From<memory::Error> for Error {
    fn from(error: memory::Error) -> Self {
        match error {
            memory::Error::Refused(refusal) => Self::Refused(refusal),
            memory::Error::Freeze(error) => error.into(),
            other => Self::Memory(other),
        }
    }
}

impl From<objects::Error> for Error {
    fn from(error: objects::Error) -> Self {
        match error {
            objects::Error::Refused(refusal) => Self::Refused(refusal),
            objects::Error::Freeze(error) => error.into(),
            other => Self::Objects(other),
        }
    }
}

impl From<task::Error> for Error {
    fn from(error: task::Error) -> Self {
        match error {
            task::Error::Refused(refusal) => Self::Refused(refusal),
            task::Error::Freeze(error) => error.into(),
            other => Self::Task(other),
        }
    }
}

impl From<filesystem::Error> for Error {
    fn from(error: filesystem::Error) -> Self {
        match error {
            filesystem::Error::Refused(refusal) => Self::Refused(refusal),
            other => Self::Files(other),
        }
    }
}

/// Result of this room.
pub type Result<T> = std::result::Result<T, Error>;

/// The address spaces of a tree that are tracked, by the PID they are reached by.
pub type Spaces = BTreeMap<Pid, Space>;

/// A checkpoint of a tree, in RAM.
#[derive(Debug)]
pub struct Checkpoint {
    /// Its name.
    pub name: String,
    /// When the tree was stopped for it.
    pub taken_at: SystemTime,
    /// All headers.
    pub context: Arc<Context>,
    /// The address spaces.
    pub spaces: Vec<SpaceImage>,
    /// Shared memory.
    pub shared: Vec<SharedImage>,
    /// System V shared memory segments.
    pub segments: memory::Segments,
    /// Descriptors.
    pub objects: objects::Capture,
    /// Files.
    pub files: filesystem::Image,
    /// Files that were open or mapped.
    pub uses: Vec<filesystem::Use>,
    /// What is new about processes and threads that were made again since.
    pub renamed: task::Renamed,
    /// Number of processes.
    pub processes: usize,
    /// Number of threads.
    pub threads: usize,
    /// Pages that were populated when it was taken.
    pub resident_pages: u64,
    /// Pages that were copied when it was taken: those written since the state that it came from.
    pub copied_pages: u64,
    /// Those, and all that were populated of address spaces that have a shadow of their own.
    pub new_pages: u64,
    /// What its owner calls it.
    pub number: u64,
    /// It is not released for others.
    pub pinned: bool,
    /// [`Tree::losses`] when it was taken.
    pub losses: u64,
}

impl Checkpoint {
    /// The image of a process's address space.
    pub fn space_of(&self, pid: Pid) -> Option<&SpaceImage> {
        self.spaces.iter().find(|image| image.pid == pid)
    }
}

/// What becomes of a tree when its checkpoint is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// It runs on.
    RunOn,
    /// All its processes are killed; not an instruction of theirs is executed after the checkpoint.
    End,
}

/// Takes a checkpoint. `others` are the tree's other checkpoints. While the tree is
/// stopped `decide` is told of the checkpoint and says what becomes of the tree.
pub fn take(
    tree: &mut Tree,
    spaces: &mut Spaces,
    others: &[Checkpoint],
    files: &mut Files,
    name: &str,
    phases: &mut Phases,
    decide: impl FnOnce(&Checkpoint) -> Then,
) -> Result<Checkpoint> {
    let prepared = files.prepare(tree.root())?;
    phases.end_running("mounts");
    match spaces.is_empty() {
        true => {
            memory::check_room(tree.root())?;
            warm_up(tree, spaces, phases)?;
        }
        false => memory::prepare_flags(),
    }
    task::prepare_time_left();
    phases.end_running("prepare");
    let mut stopped = tree.stop(OnTracerDeath::RunOn)?;
    let unknown = task::prepare(&mut stopped)?;
    if !unknown.is_empty() {
        stopped.resume()?;
        tree.learn_calls(&unknown);
        stopped = tree.stop(OnTracerDeath::RunOn)?;
        task::prepare(&mut stopped)?;
    }
    phases.end("stop");
    fault::point("checkpoint.stopped");
    let mut images = Vec::new();
    let captured = capture(&mut stopped, spaces, name, &mut images, phases);
    let captured = captured.and_then(|mut checkpoint| {
        if !prepared.is_empty() {
            checkpoint.uses = uses::find(&stopped, &checkpoint.objects, &images)?;
        }
        checkpoint.files = files.capture(prepared, &checkpoint.uses)?;
        phases.end("files");
        fault::point("checkpoint.files");
        Ok(checkpoint)
    });
    match captured {
        Ok(mut checkpoint) => {
            for image in &images {
                if let Some(space) = spaces.get_mut(&image.pid) {
                    space.conclude(Some(image));
                }
            }
            checkpoint.spaces = images;
            if decide(&checkpoint) == Then::End {
                end(&mut stopped, others.iter().chain([&checkpoint]))?;
                phases.end("end");
                return Ok(checkpoint);
            }
            fault::point("checkpoint.resuming");
            stopped.resume()?;
            phases.end("resume");
            fault::point("checkpoint.resumed");
            Ok(checkpoint)
        }
        Err(error) => {
            spaces.values_mut().for_each(|space| space.conclude(None));
            discard(spaces, Some(&mut stopped), others, images);
            forget_unused(&mut stopped, spaces, others);
            stopped.resume()?;
            Err(error)
        }
    }
}

/// Before the first checkpoint: windows into all processes in a short stop of its own, then their memory is armed while
/// they run, so that the stop of the checkpoint has to arm only what was written meanwhile.
fn warm_up(tree: &mut Tree, spaces: &mut Spaces, phases: &mut Phases) -> Result<()> {
    let mut stopped = tree.stop(OnTracerDeath::RunOn)?;
    fault::point("checkpoint.opening");
    let unknown = task::prepare(&mut stopped)?;
    let opened = open_spaces(&mut stopped, spaces);
    if opened.is_err() {
        forget_unused(&mut stopped, spaces, &[]);
    }
    fault::point("checkpoint.opened");
    stopped.resume()?;
    phases.end("open");
    opened?;
    tree.learn_calls(&unknown);
    for space in spaces.values() {
        space.arm_running(tree);
    }
    phases.end_running("arm");
    fault::point("checkpoint.warm");
    Ok(())
}

/// Opens a window into every living process that has none in its address space yet. Returns their PIDs.
fn open_spaces(stopped: &mut Stopped, spaces: &mut Spaces) -> Result<Vec<Pid>> {
    let living: Vec<Pid> = stopped
        .processes()
        .filter(|process| !process.is_zombie())
        .map(|process| process.pid)
        .collect();
    check_spaces(stopped)?;
    for pid in &living {
        stopped.renew(*pid)?;
        let is_current = |space: &Space| {
            stopped
                .member(*pid)
                .is_ok_and(|member| space.is_current(member))
        };
        if !spaces.get(pid).is_some_and(is_current) {
            spaces.insert(*pid, Space::open(stopped, *pid)?);
        }
    }
    Ok(living)
}

fn capture(
    stopped: &mut Stopped,
    spaces: &mut Spaces,
    name: &str,
    images: &mut Vec<SpaceImage>,
    phases: &mut Phases,
) -> Result<Checkpoint> {
    let taken_at = SystemTime::now();
    fault::point("checkpoint.observed");
    let living = open_spaces(stopped, spaces)?;
    phases.end("window");
    fault::point("checkpoint.window");

    let mut context = Context::buffering()?;
    let found = objects::find(stopped)?;
    let asked = task::ask(stopped)?;
    phases.end("tasks");
    let record = |asked: task::Asked, stopped: &Stopped, context: &mut Context| {
        asked.record(stopped, context)?;
        task::Standing::read(context)
    };
    let (begun, standing) = if spaces::is_any_known(spaces, &living) {
        let standing = record(asked, stopped, &mut context)?;
        phases.end("tasks");
        let begun = spaces::begin(stopped, spaces, &living, Some(&standing))?;
        phases.end("scan");
        (begun, Ok(standing))
    } else {
        // None can be an increment: so they fork, and what can be looked at from outside is meanwhile.
        let begun = spaces::begin(stopped, spaces, &living, None)?;
        phases.end("scan");
        let standing = record(asked, stopped, &mut context);
        phases.end("tasks");
        (begun, standing)
    };
    fault::point("checkpoint.tasks");
    let looked = found.look(&mut context);
    phases.end("objects");
    fault::point("checkpoint.objects");
    let ready = begun.finish(stopped);
    phases.end("fork");
    let ready = ready?;
    let recorded = standing.map_err(Error::from).and_then(|standing| {
        let objects = looked?.record(stopped, &mut context)?;
        Ok((standing, objects))
    });
    let (standing, objects) = match recorded {
        Ok(recorded) => recorded,
        Err(error) => {
            ready.discard(stopped);
            return Err(error);
        }
    };
    phases.end("objects");
    let taken = ready.capture(stopped, spaces, &standing, &mut context, images)?;
    phases.end("memory");
    fault::point("checkpoint.armed");
    let segments = memory::Segments::capture(stopped, images)?;
    let shared = SharedImage::capture_all(images, &memfds(&objects), &mut context)?;
    context.finish()?;
    phases.end("shared");
    Ok(Checkpoint {
        name: name.to_owned(),
        taken_at,
        context: Arc::new(context),
        spaces: Vec::new(),
        shared,
        segments,
        objects,
        files: filesystem::Image::default(),
        uses: Vec::new(),
        renamed: task::Renamed::default(),
        processes: stopped.processes().count(),
        threads: stopped.thread_count(),
        resident_pages: taken.resident,
        copied_pages: taken.copied,
        new_pages: taken.new,
        number: 0,
        pinned: false,
        losses: stopped.tree().losses(),
    })
}

/// The memfds among the descriptors, by a PID and number that have them.
fn memfds(objects: &objects::Capture) -> Vec<(Pid, RawFd)> {
    let recorded = &objects.recorded;
    let ids = recorded.memfds();
    ids.filter_map(|id| recorded.places(id).next())
        .map(|place| (Pid::from_raw(place.pid), place.fd))
        .collect()
}

/// Refuses processes that share an address space without being threads of one process.
fn check_spaces(stopped: &Stopped) -> Result<()> {
    let living = || stopped.processes().filter(|process| !process.is_zombie());
    for process in living().filter(|process| process.pid != stopped.root()) {
        let shares = |other: &&Process| {
            other.pid != process.pid
                && kcmp::same(process.pid, other.pid, kcmp::Shared::Memory) == Ok(true)
        };
        let sharer = match stopped.process(process.parent) {
            Some(parent) => Some(parent).filter(|parent| !parent.is_zombie() && shares(parent)),
            // Whoever made an orphan has ended; it may share with anybody.
            None => living().find(shares),
        };
        if let Some(sharer) = sharer {
            return Err(Refusal {
                object: "its address space".into(),
                holder: process.holder(),
                remedy: format!(
                    "it shares it with {} (vfork or CLONE_VM); try again when it has executed its program",
                    sharer.holder()
                ),
            }
            .into());
        }
    }
    Ok(())
}

/// Kills a stopped tree, with the shadows of its checkpoints. The deaths of all are collected, those of whom a PID namespace's
/// init waits for before its own.
fn end<'c>(
    stopped: &mut Stopped<'_>,
    checkpoints: impl Iterator<Item = &'c Checkpoint>,
) -> Result<()> {
    let root = stopped.root();
    let living = stopped.processes().filter(|process| !process.is_zombie());
    let others: Vec<Pid> = living
        .map(|process| process.pid)
        .filter(|pid| *pid != root)
        .collect();
    stopped.kill(&others)?;
    checkpoints.for_each(|checkpoint| end_shadows(&checkpoint.spaces));
    Ok(stopped.kill(&[root])?)
}
