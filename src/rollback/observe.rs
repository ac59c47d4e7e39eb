//! Observes a stopped tree, finds out who must be made again, and plans.

use std::collections::BTreeMap;

use nix::unistd::Pid;

use crate::checkpoint::{Checkpoint, Result, Spaces};
use crate::freeze::{Batch, Outputs, StepId, Stopped};
use crate::memory::{self, Observed, Ranges, SpaceImage, Span};
use crate::outcome::Refusal;
use crate::phases::Phases;
use crate::task::Lost;
use crate::{fault, objects, task};

/// What a rollback has to do.
pub(super) struct Plan {
    /// Processes to be made again.
    pub(super) lost: Lost,
    /// The live state of processes and threads.
    pub(super) tasks: task::Observed,
    /// By the address spaces of the checkpoint, in their order; of those that are lost nothing yet.
    pub(super) memory: Vec<(Pid, memory::Plan)>,
    /// Segments that were made since.
    pub(super) segments: memory::Created,
    /// Mounts to take down, to change and to put back.
    pub(super) mounts: objects::mounts::Plan,
    /// Of descriptors; if processes are lost it only says that it can be done, as if they had none.
    pub(super) objects: objects::Plan,
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

/// Observes the stopped tree and plans, or refuses. Nothing is touched.
pub(super) fn observe(
    stopped: &mut Stopped,
    spaces: &Spaces,
    checkpoint: &Checkpoint,
    phases: &mut Phases,
) -> Result<Plan> {
    // It may write to the tree's memory, so it precedes the scan.
    task::prepare(stopped)?;
    check_complete(stopped, checkpoint)?;
    let recorded = task::Recorded::read(&checkpoint.context, &checkpoint.renamed)?;
    let mut lost = Lost::missing(stopped, &recorded)?;
    if !lost.is_empty() {
        lost.await_reapers(stopped);
    }
    loop {
        if !lost.is_empty() {
            lost.complete(&recorded);
            check_lost(stopped, checkpoint, &recorded, &lost)?;
        }
        match look(stopped, spaces, checkpoint, &recorded, lost, phases)? {
            Seen::All(plan) => return Ok(*plan),
            Seen::MoreLost(known) => lost = known,
        }
    }
}

enum Seen {
    All(Box<Plan>),
    /// Others can't be rolled back where they are: all has to be seen without them.
    MoreLost(Lost),
}

fn look(
    stopped: &mut Stopped,
    spaces: &Spaces,
    checkpoint: &Checkpoint,
    recorded: &task::Recorded<'_>,
    mut lost: Lost,
    phases: &mut Phases,
) -> Result<Seen> {
    let context = &checkpoint.context;
    let images: Vec<&SpaceImage> = checkpoint
        .spaces
        .iter()
        .filter(|image| !lost.contains(image.pid))
        .collect();
    let mut maps = Vec::with_capacity(images.len());
    let before = lost.len();
    for image in &images {
        let map = match memory::look_at_map(stopped, image, context)? {
            memory::Map::Same => None,
            memory::Map::Other(layout) => Some(layout),
            memory::Map::Gone(refusal) => {
                lost.add(image.pid, refusal);
                continue;
            }
        };
        maps.push((map, image.populated(context)?));
    }
    if lost.len() > before {
        return Ok(Seen::MoreLost(lost));
    }
    phases.end("map");
    // While the processes answer they are looked at from outside: what answering writes to their pages, it writes at every
    // rollback.
    let mut questions = Questions::start(stopped, checkpoint, &images)?;
    let mut observed = Vec::with_capacity(maps.len());
    let mut populated = Vec::with_capacity(maps.len());
    for (image, (map, pages)) in images.iter().zip(maps) {
        observed.push(Observed::look(stopped, image, map, &pages)?);
        populated.push(pages);
    }
    phases.end("scan");
    let (seen, changed) = task::check_from_outside(stopped, recorded, &lost)?;
    phases.end("family");
    fault::point("rollback.scanned");
    let answers = questions.finish(stopped, &mut observed)?;
    if !changed.is_empty() {
        changed
            .into_iter()
            .for_each(|(pid, refusal)| lost.add(pid, refusal));
        return Ok(Seen::MoreLost(lost));
    }
    let (tasks, changed) = task::check(stopped, recorded, &lost, answers.leaders, &seen)?;
    if !changed.is_empty() {
        changed
            .into_iter()
            .for_each(|(pid, refusal)| lost.add(pid, refusal));
        return Ok(Seen::MoreLost(lost));
    }
    task::check_room(stopped, recorded, &lost, &tasks)?;
    phases.end("check");
    fault::point("rollback.observed");
    let memory = plan_memory(stopped, spaces, checkpoint, &images, &observed, &populated)?;
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
        &gone(checkpoint, recorded, &lost),
    )?;
    let mounts = objects::mounts::prepare(&checkpoint.objects)?;
    phases.end("plan");
    Ok(Seen::All(Box::new(Plan {
        lost,
        tasks,
        memory,
        segments,
        mounts,
        objects,
    })))
}

/// The lost processes, and their shadows, which have their namespaces and directories.
fn gone(checkpoint: &Checkpoint, recorded: &task::Recorded<'_>, lost: &Lost) -> objects::Gone {
    let images = checkpoint.spaces.iter();
    let stead = |image: &SpaceImage| {
        let stead = objects::Stead {
            other: image.source.shadow()?.pid.as_raw(),
            number: recorded.process(image.pid)?.identity.namespace_pid,
        };
        Some((image.pid.as_raw(), stead))
    };
    images
        .filter(|image| lost.contains(image.pid))
        .filter_map(stead)
        .collect()
}

/// Refuses if one of the lost processes can't be made again.
fn check_lost(
    stopped: &mut Stopped,
    checkpoint: &Checkpoint,
    recorded: &task::Recorded<'_>,
    lost: &Lost,
) -> Result<()> {
    lost.check(stopped, recorded)?;
    checkpoint.segments.check_asked(|pid| lost.contains(pid))?;
    for image in checkpoint
        .spaces
        .iter()
        .filter(|image| lost.contains(image.pid))
    {
        let maker = recorded
            .process(image.pid)
            .and_then(|process| recorded.begins_as(process))
            .and_then(|maker| Some((maker, checkpoint.space_of(maker.pid())?)));
        let obstacle = match maker {
            None => Some("nothing is known of its parent's memory"),
            Some((maker, _)) if maker.pid() == image.pid => match memory::obstacle(image, image)? {
                None if !image.shadow()?.keeps_time => {
                    Some("its children live in another time namespace")
                }
                None => task::shadow_obstacle(maker, image.shadow()?.pid),
                obstacle => obstacle,
            },
            Some((maker, of_maker)) => match memory::obstacle(image, of_maker)? {
                None if !memory::same_program(image, of_maker)
                    && !task::may_set_program(maker)
                    && !task::keeps_rights(maker) =>
                {
                    Some(
                        "it had executed another program than its parent, which would lose privileges by that",
                    )
                }
                obstacle => obstacle,
            },
        };
        if let Some(obstacle) = obstacle {
            return Err(lost.refuse(image.pid, obstacle).into());
        }
    }
    Ok(())
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
    fn start(
        stopped: &mut Stopped,
        checkpoint: &Checkpoint,
        images: &[&SpaceImage],
    ) -> Result<Self> {
        let mut all = Self {
            processes: Vec::with_capacity(images.len()),
            segments: Vec::new(),
            tables: objects::Asked::new(),
        };
        for pid in images.iter().map(|image| image.pid) {
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
    spaces: &Spaces,
    checkpoint: &Checkpoint,
    images: &[&SpaceImage],
    observed: &[Observed],
    populated: &[Ranges],
) -> Result<Vec<(Pid, memory::Plan)>> {
    let mut seen = images.iter().zip(observed).zip(populated).peekable();
    let mut plans = Vec::with_capacity(checkpoint.spaces.len());
    for image in &checkpoint.spaces {
        let is_it = |((seen, _), _): &((&&SpaceImage, _), _)| seen.pid == image.pid;
        let Some(((_, observed), populated)) = seen.next_if(is_it) else {
            plans.push((image.pid, memory::Plan::default()));
            continue;
        };
        let stale = match spaces.get(&image.pid) {
            Some(space) => space.stale(image, populated),
            None => image.layout.private().map(Span::from).collect(),
        };
        let recorded = memory::Recorded {
            header: image.header(&checkpoint.context)?,
            layout: &image.layout,
            populated,
            guards: image.guards()?,
            stale: &stale,
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
