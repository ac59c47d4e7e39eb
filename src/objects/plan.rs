//! Recorded and observed state to what must be done: [`plan`], which is pure, and [`prepare`] around it.

use std::collections::{BTreeMap, BTreeSet};

use nix::unistd::Pid;

use super::capture::Capture;
use super::model::{
    Common, Description, Inode, LiveDescription, ObjectId, Observed, Owner, Place, Recorded, Source,
};
use super::observe::{Asked, observe};
use super::pipe::Content;
use super::reborn::Gone;
use super::state::{Change, State, Verdict};
use super::table::{self, TablePlan};
use super::{
    Error, epoll, locks, socket_diag, socket_make, socket_plan, socket_substitute, sysv, terminal,
};
use crate::freeze::{Outputs, Stopped};
use crate::outcome::Refusal;

/// What must be done to the descriptors of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Descriptions to make, and how.
    pub make: Vec<(ObjectId, Source)>,
    /// Descriptions that are there, to be passed into another table: where they are.
    pub fetch: BTreeMap<ObjectId, Place>,
    /// Sockets to make and to change.
    pub sockets: socket_plan::Plan,
    /// Where the recorded descriptions that are there and stay were found.
    pub places: BTreeMap<ObjectId, Place>,
    /// Where sockets are that are not recorded, or will be made anew: every number.
    pub condemned: Vec<Place>,
    /// Sockets that are not recorded: one number of each.
    pub foreign: Vec<Place>,
    /// Epoll entries to delete before anything is closed: the instance's place and the number.
    pub forget: Vec<(Place, i32)>,
    /// The tables in which something must be done.
    pub tables: Vec<TablePlan>,
    /// Changes to descriptions, once all are in their places.
    pub changes: Vec<(ObjectId, Change)>,
    /// Pipes whose capacity or content must change.
    pub pipes: Vec<PipePlan>,
    /// Flags, offsets and owners to set.
    pub settle: Vec<(ObjectId, Settle)>,
    /// Epoll entries to set, in this order: the instance and the entry.
    pub watch: Vec<(ObjectId, epoll::Entry)>,
    /// System V semaphores and message queues to change.
    pub sysv: sysv::Plan,
    /// Terminals to change, by their index.
    pub terminals: Vec<(usize, terminal::Change)>,
    /// File locks to drop and take.
    pub locks: locks::Change,
    /// External pipes and the like that are left as they are, in words.
    pub kept: Vec<String>,
}

/// What must be done to a pipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PipePlan {
    /// The pipe as recorded.
    pub inode: Inode,
    /// Its capacity, if that must change.
    pub capacity: Option<usize>,
    /// Its content, if that must change.
    pub content: Option<Content>,
}

/// What is set with fcntl(2) and lseek(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Settle {
    /// `F_SETFL`.
    pub flags: Option<i32>,
    /// File position.
    pub offset: Option<i64>,
    /// `F_SETOWN_EX` and `F_SETSIG`; an ID of 0 is nobody.
    pub owner: Option<Owner>,
}

impl Plan {
    /// Whether nothing must be done.
    pub fn is_empty(&self) -> bool {
        let (kept, places) = (self.kept.clone(), self.places.clone());
        *self
            == Self {
                kept,
                places,
                ..Self::default()
            }
    }
}

/// Observes, plans, and looks whether what the plan needs of the outside is to be had. Touches nothing. `asked`, `outputs`
/// and `lost` are as for [`observe`].
pub fn prepare(
    stopped: &mut Stopped<'_>,
    capture: &Capture,
    asked: &Asked,
    outputs: &BTreeMap<Pid, Outputs>,
    lost: &Gone,
) -> Result<Plan, Error> {
    let observed = observe(stopped, capture, asked, outputs, lost)?;
    let recorded = &capture.recorded;
    let mut plan = plan(recorded, &observed)?;
    if !plan.locks.take.is_empty() {
        let pids = stopped.processes().map(|process| process.pid.as_raw());
        let others = locks::others(&plan.locks.take, &observed.locks, &pids.collect())?;
        locks::check(&plan.locks, &others).map_err(|(object, remedy)| Refusal {
            object,
            holder: recorded.holder(recorded.tables.first().map_or(0, |table| table.pid())),
            remedy,
        })?;
    }
    let counts = asked.sysv.as_ref();
    let counts = counts.and_then(|(counts, pid)| Some((counts, outputs.get(pid)?)));
    plan.sysv = sysv::plan(stopped, recorded, counts, lost)?;
    // Processes born since go, and their sockets with them, as do those that are lost.
    let is_born = |pid: i32| {
        if lost.contains_key(&pid) {
            return true;
        }
        let mut tables = recorded.tables.iter();
        !tables.any(|table| table.holders.contains(&pid))
    };
    let born: BTreeSet<i32> = stopped
        .processes()
        .map(|process| process.pid.as_raw())
        .filter(|&pid| is_born(pid))
        .collect();
    let sockets = recorded.sockets();
    let refuse = |(id, remedy): (ObjectId, String)| {
        let object = sockets.get(&id).map(|state| state.describe());
        recorded.refuse(id, (object.unwrap_or_default(), remedy))
    };
    if !plan.sockets.make.is_empty() {
        let mut inside: BTreeSet<u64> = observed
            .descriptions
            .iter()
            .filter(|live| live.common.file_type() == libc::S_IFSOCK)
            .map(|live| live.common.ino)
            .collect();
        inside.extend(born.iter().flat_map(|&pid| socket_make::sockets_of(pid)));
        let mut homes = homes(recorded);
        for home in homes.values_mut() {
            *home = lost.get(home).map_or(*home, |of| of.other);
        }
        socket_make::check_names(&plan.sockets, &sockets, &homes, &inside).map_err(refuse)?;
    }
    socket_substitute::check_senders(&plan.sockets, &sockets, &born).map_err(refuse)?;
    socket_diag::close();
    Ok(plan)
}

/// Where each recorded socket lives.
pub(super) fn homes(recorded: &Recorded) -> socket_make::Homes {
    let sockets = recorded.sockets().into_keys();
    sockets
        .filter_map(|id| Some((id, recorded.places(id).next()?.pid)))
        .collect()
}

/// Plans, or refuses by name what can't be undone.
pub fn plan(recorded: &Recorded, observed: &Observed) -> Result<Plan, Refusal> {
    let mut plan = Plan::default();
    let mut found: BTreeMap<ObjectId, &LiveDescription> = BTreeMap::new();
    for live in &observed.descriptions {
        if let Some(id) = live.is {
            found.insert(id, live);
        }
    }
    let mut replaced = BTreeSet::new();
    for (id, description) in &recorded.descriptions {
        let Some(now) = found.get(id).and_then(|live| live.state.as_ref()) else {
            continue;
        };
        match description
            .state
            .difference(now)
            .map_err(|complaint| recorded.refuse(*id, complaint))?
        {
            Verdict::Keep => {}
            Verdict::Change(change) => plan.changes.push((*id, change)),
            Verdict::Replace => {
                replaced.insert(*id);
            }
        }
    }
    plan.sockets =
        socket_plan::plan(&recorded.sockets(), &observed.sockets()).map_err(|obstacle| {
            let object = recorded
                .sockets()
                .get(&obstacle.id)
                .map(|state| state.describe());
            recorded.refuse(obstacle.id, (object.unwrap_or_default(), obstacle.remedy))
        })?;
    replaced.extend(
        plan.sockets
            .replaced
            .iter()
            .filter(|id| found.contains_key(id)),
    );
    plan_epolls(recorded, observed, &found, &mut replaced, &mut plan);
    for (id, source) in &observed.gone {
        if let Source::Nowhere(complaint) = source {
            return Err(recorded.refuse(*id, complaint.clone()));
        }
        plan.make.push((*id, source.clone()));
    }
    plan.make
        .extend(replaced.iter().map(|id| (*id, Source::New)));
    plan.make.sort_by_key(|(id, _)| *id);
    plan.places = found
        .iter()
        .filter(|(id, _)| !replaced.contains(id))
        .map(|(id, live)| (*id, live.place))
        .collect();

    let is = |live: usize| {
        observed.descriptions[live]
            .is
            .filter(|id| !replaced.contains(id))
    };
    let foreign = observed
        .descriptions
        .iter()
        .filter(|live| live.is.is_none() && live.common.file_type() == libc::S_IFSOCK);
    plan.foreign = foreign.map(|live| live.place).collect();
    for table in &observed.tables {
        let condemned = table.slots.iter().filter(|slot| {
            let live = &observed.descriptions[slot.description];
            live.common.file_type() == libc::S_IFSOCK && is(slot.description).is_none()
        });
        plan.condemned.extend(condemned.map(|slot| Place {
            pid: table.pid(),
            fd: slot.fd,
        }));
    }
    for ((table, live), limit) in recorded
        .tables
        .iter()
        .zip(&observed.tables)
        .zip(&observed.limits)
    {
        let todo = table::plan(table, live, is, *limit).map_err(|(object, remedy)| Refusal {
            object,
            holder: recorded.holder(table.pid()),
            remedy,
        })?;
        for (id, _) in &todo.receive {
            if let Some(place) = plan.places.get(id) {
                plan.fetch.insert(*id, *place);
            }
        }
        if !todo.is_empty() {
            plan.tables.push(todo);
        }
    }
    for (id, description) in &recorded.descriptions {
        let now = found.get(id).filter(|_| !replaced.contains(id));
        let mut settle = settle(description, now.map(|live| (&live.common, live.owner)));
        if now.is_some() && recorded.shared_outside.contains(id) {
            settle.offset = None;
        }
        if settle != Settle::default() {
            plan.settle.push((*id, settle));
        }
    }
    plan_pipes(recorded, observed, &mut plan);
    for (index, (then, now)) in recorded
        .terminals
        .iter()
        .zip(&observed.terminals)
        .enumerate()
    {
        let change = then
            .difference(now)
            .map_err(|complaint| recorded.refuse(then.any, complaint))?;
        plan.terminals.extend(change.map(|change| (index, change)));
    }
    plan.locks = locks::plan(&recorded.locks, &observed.locks, !plan.tables.is_empty());
    Ok(plan)
}

/// What to set on a description, which is `now` so, or has just been made.
fn settle(then: &Description, now: Option<(&Common, Option<Owner>)>) -> Settle {
    let path_only = then.common.flags & libc::O_PATH != 0;
    let mut settle = Settle::default();
    if path_only {
        return settle;
    }
    let nobody = then.owner.unwrap_or(Owner::NOBODY);
    match now {
        Some((common, owner)) => {
            if common.settable_flags() != then.common.settable_flags() {
                settle.flags = Some(then.common.flags);
            }
            if common.offset != then.common.offset && then.common.offset >= 0 {
                settle.offset = Some(then.common.offset);
            }
            if owner != then.owner {
                settle.owner = Some(nobody);
            }
        }
        None => {
            settle.flags = Some(then.common.flags);
            settle.offset = (then.common.offset > 0).then_some(then.common.offset);
            settle.owner = then.owner;
        }
    }
    settle
}

/// Plans the epoll instances: those that need another instance count as gone for those that watch them.
fn plan_epolls(
    recorded: &Recorded,
    observed: &Observed,
    found: &BTreeMap<ObjectId, &LiveDescription>,
    replaced: &mut BTreeSet<ObjectId>,
    plan: &mut Plan,
) {
    // Ascending ids: what an instance watches comes before it.
    for (id, description) in &recorded.descriptions {
        let State::Epoll(then) = &description.state else {
            continue;
        };
        let all = || then.entries.iter().map(|entry| (*id, *entry));
        let now = match found.get(id).and_then(|live| live.state.as_ref()) {
            Some(State::Epoll(now)) if !replaced.contains(id) => now,
            _ => {
                plan.watch.extend(all());
                continue;
            }
        };
        let is = |live: usize| {
            let live: &LiveDescription = &observed.descriptions[live];
            live.is.filter(|id| !replaced.contains(id))
        };
        let watched = observed.watched.get(id).map_or(&[][..], Vec::as_slice);
        match then.difference(now, watched, is) {
            Some(change) => {
                plan.forget.extend(change.delete);
                plan.watch
                    .extend(change.set.into_iter().map(|entry| (*id, entry)));
            }
            None => {
                replaced.insert(*id);
                plan.watch.extend(all());
            }
        }
    }
    plan.watch
        .sort_by_key(|(id, entry)| (*id, !entry.is_fired_one_shot(), entry.fd));
}

/// Plans the pipes.
fn plan_pipes(recorded: &Recorded, observed: &Observed, plan: &mut Plan) {
    for (inode, then) in &recorded.pipes {
        let Some(content) = &then.content else {
            let is_end = |end: &Description| {
                matches!(end.state, State::Pipe(_)) && end.common.inode() == *inode
            };
            let ends = recorded.descriptions.iter().filter(|(_, end)| is_end(end));
            let names = ends.filter_map(|(id, _)| recorded.places(*id).next());
            plan.kept.extend(names.map(|place| {
                format!(
                    "fd {} of {}: pipe to the outside",
                    place.fd,
                    recorded.holder(place.pid)
                )
            }));
            continue;
        };
        let Some(now) = observed.pipes.get(inode) else {
            // A pipe that is gone is made with its content, a FIFO is opened again and is empty.
            let is_reopened = |(id, source): &(ObjectId, Source)| {
                *source != Source::New && recorded.descriptions[id].common.inode() == *inode
            };
            if plan.make.iter().any(is_reopened) {
                plan.pipes.push(PipePlan {
                    inode: *inode,
                    capacity: Some(then.capacity),
                    content: Some(content.clone()),
                });
            }
            continue;
        };
        let differs = now.content.as_ref() != Some(content);
        if !differs && now.capacity == then.capacity {
            continue;
        }
        plan.pipes.push(PipePlan {
            inode: *inode,
            capacity: (now.capacity != then.capacity).then_some(then.capacity),
            content: differs.then(|| content.clone()),
        });
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
