//! Live state to records.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use nix::unistd::Pid;

use super::live::{Holder, Live};
use super::model::{Description, Inode, ObjectId, Place, Recorded, Slot, Table};
use super::pipe::Pipe;
use super::socket_ends::{inner_tcp, mark_inner};
use super::state::State;
use super::survey::{Expected, Sighting, Survey, compare, sharing, survey};
use super::tcp_queue::complete;
use super::{
    Error, epoll_watch, file, locks, mounts, outside, pipe, records, side_by_side, socket,
    socket_diag, sysv, terminal,
};
use crate::freeze::Stopped;
use crate::kernel::kcmp;
use crate::outcome::Refusal;
use crate::record::Context;

/// What a checkpoint keeps of descriptors between operations.
#[derive(Debug, Default)]
pub struct Capture {
    /// What was recorded.
    pub recorded: Recorded,
    /// `O_PATH` descriptors on files, so that they can be opened again wherever they are by then.
    pub pins: BTreeMap<ObjectId, OwnedFd>,
    /// The mount namespaces, as [`Recorded::mounts`].
    pub mounts: Vec<mounts::Held>,
}

/// The living processes of a stopped tree, with the names they are known by.
pub(super) fn holders(
    stopped: &Stopped<'_>,
    names: &BTreeMap<i32, String>,
) -> BTreeMap<i32, Holder> {
    stopped
        .processes()
        .filter(|process| !process.is_zombie())
        .map(|process| {
            let pid = process.pid.as_raw();
            let holder = match names.get(&pid) {
                Some(name) => Holder::new(pid, name),
                None => Holder::new(pid, &process.comm()),
            };
            (pid, holder)
        })
        .collect()
}

/// The descriptors of a stopped tree, found by asking its processes, and not looked at yet.
#[derive(Debug)]
pub struct Found {
    root: Pid,
    holders: BTreeMap<i32, Holder>,
    survey: Survey,
}

/// The descriptors of a stopped tree, looked at from outside.
#[derive(Debug)]
pub struct Looked<'f> {
    found: &'f Found,
    lives: Vec<Live<'f>>,
    states: Vec<State>,
    pipes: BTreeMap<Inode, Pipe>,
    pins: BTreeMap<ObjectId, OwnedFd>,
    mounts: (Vec<mounts::Namespace>, Vec<mounts::Held>),
    ids: Vec<ObjectId>,
}

/// Finds all descriptors of a stopped tree.
///
/// # Errors
///
/// Refused by name if a thread has a table of its own.
pub fn find(stopped: &mut Stopped<'_>) -> Result<Found, Error> {
    check_threads(stopped)?;
    let holders = holders(stopped, &BTreeMap::new());
    let tables = sharing(&holders)?;
    let survey = survey(
        stopped,
        &tables,
        |_| Vec::new(),
        |_| false,
        |_, _| Expected::NOTHING,
        |_| None,
    )?;
    Ok(Found {
        root: stopped.root(),
        holders,
        survey,
    })
}

impl Found {
    /// Looks at each of them and changes nothing. Batches may run in the tree meanwhile.
    ///
    /// # Errors
    ///
    /// Refused by name if it is one that can't be recorded.
    pub fn look(&self, context: &mut Context) -> Result<Looked<'_>, Error> {
        let found = &self.survey;
        let lives = lives(&self.holders, found)?;
        let mut states = side_by_side::each(&lives, State::capture)?;
        let pipes = capture_pipes(&lives, &states)?;
        let watched = resolve(found, &lives, &mut states)?;

        let mut ids = vec![None; lives.len()];
        for index in order(&found.descriptions, &states, &watched)? {
            ids[index] = Some(context.new_object());
        }
        let ids: Vec<ObjectId> = ids.into_iter().flatten().collect();
        debug_assert_eq!(
            ids.len(),
            lives.len(),
            "every description has its place in the order"
        );
        for (state, watched) in states.iter_mut().zip(&watched) {
            if let State::Epoll(state) = state {
                for (entry, index) in state.entries.iter_mut().zip(watched) {
                    entry.watches = Some(ids[*index]);
                }
            }
        }
        complete_sockets(&ids, &lives, &mut states)?;
        Ok(Looked {
            pins: pins(&ids, &lives, &states)?,
            mounts: mounts::capture(self.root, &self.holders)?,
            found: self,
            lives,
            states,
            pipes,
            ids,
        })
    }
}

impl Looked<'_> {
    /// Records them, with what only the processes themselves know. Changes nothing in the tree.
    ///
    /// # Errors
    ///
    /// Refused by name if something can't be recorded.
    pub fn record(
        self,
        stopped: &mut Stopped<'_>,
        context: &mut Context,
    ) -> Result<Capture, Error> {
        let Self {
            found:
                Found {
                    root,
                    holders,
                    survey,
                },
            lives,
            states,
            pipes,
            pins,
            mounts,
            ids,
        } = self;
        let mut capture = Capture {
            pins,
            mounts: mounts.1,
            ..Capture::default()
        };
        let recorded = &mut capture.recorded;
        recorded.pipes = pipes;
        recorded.mounts = mounts.0;
        recorded.names = holders
            .values()
            .map(|holder| (holder.pid, holder.name.clone()))
            .collect();
        let described = survey.descriptions.iter().zip(&ids);
        for ((state, live), (sighting, id)) in states.into_iter().zip(&lives).zip(described) {
            let owner = sighting.owner;
            recorded.descriptions.insert(
                *id,
                Description {
                    common: live.common,
                    owner,
                    state,
                },
            );
        }
        let slot = |slot: &Slot<usize>| Slot {
            fd: slot.fd,
            close_on_exec: slot.close_on_exec,
            description: ids[slot.description],
        };
        let table = |table: &Table<usize>| Table {
            holders: table.holders.clone(),
            slots: table.slots.iter().map(slot).collect(),
        };
        recorded.tables = survey.tables.iter().map(table).collect();
        let files = every_number(&survey.tables)
            .map(|(place, index, holders)| (ids[index], lives[index].common, place, holders));
        recorded.locks = locks::held(files)?;
        let all: Vec<_> = ids.iter().copied().zip(&lives).collect();
        let places = all
            .iter()
            .map(|(id, live)| (*id, live.place(), &live.common));
        recorded.shared_outside = outside::shared(*root, places);
        recorded.sysv = sysv::capture(stopped, holders)?;
        recorded.terminals = terminal::capture(stopped, recorded, &all)?;
        records::write(context, recorded)?;
        socket_diag::close();
        Ok(capture)
    }
}

impl Capture {
    /// Lets those files go that have a name, by which they are found.
    pub fn forget_named(&mut self) {
        let has_name = |pin: &OwnedFd| rustix::fs::fstat(pin).is_ok_and(|stat| stat.st_nlink > 0);
        self.pins.retain(|_, pin| !has_name(pin));
    }
}

fn pins(
    ids: &[ObjectId],
    lives: &[Live<'_>],
    states: &[State],
) -> Result<BTreeMap<ObjectId, OwnedFd>, Error> {
    let mut pins = BTreeMap::new();
    for ((id, live), state) in ids.iter().zip(lives).zip(states) {
        if file::must_be_pinned(state) {
            pins.insert(*id, file::pin(live)?);
        } else if file::may_be_pinned(state, &live.common)
            && let Ok(pin) = file::pin(live)
        {
            // If there are too many, those left over have to be found by their paths.
            pins.insert(*id, pin);
        }
    }
    Ok(pins)
}

/// Every open number of every table, through the first process that has it, with its description and all processes that
/// have it.
pub(super) fn every_number<D: Copy>(
    tables: &[Table<D>],
) -> impl Iterator<Item = (Place, D, &[i32])> {
    tables.iter().flat_map(|table| {
        let pid = table.pid();
        table.slots.iter().map(move |slot| {
            let place = Place { pid, fd: slot.fd };
            (place, slot.description, &*table.holders)
        })
    })
}

/// Looks again at the connections that have both ends in the tree.
fn complete_sockets(
    ids: &[ObjectId],
    lives: &[Live<'_>],
    states: &mut [State],
) -> Result<(), Error> {
    let mut sockets: BTreeMap<ObjectId, socket::State> = BTreeMap::new();
    for (id, state) in ids.iter().zip(&*states) {
        if let State::Socket(state) = state {
            sockets.insert(*id, state.clone());
        }
    }
    mark_inner(&mut sockets);
    let ends = inner_tcp(&sockets.iter().map(|(id, state)| (*id, state)).collect());
    let at: BTreeMap<ObjectId, usize> = ids.iter().copied().zip(0..).collect();
    complete(&mut sockets, &ends, &BTreeMap::new(), |id| {
        lives[at[&id]].duplicate()
    })?;
    for (id, state) in sockets {
        states[at[&id]] = State::Socket(state);
    }
    Ok(())
}

/// Refuses threads that have a file table apart from their process's.
pub(super) fn check_threads(stopped: &Stopped<'_>) -> Result<(), Error> {
    for process in stopped.processes() {
        for thread in process.threads.iter().skip(1) {
            let same =
                kcmp::same(process.pid, thread.tid, kcmp::Shared::Files).map_err(|errno| {
                    Error::Descriptor {
                        what: format!("file table of thread {}", thread.tid),
                        pid: process.pid.as_raw(),
                        call: "kcmp",
                        errno,
                    }
                })?;
            if !same {
                return Err(Refusal {
                    object: format!("file table of thread {}", thread.tid),
                    holder: process.holder(),
                    remedy: "a thread with descriptors of its own (unshare(CLONE_FILES)) is not supported"
                        .into(),
                }
                .into());
            }
        }
    }
    Ok(())
}

/// The descriptions of a survey, as the kinds see them.
pub(super) fn lives<'a>(
    holders: &'a BTreeMap<i32, Holder>,
    found: &Survey,
) -> Result<Vec<Live<'a>>, Error> {
    found
        .descriptions
        .iter()
        .map(|sighting| {
            let Place { pid, fd } = sighting.place;
            let holder = holders.get(&pid).ok_or_else(|| Error::Descriptor {
                what: format!("fd {fd}"),
                pid,
                call: "finding the process",
                errno: nix::errno::Errno::ESRCH,
            })?;
            Ok(Live::new(holder, fd, sighting.common, sighting.glance))
        })
        .collect()
}

/// The pipes behind the ends; with content if nobody outside the tree has an end.
fn capture_pipes(lives: &[Live<'_>], states: &[State]) -> Result<BTreeMap<Inode, Pipe>, Error> {
    let mut ends: BTreeMap<Inode, Vec<&Live<'_>>> = BTreeMap::new();
    for (live, state) in lives.iter().zip(states) {
        if let State::Pipe(_) = state {
            ends.entry((live.common.dev, live.common.ino))
                .or_default()
                .push(live);
        }
    }
    let mut pipes = BTreeMap::new();
    for (inode, ends) in ends {
        let reading = ends.iter().find(|live| live.common.can_read());
        let writing = ends.iter().find(|live| live.common.can_write());
        let any = ends[0].duplicate()?;
        let capacity = pipe::capacity(&any)?;
        let internal = (reading.is_some() && writing.is_some()) || pipe::is_abandoned(&any)?;
        let content = match reading {
            _ if !internal => None,
            Some(live) => Some(pipe::content(live.duplicate()?)?),
            None => Some(pipe::Content::default()),
        };
        pipes.insert(
            inode,
            Pipe {
                inode,
                capacity,
                content,
            },
        );
    }
    Ok(pipes)
}

/// Finds out what each entry of each epoll instance watches: an index per entry.
fn resolve(
    found: &Survey,
    lives: &[Live<'_>],
    states: &mut [State],
) -> Result<Vec<Vec<usize>>, Error> {
    let mut watched = vec![Vec::new(); states.len()];
    for (index, state) in states.iter_mut().enumerate() {
        let State::Epoll(state) = state else { continue };
        let targets = epoll_watch::watched(index, state, lives, &found.tables)?;
        for (entry, target) in state.entries.iter_mut().zip(targets) {
            let (Some(live), Some(at)) = (target.live, target.at) else {
                let what = format!(
                    "epoll entry for fd {}, which is closed but lives on elsewhere",
                    entry.fd
                );
                let remedy = "delete the entry before closing the number";
                return Err(lives[index].refuse(&what, remedy).into());
            };
            entry.pid = at.pid;
            watched[index].push(live);
        }
    }
    Ok(watched)
}

/// The order in which descriptions get their ids: epoll instances after what they watch; those that look the same in the
/// order of kcmp(2).
fn order(
    descriptions: &[Sighting],
    states: &[State],
    watched: &[Vec<usize>],
) -> Result<Vec<usize>, Error> {
    let mut depth = vec![0u32; states.len()];
    // The kernel allows no cycles and five levels (epoll_ctl(2), ELOOP).
    for _ in 0..8 {
        for (index, watched) in watched.iter().enumerate() {
            if let State::Epoll(_) = states[index] {
                let deepest = watched.iter().map(|&inner| depth[inner]).max().unwrap_or(0);
                depth[index] = deepest + 1;
            }
        }
    }
    let look = |index: usize| {
        let common = descriptions[index].common;
        (
            depth[index],
            common.dev,
            common.ino,
            common.flags,
            common.offset,
        )
    };
    let mut order: Vec<usize> = (0..states.len()).collect();
    order.sort_by_key(|&index| look(index));
    let mut failed = Ok(());
    for same in order.chunk_by_mut(|&a, &b| look(a) == look(b)) {
        same.sort_by(|&a, &b| {
            compare(descriptions[a].place, descriptions[b].place).unwrap_or_else(|error| {
                failed = Err(error);
                Ordering::Equal
            })
        });
    }
    failed.map(|()| order)
}
