//! Observe, plan, execute, verify.
//!
//! Everything that can be refused is refused before the first change. An error after it leaves a tree that is neither
//! as it was nor as recorded: the caller kills it.

use std::collections::BTreeMap;

use nix::unistd::Pid;

use crate::checkpoint::{Checkpoint, Error, Result, Spaces};
use crate::freeze::{Batch, OnTracerDeath, Outputs, StepId, Stopped, Tree};
use crate::memory::{self, Copied, Observed, Ranges, Span};
use crate::outcome::{Difference, Refusal};
use crate::phases::Phases;
use crate::{fault, objects, task};

/// What a rollback did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Done {
    /// Pages put back.
    pub copied: Copied,
    /// Processes and threads killed.
    pub killed: usize,
    /// Threads made again that had ended: their TIDs in our namespace, as they were and as they are now.
    pub revived: Vec<(Pid, Pid)>,
    /// Connections reset.
    pub reset_connections: usize,
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
    let mut stopped = tree
        .stop(OnTracerDeath::Die)
        .map_err(|error| untouched(error.into()))?;
    phases.end("stop");
    fault::point("rollback.stopped");
    let mut plan = observe(&mut stopped, &checkpoints[to], phases).map_err(untouched)?;
    fault::point("rollback.planned");

    let done = execute(
        &mut stopped,
        spaces,
        &mut checkpoints[to],
        &mut plan,
        phases,
    )
    .map_err(Failure::HalfWay)?;
    for other in checkpoints
        .iter_mut()
        .enumerate()
        .filter(|(index, _)| *index != to)
        .map(|(_, other)| other)
    {
        for (was, is) in &done.revived {
            task::rename(&mut other.renamed, *was, *is);
        }
        for image in &mut other.spaces {
            if let Some((_, plan)) = plan.memory.iter().find(|(pid, _)| *pid == image.pid) {
                image.stale = image.stale.union(&plan.copy);
            }
        }
    }
    if verify {
        let differences =
            compare(&mut stopped, spaces, &checkpoints[to]).map_err(Failure::HalfWay)?;
        if !differences.is_empty() {
            return Err(Failure::Different(differences));
        }
        phases.end("verify");
        fault::point("rollback.verified");
    }
    fault::point("rollback.resuming");
    stopped
        .resume()
        .map_err(|error| Failure::HalfWay(error.into()))?;
    phases.end("resume");
    fault::point("rollback.resumed");
    Ok(done)
}

struct Plan {
    tasks: task::Observed,
    memory: Vec<(Pid, memory::Plan)>,
    /// Segments that were made since.
    segments: memory::Created,
    objects: objects::Plan,
}

/// Refuses if processes born since the checkpoint may be missing from the stopped tree.
fn check_complete(stopped: &Stopped, checkpoint: &Checkpoint) -> Result<()> {
    if stopped.tree().losses() == checkpoint.losses {
        return Ok(());
    }
    let root = stopped.process(stopped.root());
    Err(Refusal {
        object: "the tree".into(),
        holder: root.map_or_else(String::new, |root| root.holder()),
        remedy: "processes that have left their parents since the checkpoint may have been missed, as the kernel's process events did not all arrive; take a new checkpoint".into(),
    }
    .into())
}

fn observe(stopped: &mut Stopped, checkpoint: &Checkpoint, phases: &mut Phases) -> Result<Plan> {
    // It may write to the tree's memory, so it precedes the scan.
    task::prepare(stopped)?;
    check_complete(stopped, checkpoint)?;
    let recorded = task::Recorded::read(&checkpoint.context, &checkpoint.renamed)?;
    task::check_presence(stopped, &recorded)?;
    let context = &checkpoint.context;
    let mut maps = Vec::with_capacity(checkpoint.spaces.len());
    for image in &checkpoint.spaces {
        let map = memory::look_at_map(stopped, image, context)?;
        maps.push((map, image.populated(context)?));
    }
    phases.end("map");
    // While the processes answer they are looked at from outside: what answering writes to their pages, it writes at every
    // rollback.
    let mut questions = Questions::start(stopped, checkpoint)?;
    let mut observed = Vec::with_capacity(maps.len());
    let mut populated = Vec::with_capacity(maps.len());
    for (image, (map, pages)) in checkpoint.spaces.iter().zip(maps) {
        observed.push(Observed::look(stopped, image, map, &pages)?);
        populated.push(pages);
    }
    phases.end("scan");
    let seen = task::check_from_outside(stopped, &recorded)?;
    phases.end("family");
    fault::point("rollback.scanned");
    let answers = questions.finish(stopped, &mut observed)?;
    let tasks = task::check(stopped, &recorded, answers.leaders, &seen)?;
    phases.end("check");
    fault::point("rollback.observed");
    let memory = plan_memory(stopped, checkpoint, &observed, &populated)?;
    let asked = std::mem::take(&mut questions.segments);
    let found = asked
        .into_iter()
        .filter_map(|(pid, asked)| Some((asked, answers.outputs.get(&pid)?)));
    let found: Vec<_> = found.collect();
    let segments = checkpoint.segments.check(stopped, &found)?;
    let objects = objects::prepare(
        stopped,
        &checkpoint.objects,
        &questions.tables,
        &answers.outputs,
    )?;
    phases.end("plan");
    Ok(Plan {
        tasks,
        memory,
        segments,
        objects,
    })
}

/// What is asked of the processes of a checkpoint: a batch for each, all of which run at the same time.
struct Questions {
    processes: Vec<(Pid, task::Questions, StepId)>,
    segments: Vec<(Pid, memory::Asked)>,
    tables: objects::Asked,
}

struct Answers {
    leaders: BTreeMap<Pid, task::Leader>,
    outputs: BTreeMap<Pid, Outputs>,
}

impl Questions {
    fn start(stopped: &mut Stopped, checkpoint: &Checkpoint) -> Result<Self> {
        let mut all = Self {
            processes: Vec::with_capacity(checkpoint.spaces.len()),
            segments: Vec::new(),
            tables: objects::Asked::new(),
        };
        for pid in checkpoint.spaces.iter().map(|image| image.pid) {
            let mut batch = Batch::new();
            let brk = batch.call(libc::SYS_brk, &[0.into()]);
            let of_task = task::Questions::add(&mut batch);
            let asked = checkpoint.segments.ask(pid, &mut batch);
            all.segments.extend(asked.map(|asked| (pid, asked)));
            objects::ask(&checkpoint.objects, pid, &mut batch, &mut all.tables);
            stopped.start(pid, &batch)?;
            all.processes.push((pid, of_task, brk));
        }
        Ok(all)
    }

    fn finish(&mut self, stopped: &mut Stopped, observed: &mut [Observed]) -> Result<Answers> {
        let mut answers = Answers {
            leaders: BTreeMap::new(),
            outputs: BTreeMap::new(),
        };
        for ((pid, of_task, brk), observed) in self.processes.iter().zip(observed) {
            let outputs = stopped.finish(*pid)?;
            observed.brk = outputs.result(*brk).ok();
            answers.leaders.insert(*pid, of_task.read(&outputs, *pid)?);
            answers.outputs.insert(*pid, outputs);
        }
        Ok(answers)
    }
}

fn plan_memory(
    stopped: &Stopped,
    checkpoint: &Checkpoint,
    observed: &[Observed],
    populated: &[Ranges],
) -> Result<Vec<(Pid, memory::Plan)>> {
    let mut plans = Vec::with_capacity(observed.len());
    for ((image, observed), populated) in checkpoint.spaces.iter().zip(observed).zip(populated) {
        let recorded = memory::Recorded {
            header: image.header(&checkpoint.context)?,
            layout: &image.layout,
            populated,
            guards: image.guards()?,
            stale: &image.stale,
        };
        let plan = memory::plan(recorded, observed).map_err(|refusal| Refusal {
            holder: stopped
                .process(image.pid)
                .map_or_else(String::new, |process| process.holder()),
            ..refusal
        })?;
        plans.push((image.pid, plan));
    }
    Ok(plans)
}

fn execute(
    stopped: &mut Stopped,
    spaces: &mut Spaces,
    checkpoint: &mut Checkpoint,
    plan: &mut Plan,
    phases: &mut Phases,
) -> Result<Done> {
    fault::point("rollback.mutating");
    let recorded = task::Recorded::read(&checkpoint.context, &checkpoint.renamed)?;
    let killed = task::kill_born(stopped, &recorded)?;
    fault::point("rollback.killed");
    let revived = task::revive(stopped, &recorded, &mut plan.tasks)?;
    for (was, is) in &revived {
        task::rename(&mut checkpoint.renamed, *was, *is);
    }
    let recorded = match revived.is_empty() {
        true => recorded,
        false => task::Recorded::read(&checkpoint.context, &checkpoint.renamed)?,
    };
    fault::point("rollback.revived");
    task::loosen(stopped, &recorded, &plan.tasks)?;
    phases.end("kill");
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
        image.stale = Ranges::new();
    }
    phases.end("rearm");
    fault::point("rollback.rearmed");
    for process in stopped.processes_mut() {
        for thread in &mut process.threads {
            thread.settle()?;
        }
    }
    phases.end("registers");
    Ok(Done {
        copied,
        killed,
        revived,
        reset_connections: effects.reset_connections,
    })
}

fn compare(
    stopped: &mut Stopped,
    spaces: &mut Spaces,
    checkpoint: &Checkpoint,
) -> Result<Vec<Difference>> {
    let recorded = task::Recorded::read(&checkpoint.context, &checkpoint.renamed)?;
    let mut differences = Vec::new();
    // Memory first: the others run code in the tree, upon which the kernel writes to the threads' rseq areas.
    let areas = recorded.rseq_areas();
    let ignored = areas.map(|(start, end)| Span { start, end }).collect();
    for image in &checkpoint.spaces {
        let space = space(spaces, image.pid)?;
        differences.extend(memory::verify(
            stopped,
            space,
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
