//! Makes the changes of a plan.
//!
//! The order: entries of epoll instances are deleted while numbers are as found; what is gone is made in the keeper; every
//! table gets its numbers; descriptions get their state, then flags and offsets; epoll entries and locks come last, when all
//! they refer to is as recorded. Duplicates of ours are gone when this returns.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::Pid;

use super::capture::{Capture, holders};
use super::live::Holder;
use super::make::{adopt, in_proc, make_pipe_end, open_file};
use super::model::{Description, Inode, ObjectId, Owner, Place, Recorded};
use super::plan::{PipePlan, Plan, Settle, homes};
use super::socket_inside::Inside;
use super::state::{Change, State};
use super::table::TablePlan;
use super::transfer::{self, Passage};
use super::{Error, epoll, locks, pipe, socket_apply, socket_diag, socket_make, sysv, terminal};
use crate::freeze::{Batch, Stopped};

/// What carrying out a plan did that users are told of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Effects {
    /// Connections that could not be kept and were reset.
    pub reset_connections: usize,
    /// What was left as it is because it belongs to the outside too, in words.
    pub kept: Vec<String>,
    /// Messages that could not be put back: the socket, and the index each had in its queue once those before it that are
    /// lost were taken out.
    pub(super) lost: Vec<(ObjectId, usize)>,
}

/// The live objects, for changes to them.
#[derive(Debug)]
pub struct Reach<'a> {
    pub(super) holders: &'a BTreeMap<i32, Holder>,
    /// Where each recorded description is now.
    pub(super) places: BTreeMap<ObjectId, Place>,
}

impl Reach<'_> {
    /// A place of a recorded description, if it is there (again).
    pub fn place(&self, id: ObjectId) -> Option<Place> {
        self.places.get(&id).copied()
    }

    /// The process of this host PID.
    pub fn holder(&self, pid: i32) -> Option<&Holder> {
        self.holders.get(&pid)
    }

    /// A duplicate of a recorded description that is there. Drop it before the tree runs.
    pub fn duplicate(&self, id: ObjectId) -> Result<OwnedFd, Error> {
        let missing = Error::Own {
            call: "finding a descriptor",
            errno: Errno::EBADF,
        };
        let Some(place) = self.place(id) else {
            return Err(missing);
        };
        match self.holder(place.pid) {
            Some(holder) => holder.duplicate(place.fd),
            None => Err(missing),
        }
    }
}

/// Carries out a plan. After an error the tree is neither as it was nor as recorded.
///
/// What had to be made anew has another identity (inode, cookie) from now on; `capture` learns it, so that the next rollback
/// finds it.
pub fn execute(
    stopped: &mut Stopped<'_>,
    capture: &mut Capture,
    plan: &Plan,
) -> Result<Effects, Error> {
    let mut effects = Effects {
        kept: plan.kept.clone(),
        ..Effects::default()
    };
    if plan.is_empty() {
        return Ok(effects);
    }
    let holders = holders(stopped, &capture.recorded.names);
    let mut work = Work {
        stopped,
        holders: &holders,
        effects: &mut effects,
    };
    work.forget(&plan.forget)?;
    work.condemn(plan)?;
    let made = work.make(capture, plan)?;
    for table in &plan.tables {
        work.table(table, &made, plan)?;
    }
    adopt(&mut capture.recorded, &made, plan)?;
    drop(made);

    let recorded = &capture.recorded;
    let reach = Reach {
        holders: &holders,
        places: recorded.first_places(),
    };
    for pipe in &plan.pipes {
        refill(recorded, &reach, pipe)?;
    }
    sysv::execute(work.stopped, recorded, &plan.sysv)?;
    socket_apply::apply(&plan.sockets.changes, &reach, work.effects)?;
    for (id, change) in &plan.changes {
        apply(*id, change, &reach)?;
    }
    work.terminals(&capture.recorded, plan, &reach)?;
    work.settle(&reach, &plan.settle)?;
    work.watch(recorded, &plan.watch)?;
    work.lock(&reach, &plan.locks)?;
    socket_diag::close();
    forget_lost(&mut capture.recorded, &effects.lost);
    Ok(effects)
}

/// The next rollback knows nothing any more of messages that this one could not put back.
fn forget_lost(recorded: &mut Recorded, lost: &[(ObjectId, usize)]) {
    for (id, index) in lost {
        if let Some(description) = recorded.descriptions.get_mut(id)
            && let State::Socket(socket) = &mut description.state
            && *index < socket.queue.len()
        {
            socket.queue.remove(*index);
        }
    }
}

struct Work<'a, 't> {
    stopped: &'a mut Stopped<'t>,
    holders: &'a BTreeMap<i32, Holder>,
    effects: &'a mut Effects,
}

fn own(call: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Own { call, errno }
}

impl Work<'_, '_> {
    fn holder(&self, pid: i32) -> Result<&Holder, Error> {
        self.holders
            .get(&pid)
            .ok_or_else(|| own("finding a process")(Errno::ESRCH))
    }

    /// Runs a batch all of whose steps have to work.
    fn run(&mut self, pid: i32, batch: &Batch) -> Result<crate::freeze::Outputs, Error> {
        let outputs = self.stopped.run(Pid::from_raw(pid), batch)?;
        match outputs.first_failure() {
            None => Ok(outputs),
            Some((step, errno)) => Err(transfer::failed(pid, step, errno)),
        }
    }

    /// Deletes epoll entries. One that is gone already is as it should be.
    fn forget(&mut self, entries: &[(Place, i32)]) -> Result<(), Error> {
        let mut batches: BTreeMap<i32, Batch> = BTreeMap::new();
        for (instance, fd) in entries {
            epoll::delete(batches.entry(instance.pid).or_default(), instance.fd, *fd);
        }
        for (pid, batch) in batches {
            self.stopped.run(Pid::from_raw(pid), &batch)?;
        }
        Ok(())
    }

    /// Resets connections that came since. If sockets must be made, all that are not recorded are closed right now, since
    /// they may have the names.
    fn condemn(&mut self, plan: &Plan) -> Result<(), Error> {
        let mut foreign = Vec::with_capacity(plan.foreign.len());
        for place in &plan.foreign {
            foreign.push(self.holder(place.pid)?.duplicate(place.fd)?);
        }
        self.effects.reset_connections += socket_make::condemn(&foreign)?;
        drop(foreign);
        if plan.sockets.make.is_empty() {
            return Ok(());
        }
        let mut batches: BTreeMap<i32, Batch> = BTreeMap::new();
        for place in &plan.condemned {
            close(batches.entry(place.pid).or_default(), place.fd);
        }
        for (pid, batch) in batches {
            self.run(pid, &batch)?;
        }
        Ok(())
    }

    /// Makes what is gone, and takes duplicates of what must be passed on, in our own table.
    fn make(
        &mut self,
        capture: &Capture,
        plan: &Plan,
    ) -> Result<BTreeMap<ObjectId, OwnedFd>, Error> {
        let recorded = &capture.recorded;
        let mut made = BTreeMap::new();
        for (id, place) in &plan.fetch {
            made.insert(*id, self.holder(place.pid)?.duplicate(place.fd)?);
        }
        let mut pipes: BTreeMap<Inode, (OwnedFd, OwnedFd)> = BTreeMap::new();
        for (id, source) in &plan.make {
            let description = &recorded.descriptions[id];
            let fd = match &description.state {
                State::Pipe(_) => make_pipe_end(capture, *id, description, source, &mut pipes)?,
                State::File(state) => open_file(capture, *id, description, state, source)?,
                State::Eventfd(state) => state.make()?,
                State::Timerfd(state) => state.make()?,
                State::Signalfd(state) => state.make()?,
                State::Inotify(state) => {
                    state.make(recorded.places(*id).next().map_or(0, |place| place.pid))?
                }
                State::Epoll(_) => {
                    crate::kernel::anonymous::epoll().map_err(own("epoll_create1"))?
                }
                // All at once, below.
                State::Socket(_) => continue,
            };
            made.insert(*id, fd);
        }
        if !plan.sockets.make.is_empty() {
            let reach = Reach {
                holders: self.holders,
                places: plan.places.clone(),
            };
            let sockets = recorded.sockets();
            let homes = homes(recorded);
            let mut inside = Inside {
                stopped: &mut *self.stopped,
                holders: self.holders,
            };
            made.extend(socket_make::make(
                &plan.sockets,
                &sockets,
                &homes,
                &reach,
                &mut inside,
                self.effects,
            )?);
        }
        Ok(made)
    }

    /// Gives one table its numbers.
    fn table(
        &mut self,
        plan: &TablePlan,
        made: &BTreeMap<ObjectId, OwnedFd>,
        whole: &Plan,
    ) -> Result<(), Error> {
        let mut batch = Batch::new();
        let closed = |fd: i32| {
            let place = Place { pid: plan.pid, fd };
            !whole.sockets.make.is_empty() && whole.condemned.contains(&place)
        };
        for fd in plan.close.iter().filter(|fd| !closed(**fd)) {
            close(&mut batch, *fd);
        }
        for (from, spare) in &plan.stash {
            duplicate(&mut batch, *from, *spare, true);
        }
        for fd in &plan.close_stashed {
            close(&mut batch, *fd);
        }
        for messages in plan.receive.chunks(transfer::AT_ONCE) {
            let descriptors: Vec<BorrowedFd<'_>> = messages
                .iter()
                .map(|(id, _)| made.get(id).map(AsFd::as_fd))
                .collect::<Option<_>>()
                .ok_or_else(|| own("finding what was made")(Errno::EBADF))?;
            let passage = Passage::open(&mut batch);
            let outputs = self.run(plan.pid, &batch)?;
            let landing = passage.send(&outputs, self.holder(plan.pid)?, &descriptors)?;
            batch = Batch::new();
            for (_, spare) in messages {
                landing.receive(&mut batch, *spare);
            }
            landing.close(&mut batch);
        }
        for (from, to, close_on_exec) in &plan.place {
            self.make_room(plan.pid, &mut batch, 4, 0)?;
            duplicate(&mut batch, *from, *to, *close_on_exec);
        }
        for fd in plan.spare() {
            self.make_room(plan.pid, &mut batch, 4, 0)?;
            close(&mut batch, fd);
        }
        for (fd, close_on_exec) in &plan.close_on_exec {
            self.make_room(plan.pid, &mut batch, 4, 0)?;
            let flag = if *close_on_exec { libc::FD_CLOEXEC } else { 0 };
            let arguments = [(*fd).into(), libc::F_SETFD.into(), flag.into()];
            let step = batch.call(libc::SYS_fcntl, &arguments);
            batch.must_succeed(step);
        }
        self.run(plan.pid, &batch).map(drop)
    }

    /// Runs what a batch has so far if it is nearly full.
    fn make_room(
        &mut self,
        pid: i32,
        batch: &mut Batch,
        steps: usize,
        data: usize,
    ) -> Result<(), Error> {
        if !batch.has_room(steps, data) {
            self.run(pid, &std::mem::take(batch))?;
        }
        Ok(())
    }

    /// Sets flags, offsets and owners.
    fn settle(&mut self, reach: &Reach<'_>, settle: &[(ObjectId, Settle)]) -> Result<(), Error> {
        let mut batches: BTreeMap<i32, Batch> = BTreeMap::new();
        for (id, settle) in settle {
            let Some(place) = reach.place(*id) else {
                continue;
            };
            let batch = batches.entry(place.pid).or_default();
            self.make_room(place.pid, batch, 6, 64)?;
            if let Some(offset) = settle.offset {
                let arguments = [place.fd.into(), offset.into(), libc::SEEK_SET.into()];
                let step = batch.call(libc::SYS_lseek, &arguments);
                batch.must_succeed(step);
            }
            if let Some(owner) = settle.owner {
                set_owner(batch, place.fd, owner);
            }
            if let Some(flags) = settle.flags {
                let arguments = [place.fd.into(), libc::F_SETFL.into(), flags.into()];
                let step = batch.call(libc::SYS_fcntl, &arguments);
                batch.must_succeed(step);
            }
        }
        for (pid, batch) in batches {
            self.run(pid, &batch)?;
        }
        Ok(())
    }

    /// Puts terminals back.
    fn terminals(
        &mut self,
        recorded: &Recorded,
        plan: &Plan,
        reach: &Reach<'_>,
    ) -> Result<(), Error> {
        for (index, change) in &plan.terminals {
            recorded.terminals[*index].apply(change, reach)?;
            if let Some(foreground) = change.foreground() {
                let mut batch = Batch::new();
                terminal::set_foreground(&mut batch, foreground);
                self.run(foreground.place.pid, &batch)?;
            }
        }
        Ok(())
    }

    /// Sets epoll entries, those of inner instances first.
    fn watch(
        &mut self,
        recorded: &Recorded,
        entries: &[(ObjectId, epoll::Entry)],
    ) -> Result<(), Error> {
        // An entry is set in the process in whose table its number is what it watches.
        for run in entries.chunk_by(|(_, a), (_, b)| a.pid == b.pid) {
            let pid = run[0].1.pid;
            let mut rest = run.iter().peekable();
            while rest.peek().is_some() {
                let mut batch = Batch::new();
                let mut settings = Vec::new();
                while batch.has_room(epoll::STEPS_TO_SET, epoll::DATA_TO_SET)
                    && let Some((id, entry)) = rest.next()
                {
                    let place = recorded.places(*id).find(|place| place.pid == pid);
                    let place =
                        place.ok_or_else(|| own("finding an epoll instance")(Errno::EBADF))?;
                    settings.push((epoll::set(&mut batch, place.fd, entry), place, entry));
                }
                let outputs = self.stopped.run(Pid::from_raw(pid), &batch)?;
                for (setting, place, entry) in settings {
                    if let Err(errno) = setting.result(&outputs) {
                        return Err(Error::Descriptor {
                            what: format!("fd {}: epoll entry for fd {}", place.fd, entry.fd),
                            pid,
                            call: "epoll_ctl",
                            errno,
                        });
                    }
                }
            }
        }
        Ok(())
    }

    /// Drops and takes locks.
    fn lock(&mut self, reach: &Reach<'_>, change: &locks::Change) -> Result<(), Error> {
        let drop = change.drop.iter().map(|lock| (lock, true));
        let take = change.take.iter().map(|lock| (lock, false));
        for (lock, unlock) in drop.chain(take) {
            match lock.owner {
                locks::Owner::Flock(id)
                | locks::Owner::Description(id)
                | locks::Owner::Lease(id) => {
                    locks::apply(reach.duplicate(id)?, lock, unlock)?;
                }
                locks::Owner::Process(place) => {
                    let mut batch = Batch::new();
                    let step = locks::apply_in_process(&mut batch, place.fd, lock, unlock);
                    let outputs = self.stopped.run(Pid::from_raw(place.pid), &batch)?;
                    match outputs.result(step) {
                        // One to be dropped went with its number.
                        Ok(_) | Err(Errno::EBADF) if unlock => {}
                        Ok(_) => {}
                        Err(errno) => {
                            return Err(Error::Descriptor {
                                what: format!("fd {}", place.fd),
                                pid: place.pid,
                                call: "F_SETLK",
                                errno,
                            });
                        }
                    }
                }
                locks::Owner::Foreign => {}
            }
        }
        Ok(())
    }
}

fn close(batch: &mut Batch, fd: i32) {
    batch.call(libc::SYS_close, &[fd.into()]);
}

fn duplicate(batch: &mut Batch, from: i32, to: i32, close_on_exec: bool) {
    let flags = if close_on_exec { libc::O_CLOEXEC } else { 0 };
    let step = batch.call(libc::SYS_dup3, &[from.into(), to.into(), flags.into()]);
    batch.must_succeed(step);
}

fn set_owner(batch: &mut Batch, fd: i32, owner: Owner) {
    const F_SETSIG: i32 = 10;
    const F_SETOWN_EX: i32 = 15;
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&owner.kind.to_ne_bytes());
    bytes[4..].copy_from_slice(&owner.id.to_ne_bytes());
    let argument = batch.input(&bytes);
    for (command, argument) in [(F_SETOWN_EX, argument), (F_SETSIG, owner.signal.into())] {
        let step = batch.call(libc::SYS_fcntl, &[fd.into(), command.into(), argument]);
        batch.must_succeed(step);
    }
}

/// Puts back the content of a pipe that is still there.
fn refill(recorded: &Recorded, reach: &Reach<'_>, plan: &PipePlan) -> Result<(), Error> {
    let end = |access: i32| {
        let wanted = |description: &&Description| {
            description.common.inode() == plan.inode
                && (description.common.can_write() == (access == libc::O_WRONLY)
                    || description.common.flags & libc::O_ACCMODE == libc::O_RDWR)
        };
        let mut ends = recorded.descriptions.iter();
        match ends.find(|(_, description)| wanted(description)) {
            Some((id, _)) => reach.duplicate(*id),
            None => {
                let other = recorded
                    .descriptions
                    .iter()
                    .find(|(_, description)| description.common.inode() == plan.inode)
                    .and_then(|(id, _)| reach.place(*id))
                    .ok_or_else(|| own("finding a pipe")(Errno::EBADF))?;
                pipe::open(&in_proc(&other), access)
            }
        }
    };
    let reading = end(libc::O_RDONLY)?;
    if plan.content.is_some() {
        pipe::drain(&reading)?;
    }
    if let Some(capacity) = plan.capacity {
        pipe::set_capacity(&reading, capacity)?;
    }
    match &plan.content {
        Some(content) if !content.bytes.is_empty() => pipe::fill(end(libc::O_WRONLY)?, content),
        _ => Ok(()),
    }
}

fn apply(id: ObjectId, change: &Change, reach: &Reach<'_>) -> Result<(), Error> {
    match change {
        Change::Eventfd(change) => change.apply(reach.duplicate(id)?),
        Change::Timerfd(change) => change.apply(reach.duplicate(id)?),
        Change::Signalfd(state) => state.apply(reach.duplicate(id)?),
        Change::Inotify(change) => {
            let pid = reach.place(id).map_or(0, |place| place.pid);
            change.apply(reach.duplicate(id)?, pid)
        }
    }
}
