//! Making a container of a checkpoint that was taken elsewhere.
//!
//! What can't be undone by a rollback is done here: processes with their numbers, parents and credentials, and their
//! address spaces. The rest is a rollback, of a tree that is as different from the checkpoint as can be: so all that goes
//! back in place, goes back here too, by the same code, and `--verify` is the same oracle. The tree has a checkpoint in RAM
//! then, with shadows, like any other.

mod contents;
mod origin;
mod processes;

pub use origin::Origin;

use crate::checkpoint::{self, Checkpoint, Spaces};
use crate::filesystem::{self, Files, Image, Mounts, StoredArea};
use crate::freeze::{self, OnTracerDeath, Stopped, Tree};
use crate::outcome::Refusal;
use crate::phases::Phases;
use crate::rollback::{self, Done, Failure};
use crate::{fault, image, memory, objects, record, task};

use processes::Work;

/// Why no container was made of an image. What there is of one is to be killed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It can't be made, by name.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A processes, its memory or a descriptor could not be made.
    #[error(transparent)]
    Made(checkpoint::Error),
    /// The image.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// What was made could not be brought back.
    #[error(transparent)]
    BroughtBack(#[from] Failure),
}

/// Result of this room.
pub type Result<T> = std::result::Result<T, Error>;

impl From<checkpoint::Error> for Error {
    fn from(error: checkpoint::Error) -> Self {
        match error {
            checkpoint::Error::Refused(refusal) => Self::Refused(refusal),
            other => Self::Made(other),
        }
    }
}

macro_rules! from {
    ($($error:ty),+) => {
        $(impl From<$error> for Error {
            fn from(error: $error) -> Self {
                checkpoint::Error::from(error).into()
            }
        })+
    };
}

from!(
    freeze::Error,
    memory::Error,
    objects::Error,
    task::Error,
    filesystem::Error,
    record::Error
);

/// Makes an error of a failed call of ours.
fn system(what: &str) -> impl Fn(std::io::Error) -> freeze::Error + use<> {
    let what = what.to_owned();
    move |error| freeze::Error::System {
        what: what.clone(),
        error,
    }
}

/// Refuses an image of which no container can be made. Nothing is made.
///
/// # Errors
///
/// Refused by name; or a record is damaged.
pub fn check(origin: &Origin) -> Result<()> {
    origin.check_numbers()?;
    let recorded = origin.recorded(&task::Renamed::default())?;
    task::check_transplant(&recorded)?;
    let names = recorded
        .processes()
        .map(|process| (process.pid().as_raw(), process.comm()))
        .collect();
    objects::check_transplant(origin.context(), &names)?;
    Ok(origin.check_memory()?)
}

/// Makes the tree below the init of a container that was created, and not started, what `origin` says, and lets it run.
/// Returns the checkpoint of it, which is in RAM.
///
/// # Errors
///
/// Whatever the error, the container is to be killed: it is not what it was.
pub fn run(
    tree: &mut Tree,
    spaces: &mut Spaces,
    origin: &Origin,
    files: &mut Files,
    (name, verify): (&str, bool),
    phases: &mut Phases,
) -> Result<(Checkpoint, Done)> {
    check(origin)?;
    let areas: Vec<&StoredArea> = origin.files().collect();
    let image = files.restore(tree.root(), &areas, origin)?;
    phases.end_running("files");
    let mounts = files.open(tree.root(), &image)?;
    let mut stopped = tree.stop(OnTracerDeath::Die)?;
    phases.end("stop");
    fault::point("restore.stopped");
    let from = (origin, image, &mounts);
    let made = make(&mut stopped, spaces, from, files, (name, verify), phases);
    // Before it is let go: not an instruction is executed in a state that never was.
    let made = made.inspect_err(|_| stopped.tree_mut().kill())?;
    fault::point("restore.resuming");
    stopped.resume()?;
    phases.end("resume");
    Ok(made)
}

/// Makes the stopped tree what `origin` says.
fn make(
    stopped: &mut Stopped,
    spaces: &mut Spaces,
    (origin, image, mounts): (&Origin, Image, &Mounts),
    files: &mut Files,
    (name, verify): (&str, bool),
    phases: &mut Phases,
) -> Result<(Checkpoint, Done)> {
    let work = Work::new(stopped, spaces, origin, verify)?;
    let mut checkpoint = work.run(name, phases)?;
    checkpoint.files = image;
    for image in &checkpoint.spaces {
        image.advice(&checkpoint.context)?;
        image.guards()?;
    }
    fault::point("restore.made");
    let mut checkpoints = [checkpoint];
    let done = rollback::bring_back(
        stopped,
        spaces,
        &mut checkpoints,
        files,
        mounts,
        (0, verify),
        phases,
    )?;
    let [mut checkpoint] = checkpoints;
    if !checkpoint.files.areas.is_empty() {
        // Only now are they open.
        checkpoint.uses =
            checkpoint::files_in_use(stopped, &checkpoint.objects, &checkpoint.spaces)?;
        files.expose(&checkpoint.files, &checkpoint.uses);
    }
    rollback::wait_on(stopped, &checkpoint, phases)?;
    Ok((checkpoint, done))
}

#[cfg(test)]
mod tests;
