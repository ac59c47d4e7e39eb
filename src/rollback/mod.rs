//! Observe, plan, execute, verify.
//!
//! Everything that can be refused is refused before the first change. An error after it leaves a tree that is neither
//! as it was nor as recorded: the caller kills it.

mod observe;
mod remake;

use nix::unistd::Pid;

use crate::checkpoint::{Checkpoint, Error, Result, Spaces};
use crate::filesystem::{self, Files, Image, Mounts, Plans};
use crate::freeze::{OnTracerDeath, Stopped, Tree};
use crate::memory::{self, Copied, Span};
use crate::outcome::{Difference, Refusal};
use crate::phases::Phases;
use crate::record::Kind;
use crate::{fault, objects, task};

use observe::{Plan, observe};

/// What a rollback did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Done {
    /// Pages put back.
    pub copied: Copied,
    /// Processes and threads killed.
    pub killed: usize,
    /// Processes made again that had ended or changed what can't be undone, and threads made again that had ended.
    pub revived: usize,
    /// Connections reset.
    pub reset_connections: usize,
    /// Files put back.
    pub files: filesystem::Put,
}

/// Why a rollback did not come about.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// It failed before anything was changed; the tree runs on.
    #[error(transparent)]
    Untouched(Error),
    /// It failed after changes began. The tree must be killed.
    #[error(transparent)]
    HalfWay(Error),
    /// The comparison found differences. The tree must be killed.
    #[error("after the rollback {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Different(Vec<Difference>),
}

/// Rolls the tree back to checkpoint number `to` of `checkpoints` and lets it run.
pub fn run(
    tree: &mut Tree,
    spaces: &mut Spaces,
    checkpoints: &mut [Checkpoint],
    files: &mut Files,
    to: usize,
    verify: bool,
    phases: &mut Phases,
) -> std::result::Result<Done, Failure> {
    let untouched = |error: Error| Failure::Untouched(error);
    for image in &checkpoints[to].spaces {
        image
            .advice(&checkpoints[to].context)
            .and_then(|_| image.guards())
            .map_err(|error| untouched(error.into()))?;
    }
    let mounts = files
        .open(
            who_sees_files(tree, &checkpoints[to]),
            &checkpoints[to].files,
        )
        .map_err(|error| untouched(error.into()))?;
    phases.end_running("mounts");
    let mut stopped = tree
        .stop_remains(OnTracerDeath::Die)
        .map_err(|error| untouched(error.into()))?;
    phases.end("stop");
    fault::point("rollback.stopped");
    let done = bring_back(
        &mut stopped,
        spaces,
        checkpoints,
        files,
        &mounts,
        (to, verify),
        phases,
    );
    let waiting = |done| match wait_on(&mut stopped, &checkpoints[to], phases) {
        Ok(()) => Ok(done),
        Err(error) => Err(Failure::HalfWay(error)),
    };
    let done = done.and_then(waiting).inspect_err(|failure| {
        if !matches!(failure, Failure::Untouched(_)) {
            // Before it is let go: not an instruction is executed in a state that never was.
            stopped.tree_mut().kill();
        }
    })?;
    fault::point("rollback.resuming");
    stopped
        .resume()
        .map_err(|error| Failure::HalfWay(error.into()))?;
    phases.end("resume");
    fault::point("rollback.resumed");
    Ok(done)
}

/// A process that has the mounts of a tree: its root or, if that has ended, the shadow of it.
fn who_sees_files(tree: &Tree, checkpoint: &Checkpoint) -> Pid {
    let root = tree.root();
    let of_root = checkpoint.space_of(root);
    let shadow = of_root.and_then(|image| image.source.shadow());
    match shadow {
        Some(shadow) if !tree.is_alive() && shadow.is_alive() => shadow.pid,
        _ => root,
    }
}

/// The same to a tree that is stopped, and stays so. `to` says to which checkpoint, and whether all is to be compared.
pub(crate) fn bring_back(
    stopped: &mut Stopped,
    spaces: &mut Spaces,
    checkpoints: &mut [Checkpoint],
    files: &mut Files,
    mounts: &Mounts,
    (to, verify): (usize, bool),
    phases: &mut Phases,
) -> std::result::Result<Done, Failure> {
    let untouched = |error: Error| Failure::Untouched(error);
    let mut plan = observe(stopped, spaces, &checkpoints[to], phases).map_err(untouched)?;
    let plans = files
        .plan(mounts, &checkpoints[to].files, &checkpoints[to].uses)
        .map_err(|error| untouched(error.into()))?;
    phases.end("files");
    fault::point("rollback.planned");
    let mut writable = Writable {
        files,
        mounts,
        plans: &plans,
    };
    let done = execute(
        stopped,
        spaces,
        checkpoints,
        &mut writable,
        to,
        &mut plan,
        phases,
    )
    .map_err(Failure::HalfWay)?;
    for image in &checkpoints[to].spaces {
        space(spaces, image.pid)
            .and_then(|space| Ok(space.settle(image, &checkpoints[to].context)?))
            .map_err(Failure::HalfWay)?;
    }
    if verify {
        let mut differences = compare(stopped, &checkpoints[to]).map_err(Failure::HalfWay)?;
        let found = writable.files.verify(mounts, &checkpoints[to].files);
        differences.extend(found.map_err(|error| Failure::HalfWay(error.into()))?);
        if !differences.is_empty() {
            return Err(Failure::Different(differences));
        }
        phases.end("verify");
        fault::point("rollback.verified");
    }
    writable.files.rest();
    Ok(done)
}

/// The last that is done before the tree runs on: has threads wait in their calls for the time that was left.
pub(crate) fn wait_on(
    stopped: &mut Stopped,
    checkpoint: &Checkpoint,
    phases: &mut Phases,
) -> Result<()> {
    if checkpoint
        .context
        .records_of(Kind::TimeLeft)
        .next()
        .is_none()
    {
        return Ok(());
    }
    task::wait_on(stopped, &recorded(checkpoint)?)?;
    phases.end("waits");
    Ok(())
}

/// The files, open, and what is to be done with them.
struct Writable<'a> {
    files: &'a mut Files,
    mounts: &'a Mounts,
    plans: &'a Plans,
}

impl Writable<'_> {
    /// After all else, which may have made sockets and written to FIFOs.
    fn settle(&mut self, checkpoints: &mut [Checkpoint], to: usize) -> Result<()> {
        let uses = std::mem::take(&mut checkpoints[to].uses);
        let directories = checkpoints[to].objects.recorded.socket_directories();
        let images = checkpoints.iter_mut().map(|other| &mut other.files);
        let mut images: Vec<&mut Image> = images.collect();
        let settled = self.files.settle(
            self.mounts,
            &mut images,
            to,
            self.plans,
            &uses,
            &directories,
        );
        checkpoints[to].uses = uses;
        Ok(settled?)
    }
}

fn execute(
    stopped: &mut Stopped,
    spaces: &mut Spaces,
    checkpoints: &mut [Checkpoint],
    writable: &mut Writable<'_>,
    to: usize,
    plan: &mut Plan,
    phases: &mut Phases,
) -> Result<Done> {
    fault::point("rollback.mutating");
    let recorded = recorded(&checkpoints[to])?;
    let killed = task::kill_born(stopped, &recorded, &plan.lost)?;
    phases.end("kill");
    fault::point("rollback.killed");
    // Before anything is looked up by a path.
    objects::mounts::execute(&mut checkpoints[to].objects, &plan.mounts)?;
    fault::point("rollback.mounted");
    let put = writable
        .files
        .execute(writable.mounts, &checkpoints[to].files, writable.plans)?;
    phases.end("files");
    fault::point("rollback.files");
    let uses = &checkpoints[to].uses;
    let moved = writable.files.moved(
        stopped.root(),
        writable.mounts,
        &checkpoints[to].files,
        writable.plans,
        uses,
    )?;
    for moved in &moved {
        // Where it was open without a name it is the old one still, which is pinned.
        let named = |checkpoint: &&mut Checkpoint| !checkpoint.files.has_nameless(moved.was);
        for checkpoint in checkpoints.iter_mut().filter(named) {
            objects::moved(&mut checkpoint.objects, moved.was, moved.is, &moved.path)?;
            let uses = checkpoint.uses.iter_mut();
            uses.filter(|using| (using.device, using.ino) == moved.was)
                .for_each(|using| (using.device, using.ino) = moved.is);
        }
    }
    let remade = remake::processes(stopped, spaces, checkpoints, to, plan)?;
    if !moved.is_empty() && remade.is_empty() {
        plan.objects = remake::descriptors(stopped, &checkpoints[to])?;
    }
    fault::point("rollback.remade");
    let revived = remake::threads(stopped, checkpoints, to, plan)?;
    if revived > 0 {
        phases.end("remake");
    }
    fault::point("rollback.revived");
    make_room(spaces, checkpoints, to, plan)?;
    let checkpoint = &mut checkpoints[to];
    let recorded = task::Recorded::read(&checkpoint.context, &checkpoint.renamed)?;
    task::loosen(stopped, &recorded, &plan.tasks)?;
    for (image, (pid, plan)) in checkpoint.spaces.iter().zip(&plan.memory) {
        space(spaces, *pid)?.restore_layout(stopped, image, plan)?;
    }
    memory::Segments::remove(stopped, &plan.segments)?;
    phases.end("layout");
    fault::point("rollback.layout");
    let effects = objects::execute(stopped, &mut checkpoint.objects, &plan.objects)?;
    phases.end("objects");
    fault::point("rollback.objects");
    task::restore(stopped, &recorded, &plan.tasks)?;
    phases.end("tasks");
    fault::point("rollback.tasks");

    // Memory comes last: what ran in the tree until here may have written to it.
    let mut copied = Copied::default();
    for shared in &checkpoint.shared {
        copied.add(shared.restore()?);
    }
    phases.end("shared");
    let context = &checkpoint.context;
    for (image, (pid, plan)) in checkpoint.spaces.iter_mut().zip(&plan.memory) {
        copied.add(space(spaces, *pid)?.start_copy(stopped, image, context, plan)?);
    }
    for (pid, _) in &plan.memory {
        space(spaces, *pid)?.finish_copy(stopped)?;
    }
    phases.end("copy");
    fault::point("rollback.copied");
    for (image, (pid, plan)) in checkpoint.spaces.iter_mut().zip(&plan.memory) {
        space(spaces, *pid)?.rearm(stopped, image, &plan.arm)?;
        if remade.contains(pid) {
            image.learn_map(stopped)?;
        }
    }
    phases.end("rearm");
    fault::point("rollback.rearmed");
    for process in stopped.processes_mut() {
        for thread in &mut process.threads {
            thread.settle()?;
        }
    }
    phases.end("registers");
    writable.settle(checkpoints, to)?;
    phases.end("files");
    Ok(Done {
        files: put,
        copied,
        killed,
        revived,
        reset_connections: effects.reset_connections,
    })
}

/// Where the windows have no room for what is to be copied, other checkpoints' copies of pages there are given up.
fn make_room(
    spaces: &mut Spaces,
    checkpoints: &mut [Checkpoint],
    to: usize,
    plan: &Plan,
) -> Result<()> {
    for (pid, plan) in &plan.memory {
        let space = space(spaces, *pid)?;
        if plan.remade || space.has_room(plan) {
            continue;
        }
        let others = checkpoints.iter_mut().enumerate();
        let others = others.filter(|(index, _)| *index != to);
        for image in others.flat_map(|(_, other)| &mut other.spaces) {
            if space.is_of(image) {
                space.empty_cache(image);
            }
        }
    }
    Ok(())
}

fn recorded(checkpoint: &Checkpoint) -> Result<task::Recorded<'_>> {
    Ok(task::Recorded::read(
        &checkpoint.context,
        &checkpoint.renamed,
    )?)
}

fn compare(stopped: &mut Stopped, checkpoint: &Checkpoint) -> Result<Vec<Difference>> {
    let recorded = recorded(checkpoint)?;
    let mut differences = Vec::new();
    // Memory first: the others run code in the tree, upon which the kernel writes to the threads' rseq areas.
    let areas = recorded.rseq_areas();
    let ignored = areas.map(|(start, end)| Span { start, end }).collect();
    for image in &checkpoint.spaces {
        differences.extend(memory::verify(
            stopped,
            image,
            &checkpoint.context,
            &ignored,
        )?);
    }
    for shared in &checkpoint.shared {
        differences.extend(shared.verify()?);
    }
    differences.extend(checkpoint.segments.verify(stopped)?);
    differences.extend(task::verify(stopped, &recorded)?);
    let found = objects::verify(stopped, &checkpoint.objects)?;
    differences.extend(found.into_iter().map(|difference| Difference {
        what: difference.object,
        expected: "as recorded".into(),
        found: difference.what,
    }));
    for process in stopped.processes_mut() {
        for thread in &mut process.threads {
            thread.settle()?;
        }
    }
    Ok(differences)
}

fn space(spaces: &mut Spaces, pid: Pid) -> Result<&mut memory::Space> {
    spaces.get_mut(&pid).ok_or_else(|| {
        Error::Refused(Refusal {
            object: "its address space".into(),
            holder: format!("pid {pid}"),
            remedy: "it is not tracked; release this checkpoint and take a new one".into(),
        })
    })
}
