//! Making a container of a checkpoint that was taken elsewhere.
//!
//! What can't be undone by a rollback is done here: processes with their numbers, parents and credentials, and their
//! address spaces. The rest is a rollback, of a tree that is as different from the checkpoint as can be: so all that goes
//! back in place, goes back here too, by the same code, and `--verify` is the same oracle. The tree has a checkpoint in RAM
//! then, with shadows, like any other.

mod origin;
mod processes;

pub use origin::{Origin, Original};

use crate::checkpoint::{self, Checkpoint, Spaces};
use crate::filesystem::{Files, Image};
use crate::freeze::{OnTracerDeath, Tree};
use crate::memory;
use crate::outcome::Refusal;
use crate::phases::Phases;
use crate::rollback::{self, Done, Failure};
use crate::{fault, objects, task};

use processes::Work;

/// Refuses a checkpoint of which no container can be made.
///
/// # Errors
///
/// Refused by name; or a record is damaged.
pub fn check(origin: &Origin<'_>) -> checkpoint::Result<()> {
    let recorded = origin.recorded(&task::Renamed::default())?;
    task::check_transplant(&recorded)?;
    let names = recorded
        .processes()
        .map(|process| (process.pid().as_raw(), process.comm()))
        .collect();
    objects::check_transplant(origin.context, &names)?;
    origin.check_memory()?;
    let of_living = recorded.processes().filter(|process| !process.is_zombie());
    for process in of_living {
        if origin.space_of(process.pid())?.is_none() {
            return Err(Refusal {
                object: "its memory".into(),
                holder: format!("pid {} ({})", process.pid(), process.comm()),
                remedy: "the image does not have it; take a new checkpoint".into(),
            }
            .into());
        }
    }
    Ok(())
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
    origin: &Origin<'_>,
    files: &mut Files,
    (name, verify): (&str, bool),
    phases: &mut Phases,
) -> Result<(Checkpoint, Done), Failure> {
    check(origin).map_err(Failure::Untouched)?;
    let untouched = |error: checkpoint::Error| Failure::Untouched(error);
    let mounts = files
        .open(tree.root(), &Image::default())
        .map_err(|error| untouched(error.into()))?;
    let stop = tree.stop(OnTracerDeath::Die);
    let mut stopped = stop.map_err(|error| untouched(error.into()))?;
    phases.end("stop");
    fault::point("restore.stopped");
    let work = Work::new(&mut stopped, spaces, origin);
    let made = work.and_then(|work| work.run(name, phases));
    let checkpoint = made.map_err(Failure::HalfWay)?;
    for image in &checkpoint.spaces {
        let known = image.advice(&checkpoint.context);
        known
            .and_then(|_| image.guards())
            .map_err(|error: memory::Error| Failure::HalfWay(error.into()))?;
    }
    fault::point("restore.made");
    let mut checkpoints = [checkpoint];
    let done = rollback::bring_back(
        &mut stopped,
        spaces,
        &mut checkpoints,
        files,
        &mounts,
        (0, verify),
        phases,
    )?;
    fault::point("restore.resuming");
    let resumed = stopped.resume();
    resumed.map_err(|error| Failure::HalfWay(error.into()))?;
    phases.end("resume");
    let [checkpoint] = checkpoints;
    Ok((checkpoint, done))
}
