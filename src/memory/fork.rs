//! Making shadows of all address spaces of a tree, side by side.

use nix::unistd::Pid;

use crate::freeze::{self, Batch, StepId, Stopped};

use super::Result;
use super::locks;
use super::shadow::{self, Adoption, Shadow};
use super::space::refuse;

/// A child that is being made a shadow.
#[derive(Debug)]
pub struct Fresh {
    parent: Pid,
    pid: Pid,
    adoption: Adoption,
    /// The program break of the address space.
    pub(super) brk: u64,
    /// How what is mapped from then on is to be locked.
    pub(super) locks_future: u64,
}

impl Fresh {
    /// Waits until it is a shadow. On failure it is gone.
    pub(super) fn finish(self, stopped: &mut Stopped) -> Result<Shadow> {
        let Self { parent, pid, .. } = self;
        let adopted = self.adoption.finish();
        adopted.inspect_err(|_| end(stopped, parent, pid))
    }

    /// Gives it up.
    pub fn discard(self, stopped: &mut Stopped) {
        end(stopped, self.parent, self.pid);
    }
}

/// Processes that fork.
pub struct Forks {
    forks: Vec<Fork>,
    failure: Option<super::Error>,
}

/// Has each process fork a shadow, all at the same time. Until [`Forks::finish`] nothing may be done to their leaders.
pub fn start_shadows(stopped: &mut Stopped, pids: &[Pid]) -> Forks {
    let mut all = Forks {
        forks: Vec::with_capacity(pids.len()),
        failure: None,
    };
    for pid in pids {
        match Fork::start(stopped, *pid) {
            Ok(fork) => all.forks.push(fork),
            Err(error) => {
                all.failure = Some(error);
                break;
            }
        }
    }
    all
}

impl Forks {
    /// The children, in the order of the processes; on failure there are none.
    pub fn finish(self, stopped: &mut Stopped) -> Result<Vec<Fresh>> {
        let Self { forks, mut failure } = self;
        let mut children = Vec::with_capacity(forks.len());
        for fork in forks {
            let child = fork.finish(stopped);
            children.extend(child.map_err(|error| failure.get_or_insert(error)).ok());
        }
        match failure {
            None => Ok(children),
            Some(error) => {
                children
                    .into_iter()
                    .for_each(|child| child.discard(stopped));
                Err(error)
            }
        }
    }
}

/// A batch that forks.
struct Fork {
    parent: Pid,
    brk: StepId,
    future: locks::Question,
    clone: StepId,
}

impl Fork {
    fn start(stopped: &mut Stopped, parent: Pid) -> Result<Self> {
        let mut batch = Batch::new();
        let zero = 0.into();
        let brk = batch.call(libc::SYS_brk, &[zero]);
        let future = locks::Question::add(&mut batch);
        // The clone comes last: should we die, the thread heals itself, and the shadow dies with us.
        let arguments = [libc::CLONE_FILES.into(), zero, zero, zero, zero];
        let clone = batch.call(libc::SYS_clone, &arguments);
        stopped.start(parent, &batch)?;
        Ok(Self {
            parent,
            brk,
            future,
            clone,
        })
    }

    fn finish(self, stopped: &mut Stopped) -> Result<Fresh> {
        let parent = self.parent;
        let outputs = stopped.finish(parent)?;
        let inside = outputs.result(self.clone).map_err(|errno| {
            refuse(parent, "a shadow", format!("the container can't have another process ({errno}): raise its memory, PID or process limit"))
        })?;
        let [pid] = outputs.born[..] else {
            return Err(freeze::Error::Gone(parent).into());
        };
        match Adoption::start(stopped, parent, pid, inside as i32) {
            Ok(adoption) => Ok(Fresh {
                parent,
                pid,
                adoption,
                brk: outputs.result(self.brk).unwrap_or(0),
                locks_future: self.future.read(&outputs),
            }),
            Err(error) => {
                end(stopped, parent, pid);
                Err(error)
            }
        }
    }
}

/// Kills a shadow, or what was to be one, and has its parent reap it.
pub(super) fn end(stopped: &mut Stopped, parent: Pid, pid: Pid) {
    shadow::kill(pid);
    reap(stopped, parent, pid);
    stopped.tree_mut().remove_shadow(pid);
}

/// Has a process reap its shadow, which is a child that only `__WALL` waits see.
pub(super) fn reap(stopped: &mut Stopped, parent: Pid, shadow: Pid) {
    let inside = stopped
        .tree()
        .shadow_inside(shadow)
        .unwrap_or(shadow.as_raw());
    let mut batch = Batch::new();
    let options = libc::__WALL | libc::WNOHANG;
    let arguments = [inside.into(), 0.into(), options.into(), 0.into()];
    batch.call(libc::SYS_wait4, &arguments);
    // If the parent is gone its init reaps it.
    let _ = stopped.run(parent, &batch);
}
