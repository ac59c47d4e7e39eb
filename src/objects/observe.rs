//! What is there now of all that was recorded. The hot path of a rollback.

use std::collections::{BTreeMap, BTreeSet};

use nix::unistd::Pid;

use super::Error;
use super::capture::{Capture, every_number, holders, lives};
use super::epoll_watch;
use super::file::{self, Form};
use super::live::{Holder, Live};
use super::locks;
use super::matching::matching;
use super::model::{
    Complaint, Description, Inode, LiveDescription, ObjectId, Observed, Recorded, Source,
};
use super::pipe::{self, Pipe};
use super::proc_file;
use super::reborn::Gone;
use super::side_by_side;
use super::socket;
use super::socket_ends::inner_tcp;
use super::state::{self, State};
use super::survey::{self, Ask, Expected, survey};
use super::sysv;
use super::tcp_queue::complete;
use super::terminal;
use crate::freeze::{Batch, Outputs, Stopped};
use crate::kernel::{kcmp, pidfd};
use crate::outcome::Refusal;

/// What was asked together with other things, and the process in whose batch it was.
#[derive(Default)]
pub struct Asked {
    /// About the tables that are recorded, by their index.
    tables: BTreeMap<usize, (survey::Questions, Pid)>,
    /// About the IPC namespace, if it is the tree's own.
    pub(super) sysv: Option<(sysv::Counts, Pid)>,
}

impl Asked {
    /// Nothing so far.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Adds the questions about the table that is reached by a process, if there is one, to a batch for it.
pub fn ask(capture: &Capture, pid: Pid, batch: &mut Batch, asked: &mut Asked) {
    let recorded = &capture.recorded;
    let mut tables = recorded.tables.iter().enumerate();
    if let Some((index, table)) = tables.find(|(_, table)| table.pid() == pid.as_raw()) {
        let mut numbers = table.slots.iter().map(|slot| slot.fd);
        let expected = |fd| expected(recorded, index, fd);
        let questions = survey::Questions::add(batch, &mut numbers, expected);
        asked.tables.insert(index, (questions, pid));
        if index == 0 && recorded.sysv.own_namespace {
            asked.sysv = Some((sysv::Counts::add(batch), pid));
        }
    }
}

/// Looks at the descriptors of a stopped tree whose recorded processes are all there but those that are `lost`. Changes
/// nothing. `outputs` are those of the batches that hold the questions in `asked`.
pub fn observe(
    stopped: &mut Stopped<'_>,
    capture: &Capture,
    asked: &Asked,
    outputs: &BTreeMap<Pid, Outputs>,
    lost: &Gone,
) -> Result<Observed, Error> {
    let recorded = &capture.recorded;
    let holders = holders(stopped, &recorded.names);
    check_sharing(recorded, &holders, lost)?;
    let tables: Vec<Vec<i32>> = recorded
        .tables
        .iter()
        .map(|table| table.holders.clone())
        .collect();
    let guess = |table: usize| {
        let slots = &recorded.tables[table].slots;
        slots.iter().map(|slot| slot.fd).collect()
    };
    let answers = |table: usize| {
        let (questions, pid) = asked.tables.get(&table)?;
        Some((questions, outputs.get(pid)?))
    };
    let found = survey(
        stopped,
        &tables,
        guess,
        |table| lost.contains_key(&recorded.tables[table].pid()),
        |table, fd| expected(recorded, table, fd),
        answers,
    )?;
    let lives = lives(&holders, &found)?;

    let mut failed = Ok(());
    let is = matching(&recorded.tables, &found.tables, lives.len(), |id, at| {
        alike(&recorded.descriptions[&id], &lives[at]).unwrap_or_else(|error| {
            failed = Err(error);
            false
        })
    });
    failed?;

    let mut observed = Observed {
        tables: found.tables,
        limits: found.limits,
        ..Observed::default()
    };
    let looks: Vec<_> = lives.iter().zip(is).collect();
    let states = side_by_side::each(&looks, |(live, is)| match is {
        Some(id) => recorded.descriptions[id].state.observe(live),
        None => Ok(None),
    })?;
    for (((live, is), state), sighting) in looks.into_iter().zip(states).zip(&found.descriptions) {
        let owner = sighting.owner;
        let (place, common) = (live.place(), live.common);
        observed.descriptions.push(LiveDescription {
            place,
            common,
            owner,
            is,
            state,
        });
    }
    for (index, live) in observed.descriptions.iter().enumerate() {
        if let (Some(id), Some(State::Epoll(state))) = (live.is, &live.state) {
            let watched = epoll_watch::watched(index, state, &lives, &observed.tables)?;
            observed.watched.insert(id, watched);
        }
    }
    complete_sockets(recorded, &mut observed, &lives)?;
    observed.pipes = observe_pipes(recorded, &observed, &lives)?;
    observe_gone(capture, &mut observed, lost)?;
    observed.terminals = terminal::observe(stopped, recorded, &observed, &lives)?;
    let numbers = every_number(&observed.tables).filter_map(|(place, index, holders)| {
        let live = &observed.descriptions[index];
        Some((live.is?, live.common, place, holders))
    });
    observed.locks = locks::held(numbers)?;
    Ok(observed)
}

fn expected(recorded: &Recorded, table: usize, fd: i32) -> Expected {
    let Some(slot) = recorded.tables[table].at(fd) else {
        return Expected::NOTHING;
    };
    let description = &recorded.descriptions[&slot.description];
    let ask = match &description.state {
        State::File(_) => Ask::File,
        State::Pipe(_) => Ask::Pipe,
        State::Socket(_) => Ask::Socket,
        _ => Ask::Nothing,
    };
    Expected {
        is: Some((slot.description, description.common)),
        ask,
        signal: description.owner.is_some(),
    }
}

/// Looks again at the connections that have both ends in the tree.
fn complete_sockets(
    recorded: &Recorded,
    observed: &mut Observed,
    lives: &[Live<'_>],
) -> Result<(), Error> {
    let ends = inner_tcp(&recorded.sockets());
    let mut states: BTreeMap<ObjectId, socket::State> = observed
        .sockets()
        .into_iter()
        .filter(|(id, _)| ends.contains_key(id))
        .map(|(id, state)| (id, state.clone()))
        .collect();
    let at = |id: ObjectId| {
        observed
            .descriptions
            .iter()
            .position(|live| live.is == Some(id))
    };
    complete(&mut states, &ends, &recorded.sockets(), |id| match at(id) {
        Some(at) => lives[at].duplicate(),
        None => Err(Error::Own {
            call: "finding a socket",
            errno: nix::errno::Errno::EBADF,
        }),
    })?;
    for live in &mut observed.descriptions {
        if let Some(state) = live.is.and_then(|id| states.remove(&id)) {
            live.state = Some(State::Socket(state));
        }
    }
    Ok(())
}

/// Whether those that shared a table share it still.
fn check_sharing(
    recorded: &Recorded,
    holders: &BTreeMap<i32, Holder>,
    lost: &Gone,
) -> Result<(), Error> {
    let refuse = |pid, remedy: &str| Refusal {
        object: "file table".into(),
        holder: recorded.holder(pid),
        remedy: remedy.into(),
    };
    for table in &recorded.tables {
        if table.holders.len() == 1 && lost.contains_key(&table.pid()) {
            continue;
        }
        for &pid in &table.holders {
            if lost.contains_key(&pid) {
                let remedy = "it was shared with another process, and can't be once that was made again; take a new checkpoint";
                return Err(refuse(pid, remedy).into());
            }
            if !holders.contains_key(&pid) {
                return Err(refuse(pid, "the process has ended since the checkpoint").into());
            }
            if pid == table.pid() {
                continue;
            }
            let pids = (Pid::from_raw(table.pid()), Pid::from_raw(pid));
            let same = kcmp::same(pids.0, pids.1, kcmp::Shared::Files).map_err(|errno| {
                Error::Descriptor {
                    what: "file table".into(),
                    pid,
                    call: "kcmp",
                    errno,
                }
            })?;
            if !same {
                let remedy =
                    "it was shared with another process and is not any more; that can't be undone";
                return Err(refuse(pid, remedy).into());
            }
        }
    }
    Ok(())
}

/// Whether a live description can be the recorded one.
fn alike(recorded: &Description, live: &Live<'_>) -> Result<bool, Error> {
    let (then, now) = (&recorded.common, &live.common);
    let same = then.inode() == now.inode()
        && then.rdev == now.rdev
        && then.file_type() == now.file_type()
        && then.fixed_flags() == now.fixed_flags();
    if !same {
        return Ok(false);
    }
    Ok(match &recorded.state {
        State::File(_) | State::Pipe(_) => true,
        State::Socket(socket) => live
            .glance
            .cookie
            .is_none_or(|cookie| cookie == socket.cookie),
        other => other.anonymous() == state::anonymous(live)?,
    })
}

/// The recorded internal pipes of which an end is still there.
fn observe_pipes(
    recorded: &Recorded,
    observed: &Observed,
    lives: &[Live<'_>],
) -> Result<BTreeMap<Inode, Pipe>, Error> {
    let mut ends: BTreeMap<Inode, Vec<&Live<'_>>> = BTreeMap::new();
    for (live, now) in lives.iter().zip(&observed.descriptions) {
        let is_end =
            live.common.file_type() == libc::S_IFIFO && live.common.flags & libc::O_PATH == 0;
        if is_end && now.is.is_some() {
            ends.entry(live.common.inode()).or_default().push(live);
        }
    }
    let recorded_ends = recorded.descriptions.values();
    let readable: BTreeSet<Inode> = recorded_ends
        .filter(|end| matches!(end.state, State::Pipe(_)) && end.common.can_read())
        .map(|end| end.common.inode())
        .collect();
    let mut pipes = BTreeMap::new();
    for (inode, ends) in ends {
        let Some(Pipe {
            content: Some(then),
            ..
        }) = recorded.pipes.get(&inode)
        else {
            continue;
        };
        let capacity = match ends.iter().find_map(|live| live.glance.capacity) {
            Some(capacity) => capacity,
            None => pipe::capacity(ends[0].duplicate()?)?,
        };
        let is_empty = ends.iter().any(|live| live.glance.unread == Some(0));
        let content = if (is_empty && then.bytes.is_empty()) || !readable.contains(&inode) {
            pipe::Content::default()
        } else if let Some(live) = ends.iter().find(|live| live.common.can_read()) {
            pipe::content(live.duplicate()?)?
        } else {
            pipe::content(pipe::open(&ends[0].path(), libc::O_RDONLY)?)?
        };
        pipes.insert(
            inode,
            Pipe {
                inode,
                capacity,
                content: Some(content),
            },
        );
    }
    Ok(pipes)
}

/// How those that are gone can be had again.
fn observe_gone(capture: &Capture, observed: &mut Observed, lost: &Gone) -> Result<(), Error> {
    let recorded = &capture.recorded;
    let mut is_there: Vec<ObjectId> = observed
        .descriptions
        .iter()
        .filter_map(|live| live.is)
        .collect();
    is_there.sort_unstable();
    let mut gone = BTreeMap::new();
    for (id, description) in &recorded.descriptions {
        if let Some(complaint) = is_of_lost(capture, lost, *id, description) {
            gone.insert(*id, Source::Nowhere(complaint));
        } else if is_there.binary_search(id).is_err() {
            gone.insert(*id, source(capture, observed, lost, *id, description)?);
        }
    }
    observed.gone = gone;
    Ok(())
}

/// Whether it is a file that `/proc` has of a process that is to be made again, and can't be had of that one.
fn is_of_lost(
    capture: &Capture,
    lost: &Gone,
    id: ObjectId,
    description: &Description,
) -> Option<Complaint> {
    let State::File(state) = &description.state else {
        return None;
    };
    if lost.is_empty() {
        return None;
    }
    let common = &description.common;
    let (_, of) = proc_file::owner(state, common, capture.pins.get(&id)?, lost)?;
    let remedy = "it is of a process that has ended since the checkpoint or is to be made again; take the checkpoint when it is closed";
    let complaint = (state.path.clone(), remedy.into());
    (!proc_file::is_had_again(state, common, of.other)).then_some(complaint)
}

fn source(
    capture: &Capture,
    observed: &Observed,
    lost: &Gone,
    id: ObjectId,
    description: &Description,
) -> Result<Source, Error> {
    let recorded = &capture.recorded;
    let common = &description.common;
    let by_path = |path: &str| {
        let places = recorded.places(id);
        let mut pids = places.map(|place| lost.get(&place.pid).map_or(place.pid, |of| of.other));
        pids.find(|pid| file::locate(*pid, path, common).is_some())
            .map(Source::Path)
    };
    let by_inode = || {
        let mut live = observed.descriptions.iter();
        live.find(|live| live.common.inode() == common.inode())
            .map(|live| Source::Inode(live.place))
    };
    Ok(match &description.state {
        State::File(_) if capture.pins.contains_key(&id) => Source::Pin,
        State::File(state) => match state.form {
            Form::Process(pid) => match lost.contains_key(&pid) || is_process(pid, common) {
                true => Source::New,
                false => Source::Nowhere(state.complain_gone()),
            },
            _ if state.is_reopenable() => by_path(&state.path)
                .or_else(by_inode)
                .unwrap_or_else(|| Source::Nowhere(state.complain_gone())),
            _ => Source::Nowhere(state.complain_gone()),
        },
        State::Pipe(state) => {
            let internal = recorded
                .pipes
                .get(&common.inode())
                .is_some_and(|pipe| pipe.content.is_some());
            let by_name = || state.fifo.as_deref().and_then(by_path);
            match by_inode().or_else(by_name) {
                Some(source) => source,
                None if capture.pins.contains_key(&id) => Source::Pin,
                None if internal && state.fifo.is_none() => Source::New,
                None => {
                    match pipe::outside_holder(common.inode(), |pid| lost.contains_key(&pid))? {
                        Some(place) => Source::Inode(place),
                        None => Source::Nowhere((
                            "pipe".into(),
                            "it was closed since the checkpoint, and so was its other end outside"
                                .into(),
                        )),
                    }
                }
            }
        }
        State::Inotify(state) => match state.replaceable() {
            Ok(()) => Source::New,
            Err(complaint) => Source::Nowhere(complaint),
        },
        State::Eventfd(_)
        | State::Epoll(_)
        | State::Timerfd(_)
        | State::Signalfd(_)
        | State::Socket(_) => Source::New,
    })
}

/// Whether the process that a pidfd meant is still there: since Linux 6.9 a pidfd has the process's own inode.
fn is_process(pid: i32, common: &super::model::Common) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Ok(pidfd) = pidfd::open(Pid::from_raw(pid)) else {
        return false;
    };
    std::fs::File::from(pidfd)
        .metadata()
        .is_ok_and(|at| (at.dev(), at.ino()) == common.inode())
}
