//! Address spaces at a checkpoint: those that can are taken as increments, the others fork a shadow.

use nix::unistd::Pid;

use super::{Result, Spaces};
use crate::freeze::{self, Stopped};
use crate::memory::{self, Changes, Forks, Fresh, Inquiry, Space, SpaceImage};
use crate::record::Context;
use crate::{fault, task};

/// What is to be taken of each process.
pub(super) struct Begun {
    increments: Vec<(Pid, Changes, Inquiry)>,
    shadows: Vec<Whole>,
    forks: Forks,
}

/// A process that forks a shadow, and how it differs from what it was, if that is known.
type Whole = (Pid, Option<Changes>);

/// What the processes have answered and forked.
pub(super) struct Ready {
    increments: Vec<(Pid, Changes, memory::Answers)>,
    shadows: Vec<(Whole, Fresh)>,
}

/// Whether any of these processes was taken before, so that it may be an increment now.
pub(super) fn is_any_known(spaces: &Spaces, pids: &[Pid]) -> bool {
    let mut known = pids.iter().filter_map(|pid| spaces.get(pid));
    known.any(Space::is_known)
}

/// Finds out how each can be taken, and has them fork and answer, all at the same time. Until [`Begun::finish`] nothing may be
/// done to their leaders. Without `standing` all fork.
pub(super) fn begin(
    stopped: &mut Stopped,
    spaces: &Spaces,
    living: &[Pid],
    standing: Option<&task::Standing>,
) -> Result<Begun> {
    let mut increments = Vec::new();
    let mut shadows = Vec::new();
    for pid in living {
        let space = spaces.get(pid).ok_or(freeze::Error::Gone(*pid))?;
        let changes = match standing {
            Some(standing) => space.changes(stopped, standing.of(*pid))?,
            None => None,
        };
        match changes {
            Some(changes) if !changes.want_shadow() => increments.push((*pid, changes)),
            changes => shadows.push((*pid, changes)),
        }
    }
    if !increments.is_empty() {
        fault::point("increment.found");
    }
    let pids: Vec<Pid> = shadows.iter().map(|(pid, _)| *pid).collect();
    let forks = memory::start_shadows(stopped, &pids);
    let mut asked = Vec::with_capacity(increments.len());
    let mut failure = None;
    for (pid, changes) in increments {
        match Inquiry::start(stopped, pid) {
            Ok(inquiry) => asked.push((pid, changes, inquiry)),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    let begun = Begun {
        increments: asked,
        shadows,
        forks,
    };
    match failure {
        None => Ok(begun),
        Some(error) => {
            if let Ok(ready) = begun.finish(stopped) {
                ready.discard(stopped);
            }
            Err(error.into())
        }
    }
}

impl Begun {
    /// Waits for all of them; on failure there are no shadows.
    pub(super) fn finish(self, stopped: &mut Stopped) -> Result<Ready> {
        let mut increments = Vec::with_capacity(self.increments.len());
        let mut failure = None;
        for (pid, changes, inquiry) in self.increments {
            match inquiry.finish(stopped, pid) {
                Ok(answers) => increments.push((pid, changes, answers)),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        let made = self.forks.finish(stopped)?;
        let ready = Ready {
            increments,
            shadows: self.shadows.into_iter().zip(made).collect(),
        };
        match failure {
            None => Ok(ready),
            Some(error) => {
                ready.discard(stopped);
                Err(error.into())
            }
        }
    }
}

impl Ready {
    /// Gives all of it up.
    pub(super) fn discard(self, stopped: &mut Stopped) {
        for (_, shadow) in self.shadows {
            shadow.discard(stopped);
        }
    }

    /// Takes the images, in the order of processes. Those taken before a failure are in `images`.
    pub(super) fn capture(
        self,
        stopped: &mut Stopped,
        spaces: &mut Spaces,
        standing: &task::Standing,
        context: &mut Context,
        images: &mut Vec<SpaceImage>,
    ) -> Result<Taken> {
        let mut taken = Taken::default();
        let mut shadows = self.shadows.into_iter();
        let mut failure = None;
        for ((pid, changes), shadow) in shadows.by_ref() {
            let captured = match spaces.get_mut(&pid) {
                Some(space) => {
                    let standing = standing.of(pid).to_vec();
                    space.capture(stopped, shadow, changes, standing, context)
                }
                None => {
                    shadow.discard(stopped);
                    Err(freeze::Error::Gone(pid).into())
                }
            };
            match captured {
                Ok((image, armed)) => {
                    taken.resident += armed.pages;
                    taken.copied += armed.bytes / memory::PAGE;
                    taken.new += armed.pages;
                    images.push(image);
                }
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
            fault::point("checkpoint.shadow");
        }
        if let Some(error) = failure {
            shadows.for_each(|(_, shadow)| shadow.discard(stopped));
            return Err(error.into());
        }
        for (pid, changes, answers) in self.increments {
            let space = spaces.get_mut(&pid).ok_or(freeze::Error::Gone(pid))?;
            let resident = changes.resident();
            let (image, copied) = space.capture_increment(stopped, changes, answers, context)?;
            images.push(image);
            taken.resident += resident;
            taken.copied += copied.pages;
            taken.new += copied.pages;
            fault::point("increment.taken");
        }
        images.sort_by_key(|image| image.pid);
        Ok(taken)
    }
}

/// What was taken of all address spaces.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Taken {
    /// Pages that were populated.
    pub(super) resident: u64,
    /// Pages that were copied.
    pub(super) copied: u64,
    /// Those, and all of address spaces that have a shadow of their own.
    pub(super) new: u64,
}
