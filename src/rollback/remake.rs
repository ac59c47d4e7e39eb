//! Makes processes and threads again that are not there.

use std::collections::{BTreeMap, BTreeSet};

use nix::unistd::Pid;

use crate::checkpoint::{Checkpoint, Result, Spaces};
use crate::freeze::{self, Stopped};
use crate::memory::Space;
use crate::{fault, memory, objects, task};

use super::observe::Plan;
use super::recorded;

/// Makes the lost processes again, and plans for them as for the others; returns their PIDs. All checkpoints learn of it.
///
/// Each is made by its parent, of which it is a copy, and gets its memory map at once: what is left to be done is the same
/// as for any other process, but that all of its pages are to be copied.
pub(super) fn processes(
    stopped: &mut Stopped,
    spaces: &mut Spaces,
    checkpoints: &mut [Checkpoint],
    to: usize,
    plan: &mut Plan,
) -> Result<BTreeSet<Pid>> {
    let mut made = Vec::new();
    if plan.lost.is_empty() {
        return Ok(BTreeSet::new());
    }
    let mut numbers = BTreeSet::new();
    for checkpoint in checkpoints.iter() {
        numbers.extend(task::numbers(&recorded(checkpoint)?));
    }
    let records = recorded(&checkpoints[to])?;
    let is_zombie = |pid: &Pid| {
        records
            .process(*pid)
            .is_some_and(task::RecordedProcess::is_zombie)
    };
    let all = plan.lost.in_order(&records).into_iter();
    let (zombies, living): (Vec<Pid>, Vec<Pid>) = all.partition(is_zombie);
    for was in living {
        let pid = process(stopped, spaces, checkpoints, to, was, plan, &numbers)?;
        numbers.insert(pid);
        made.push(pid);
    }
    task::join_groups(stopped, &recorded(&checkpoints[to])?, &made)?;
    for was in zombies {
        let is = task::make(stopped, &recorded(&checkpoints[to])?, was, None, &numbers)?;
        let pid = Pid::from_raw(is.pid);
        learn(checkpoints, to, was, &is)?;
        task::end(stopped, &recorded(&checkpoints[to])?, pid)?;
        numbers.insert(pid);
        made.push(pid);
    }
    plan.objects = descriptors(stopped, &checkpoints[to])?;
    Ok(made.into_iter().collect())
}

/// Plans again for descriptors, when processes or files have been made again.
pub(super) fn descriptors(stopped: &mut Stopped, checkpoint: &Checkpoint) -> Result<objects::Plan> {
    Ok(objects::prepare(
        stopped,
        &checkpoint.objects,
        &objects::Asked::new(),
        &BTreeMap::new(),
        &objects::Gone::new(),
    )?)
}

fn process(
    stopped: &mut Stopped,
    spaces: &mut Spaces,
    checkpoints: &mut [Checkpoint],
    to: usize,
    was: Pid,
    plan: &mut Plan,
    avoid: &BTreeSet<Pid>,
) -> Result<Pid> {
    let gone = freeze::Error::Gone(was);
    let mut images = checkpoints[to].spaces.iter();
    let index = images.position(|image| image.pid == was).ok_or(gone)?;
    let image = &checkpoints[to].spaces[index];
    let shadow = Some(image.shadow()?.pid);
    let is = task::make(stopped, &recorded(&checkpoints[to])?, was, shadow, avoid)?;
    let pid = Pid::from_raw(is.pid);
    learn(checkpoints, to, was, &is)?;
    fault::point("remake.made");
    execute_program(stopped, &checkpoints[to], pid, index)?;

    let checkpoint = &checkpoints[to];
    let image = &checkpoint.spaces[index];
    let generation = image.generation();
    let mut space = Space::reopen(stopped, pid, image, &checkpoint.context)?;
    let images = checkpoints.iter_mut().flat_map(|other| &mut other.spaces);
    for image in images.filter(|image| image.generation() == generation) {
        image.move_to(stopped, &mut space)?;
    }

    fault::point("remake.opened");

    let checkpoint = &checkpoints[to];
    let recorded = recorded(checkpoint)?;
    let (context, image) = (&checkpoint.context, &checkpoint.spaces[index]);
    task::clear(stopped, &recorded, pid)?;
    let mut todo = space.plan_remake(stopped, image, context)?;
    space.restore_layout(stopped, image, &todo)?;
    fault::point("remake.laid_out");
    space.keep_inherited(stopped, image, &mut todo)?;
    space.restore_program(stopped, image, context)?;
    task::settle_in(
        stopped,
        &recorded,
        pid,
        image.shadow()?.pid,
        &mut plan.tasks,
    )?;
    let todo = memory::Plan {
        layout: Vec::new(),
        register: Vec::new(),
        ..todo
    };
    plan.memory[index] = (pid, todo);
    spaces.remove(&was);
    spaces.insert(pid, space);
    Ok(pid)
}

/// Has a process that was made again execute its program, if that is another than its parent's and there is no other way
/// to pass for it.
fn execute_program(
    stopped: &mut Stopped,
    checkpoint: &Checkpoint,
    pid: Pid,
    index: usize,
) -> Result<()> {
    let recorded = recorded(checkpoint)?;
    let maker = recorded
        .process(pid)
        .and_then(|process| recorded.begins_as(process))
        .ok_or(freeze::Error::Gone(pid))?;
    let of_maker = checkpoint.space_of(maker.pid());
    let of_maker = of_maker.ok_or(freeze::Error::Gone(pid))?;
    let image = &checkpoint.spaces[index];
    if memory::same_program(image, of_maker) || task::may_set_program(maker) {
        return Ok(());
    }
    memory::execute_program(stopped, pid, image, 0)?;
    if task::has_rights_of(stopped, pid, maker)? {
        return Ok(());
    }
    Err(freeze::Error::Unexpected {
        tid: pid,
        event: "other rights by executing its program".into(),
    }
    .into())
}

/// Has all checkpoints that have this process know what names it now.
fn learn(checkpoints: &mut [Checkpoint], to: usize, was: Pid, is: &task::Identity) -> Result<()> {
    let old = recorded(&checkpoints[to])?
        .process(was)
        .map(|process| process.identity);
    let old = old.ok_or(freeze::Error::Gone(was))?;
    for checkpoint in checkpoints {
        let has_it = recorded(checkpoint)?.process(was).is_some_and(|process| {
            let names = |identity: &task::Identity| (identity.start_time, identity.pidfd_inode);
            names(&process.identity) == names(&old)
        });
        if !has_it {
            continue;
        }
        checkpoint.renamed.reborn(was, is);
        let process = objects::Reborn {
            was: (old.pid, old.pidfd_inode),
            is: (is.pid, is.pidfd_inode),
            number: old.namespace_pid,
        };
        objects::reborn(&mut checkpoint.objects, process);
        for image in &mut checkpoint.spaces {
            if image.pid == was {
                image.pid = Pid::from_raw(is.pid);
            }
        }
    }
    Ok(())
}

/// Makes the threads again that have ended, those of processes that were made again too, whose number is returned with
/// that of the other threads. All checkpoints learn of it.
pub(super) fn threads(
    stopped: &mut Stopped,
    checkpoints: &mut [Checkpoint],
    to: usize,
    plan: &mut Plan,
) -> Result<usize> {
    let revived = task::revive(stopped, &recorded(&checkpoints[to])?, &mut plan.tasks)?;
    for checkpoint in checkpoints {
        for (_, was, is) in &revived {
            checkpoint.renamed.rename(*was, *is);
        }
    }
    let is_of_living = |pid: &Pid| {
        !plan
            .memory
            .iter()
            .any(|(of, plan)| of == pid && plan.remade)
    };
    let threads = revived
        .iter()
        .filter(|(pid, _, _)| is_of_living(pid))
        .count();
    Ok(plan.lost.len() + threads)
}
