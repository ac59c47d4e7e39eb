//! Terminals: what all descriptions of one have in common. Of those of which both ends are in the tree that is also the
//! window size and what waits to be read; where the other end is outside, these are the user's.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::Error;
use super::execute::Reach;
use super::file::{self, Form};
use super::live::Live;
use super::model::{Complaint, ObjectId, Observed, Place, Recorded};
use super::state::State;
use super::terminal_queue::{Content, Ends, can, is_canonical};
use crate::freeze::{Batch, Output, StepId, Stopped};
use crate::kernel::anonymous::readable_bytes;
use crate::kernel::tty::{self, Switch, Termios, WindowSize};

/// A terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Its device number, of a pseudo-terminal its slave's.
    pub device: u64,
    /// One of its descriptions, of the master if there is one.
    pub any: ObjectId,
    /// Descriptions of its master.
    pub masters: Vec<ObjectId>,
    /// The other descriptions.
    pub slaves: Vec<ObjectId>,
    /// What can be set.
    pub settings: Settings,
    /// The process group in the foreground, for the session that it controls.
    pub foreground: Option<Foreground>,
    /// What waits to be read, if both ends are in the tree.
    pub content: Option<Content>,
}

/// What can be set of a terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    modes: Termios,
    size: WindowSize,
    /// Of each of [`SWITCHES`]; `None` if there is no such thing.
    switches: [Option<i32>; SWITCHES.len()],
}

/// The process group in the foreground.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foreground {
    /// A number of a process whose controlling terminal it is.
    pub place: Place,
    /// The group, as that process sees it.
    pub group: i32,
}

const SWITCHES: [Switch; 4] = [
    Switch::Discipline,
    Switch::Exclusive,
    Switch::Packets,
    Switch::Locked,
];

/// A terminal at a rollback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Now {
    /// What is set; `None` if no description of it is there.
    settings: Option<Settings>,
    /// The group in the foreground: `None` if there is no number to ask through, an error if it does not control that
    /// process any more.
    foreground: Option<Result<i32, Errno>>,
    /// Something waits to be read, or may do so unseen.
    waits: bool,
}

/// What must be done to a terminal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    settings: bool,
    foreground: Option<Foreground>,
    content: bool,
}

/// Descriptors of the ends there are, for a moment. Modes and size can be had at either end.
#[derive(Debug, Default)]
struct Held {
    master: Option<OwnedFd>,
    slave: Option<OwnedFd>,
}

impl Held {
    /// The end that a switch belongs to.
    fn end_of(&self, which: Switch) -> Option<BorrowedFd<'_>> {
        let end = match which {
            Switch::Packets | Switch::Locked => &self.master,
            Switch::Exclusive | Switch::Discipline => &self.slave,
        };
        end.as_ref().map(AsFd::as_fd)
    }

    fn any(&self) -> Option<BorrowedFd<'_>> {
        self.master
            .as_ref()
            .or(self.slave.as_ref())
            .map(AsFd::as_fd)
    }

    /// `None` if there is no end, or the terminal was hung up.
    fn settings(&self) -> Result<Option<Settings>, Error> {
        let Some(fd) = self.any() else {
            return Ok(None);
        };
        let modes = match tty::termios(fd) {
            Err(Errno::EIO) => return Ok(None),
            other => other.map_err(own("TCGETS2"))?,
        };
        let switch = |which| tty::switch(self.end_of(which)?, which).ok();
        Ok(Some(Settings {
            modes,
            size: tty::window_size(fd).map_err(own("TIOCGWINSZ"))?,
            switches: SWITCHES.map(switch),
        }))
    }
}

fn own(call: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Own { call, errno }
}

/// Whether this description is of a terminal, and whether of its master.
fn end(state: &State) -> Option<bool> {
    match state {
        State::File(file::State {
            form: Form::Terminal,
            ..
        }) => Some(false),
        State::File(file::State {
            form: Form::Master, ..
        }) => Some(true),
        _ => None,
    }
}

/// Records the terminals of a stopped tree; `lives` are all descriptions with their ids.
pub(super) fn capture(
    stopped: &mut Stopped<'_>,
    recorded: &Recorded,
    lives: &[(ObjectId, &Live<'_>)],
) -> Result<Vec<Terminal>, Error> {
    type Ends = (Vec<ObjectId>, Vec<ObjectId>);
    let mut found: BTreeMap<u64, (Ends, Held)> = BTreeMap::new();
    for (id, live) in lives {
        let Some(is_master) = end(&recorded.descriptions[id].state) else {
            continue;
        };
        let duplicate = live.duplicate()?;
        let device = match tty::device(&duplicate) {
            // Hung up: it is a terminal no more.
            Err(Errno::EIO) => continue,
            other => other.map_err(live.failed("TIOCGDEV"))?,
        };
        let (ends, held) = found.entry(device).or_default();
        if is_master {
            ends.0.push(*id);
            held.master = Some(duplicate);
        } else {
            ends.1.push(*id);
            held.slave = Some(duplicate);
        }
    }
    let mut terminals = Vec::with_capacity(found.len());
    for (device, ((masters, slaves), held)) in found {
        let any = masters.iter().chain(&slaves).next().copied();
        if let (Some(settings), Some(any)) = (held.settings()?, any) {
            terminals.push(Terminal {
                device,
                any,
                masters,
                slaves,
                settings,
                foreground: None,
                content: None,
            });
        }
    }
    if terminals.is_empty() {
        return Ok(terminals);
    }
    find_foreground(stopped, recorded, &mut terminals)?;
    let duplicate = |id: ObjectId| {
        let live = lives.iter().find(|(other, _)| *other == id);
        live.map_or(Err(gone()), |(_, live)| live.duplicate())
    };
    for terminal in &mut terminals {
        if let Some(ends) = terminal.ends(duplicate)? {
            let content = ends.take()?;
            ends.put(&content, is_canonical(&terminal.settings.modes))?;
            terminal.content = Some(content);
        }
    }
    Ok(terminals)
}

fn gone() -> Error {
    Error::Own {
        call: "finding a terminal",
        errno: Errno::EBADF,
    }
}

/// Asks processes whether the terminal at a number controls them, and for the group in its foreground.
fn ask(batch: &mut Batch, fd: i32) -> (StepId, Output) {
    let room = batch.output(8);
    let arguments = [fd.into(), libc::TIOCGPGRP.into(), room.arg()];
    (batch.call(libc::SYS_ioctl, &arguments), room)
}

fn group(bytes: &[u8]) -> i32 {
    bytes
        .first_chunk()
        .map_or(0, |bytes| i32::from_ne_bytes(*bytes))
}

/// Runs a batch of such questions in each process.
fn ask_all(
    stopped: &mut Stopped<'_>,
    places: impl Iterator<Item = Place>,
) -> Result<BTreeMap<Place, Result<i32, Errno>>, Error> {
    let mut by_pid: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for place in places {
        by_pid.entry(place.pid).or_default().push(place.fd);
    }
    let mut answers = BTreeMap::new();
    for (pid, numbers) in by_pid {
        let mut batch = Batch::new();
        let asked: Vec<_> = numbers.iter().map(|fd| ask(&mut batch, *fd)).collect();
        let outputs = stopped.run(Pid::from_raw(pid), &batch)?;
        for (fd, (step, room)) in numbers.into_iter().zip(asked) {
            let answer = outputs.result(step).map(|_| group(outputs.bytes(&room)));
            answers.insert(Place { pid, fd }, answer);
        }
    }
    Ok(answers)
}

fn find_foreground(
    stopped: &mut Stopped<'_>,
    recorded: &Recorded,
    terminals: &mut [Terminal],
) -> Result<(), Error> {
    let slaves = terminals.iter().flat_map(|terminal| &terminal.slaves);
    let answers = ask_all(stopped, slaves.flat_map(|id| places(recorded, *id)))?;
    for terminal in terminals {
        let mut asked = terminal
            .slaves
            .iter()
            .flat_map(|id| places(recorded, *id))
            .filter_map(|place| Some((place, answers.get(&place)?.ok()?)));
        terminal.foreground = asked
            .next()
            .map(|(place, group)| Foreground { place, group });
    }
    Ok(())
}

/// All numbers of a description, in every process that has the table.
fn places(recorded: &Recorded, id: ObjectId) -> impl Iterator<Item = Place> {
    recorded.tables.iter().flat_map(move |table| {
        let slots = table
            .slots
            .iter()
            .filter(move |slot| slot.description == id);
        slots.flat_map(|slot| {
            let fd = slot.fd;
            table.holders.iter().map(move |pid| Place { pid: *pid, fd })
        })
    })
}

/// What the recorded terminals are now.
pub(super) fn observe(
    stopped: &mut Stopped<'_>,
    recorded: &Recorded,
    observed: &Observed,
    lives: &[Live<'_>],
) -> Result<Vec<Now>, Error> {
    if recorded.terminals.is_empty() {
        return Ok(Vec::new());
    }
    let live = |id: ObjectId| {
        let mut all = observed.descriptions.iter().zip(lives);
        all.find(|(now, _)| now.is == Some(id))
            .map(|(_, live)| live)
    };
    let still_there = |foreground: &Foreground, terminal: &Terminal| {
        let holds =
            |table: &&super::model::Table<usize>| table.holders.contains(&foreground.place.pid);
        let table = observed.tables.iter().find(holds);
        let slot = table.and_then(|table| table.at(foreground.place.fd));
        let is = slot.and_then(|slot| observed.descriptions[slot.description].is);
        is.is_some_and(|is| terminal.slaves.contains(&is))
    };
    let asked = recorded.terminals.iter().filter_map(|terminal| {
        let foreground = terminal.foreground.as_ref()?;
        still_there(foreground, terminal).then_some(foreground.place)
    });
    let answers = ask_all(stopped, asked)?;
    let mut found = Vec::with_capacity(recorded.terminals.len());
    for terminal in &recorded.terminals {
        let master = terminal.masters.iter().find_map(|id| live(*id));
        let slave = terminal.slaves.iter().find_map(|id| live(*id));
        let held = Held {
            master: master.map(Live::duplicate).transpose()?,
            slave: slave.map(Live::duplicate).transpose()?,
        };
        // An end that was closed is opened again, and then all is set.
        let complete = master.is_some() != terminal.masters.is_empty()
            && slave.is_some() != terminal.slaves.is_empty();
        let settings = held.settings()?.filter(|_| complete);
        let content = terminal.content.as_ref();
        let waits = !complete
            || content.is_some_and(|content| !content.is_empty())
            || settings
                .as_ref()
                .is_some_and(|now| is_canonical(&now.modes))
            || [&held.master, &held.slave]
                .into_iter()
                .flatten()
                .any(something_waits);
        found.push(Now {
            settings,
            foreground: terminal
                .foreground
                .and_then(|foreground| answers.get(&foreground.place).copied()),
            waits: content.is_some() && waits,
        });
    }
    Ok(found)
}

fn something_waits(end: &OwnedFd) -> bool {
    can(end.as_fd(), PollFlags::POLLIN).unwrap_or(true) || readable_bytes(end).unwrap_or(1) > 0
}

impl Terminal {
    fn name(&self) -> String {
        let (major, minor) = (
            nix::sys::stat::major(self.device),
            nix::sys::stat::minor(self.device),
        );
        match major {
            136..=143 => format!("terminal /dev/pts/{}", (major - 136) * 256 + minor),
            _ => format!("terminal {major}:{minor}"),
        }
    }

    /// Both ends, if they are in the tree.
    fn ends(
        &self,
        duplicate: impl Fn(ObjectId) -> Result<OwnedFd, Error>,
    ) -> Result<Option<Ends>, Error> {
        let (Some(master), Some(slave)) = (self.masters.first(), self.slaves.first()) else {
            return Ok(None);
        };
        let (master, slave) = (duplicate(*master)?, duplicate(*slave)?);
        Ok(Some(Ends {
            master: File::from(master),
            slave: File::from(slave),
        }))
    }

    /// Settings as they shall be: of a terminal whose other end is outside the window size is the user's.
    fn wanted(&self, now: &Settings) -> Settings {
        let mut wanted = self.settings.clone();
        if self.content.is_none() {
            wanted.size = now.size;
        }
        // What there is no end for now can't be told, and is set when there is one.
        for (wanted, now) in wanted.switches.iter_mut().zip(now.switches) {
            *wanted = wanted.filter(|_| now.is_some());
        }
        wanted
    }

    fn held(&self, duplicate: impl Fn(ObjectId) -> Result<OwnedFd, Error>) -> Result<Held, Error> {
        Ok(Held {
            master: self.masters.first().copied().map(&duplicate).transpose()?,
            slave: self.slaves.first().copied().map(&duplicate).transpose()?,
        })
    }

    /// What must be done; `Ok(None)` if nothing.
    pub(super) fn difference(&self, now: &Now) -> Result<Option<Change>, Complaint> {
        if let Some(Err(_)) = now.foreground {
            let remedy = "it was the controlling terminal of its session at the checkpoint and was given up since, which \
                          can't be undone";
            return Err((self.name(), remedy.into()));
        }
        let settings = now.settings.as_ref();
        let change = Change {
            settings: settings.is_none_or(|settings| *settings != self.wanted(settings)),
            foreground: self
                .foreground
                .filter(|foreground| now.foreground != Some(Ok(foreground.group))),
            content: now.waits,
        };
        let nothing = !change.settings && change.foreground.is_none() && !change.content;
        Ok((!nothing).then_some(change))
    }

    /// Makes a change; all descriptions are in their places.
    pub(super) fn apply(&self, change: &Change, reach: &Reach<'_>) -> Result<(), Error> {
        if change.content
            && let Some(content) = &self.content
            && let Some(ends) = self.ends(|id| reach.duplicate(id))?
        {
            ends.take()?;
            // What is a line then is one for ever: the mode comes first.
            tty::set_termios(&ends.slave, &self.settings.modes).map_err(own("TCSETS2"))?;
            ends.put(content, is_canonical(&self.settings.modes))?;
        }
        let held = self.held(|id| reach.duplicate(id))?;
        let (Some(now), Some(fd)) = (held.settings()?, held.any()) else {
            return Ok(());
        };
        let wanted = self.wanted(&now);
        let switches = wanted.switches.iter().zip(&now.switches).zip(SWITCHES);
        for ((wanted, now), which) in switches {
            if let (Some(wanted), Some(now), Some(end)) = (wanted, now, held.end_of(which))
                && wanted != now
            {
                tty::set_switch(end, which, *wanted).map_err(own("ioctl of a terminal"))?;
            }
        }
        if wanted.modes != now.modes {
            tty::set_termios(fd, &wanted.modes).map_err(own("TCSETS2"))?;
        }
        if wanted.size != now.size {
            tty::set_window_size(fd, &wanted.size).map_err(own("TIOCSWINSZ"))?;
        }
        Ok(())
    }

    /// How it differs, in words.
    pub(super) fn compare(
        &self,
        duplicate: impl Fn(ObjectId) -> Result<OwnedFd, Error>,
    ) -> Result<Vec<String>, Error> {
        let mut differences = Vec::new();
        let now = self.held(&duplicate)?.settings()?;
        if let Some(now) = now
            && now != self.wanted(&now)
        {
            differences.push(format!("{now:?} instead of {:?}", self.settings));
        }
        if let (Some(content), Some(ends)) = (&self.content, self.ends(duplicate)?) {
            let shown = content.shown(is_canonical(&self.settings.modes));
            for (end, wanted) in [(&ends.slave, shown), (&ends.master, content.output.len())] {
                let now = readable_bytes(end).map_err(own("FIONREAD"))?;
                if now != wanted {
                    differences.push(format!("{now} bytes wait to be read instead of {wanted}"));
                }
            }
        }
        Ok(differences)
    }
}

/// Adds the step that gives a terminal its foreground group again.
pub(super) fn set_foreground(batch: &mut Batch, foreground: &Foreground) -> StepId {
    let group = batch.input(&foreground.group.to_ne_bytes());
    let arguments = [foreground.place.fd.into(), libc::TIOCSPGRP.into(), group];
    batch.call(libc::SYS_ioctl, &arguments)
}

impl Change {
    /// The group to bring to the foreground.
    pub(super) fn foreground(&self) -> Option<&Foreground> {
        self.foreground.as_ref()
    }
}
