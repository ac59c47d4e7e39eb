//! epoll(7).
//!
//! An entry is named by the number *and* the description it was added with, and stays as long as that description does,
//! even when the number is closed. So entries made since are deleted before any number is closed, and recorded ones
//! are put back when all numbers are.
//!
//! An edge-triggered or one-shot entry is set again at every rollback even if it looks unchanged: the program may have
//! been told of an event since that it has now not been told of. Setting it makes the kernel look again, at worst the
//! program is told of a readiness it knows already, which epoll(7) allows.

use serde::{Deserialize, Serialize};

use super::Error;
use super::epoll_watch::Watched;
use super::fdinfo::Fdinfo;
use super::live::Live;
use super::model::{ObjectId, Place};
use crate::freeze::{Batch, Outputs, StepId};

const EDGE_TRIGGERED: u32 = libc::EPOLLET as u32;
const ONE_SHOT: u32 = libc::EPOLLONESHOT as u32;
const EXCLUSIVE: u32 = libc::EPOLLEXCLUSIVE as u32;
const FLAGS: u32 = EDGE_TRIGGERED | ONE_SHOT | EXCLUSIVE | libc::EPOLLWAKEUP as u32;

/// What an instance watches.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct State {
    /// Its entries, by number and then in the order the kernel shows them.
    pub entries: Vec<Entry>,
}

/// An entry of the interest list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The number it was added with.
    pub fd: i32,
    /// Events and flags (`EPOLL*`).
    pub events: u32,
    /// What the program gets back with an event.
    pub data: u64,
    /// Device (as in the kernel, 12 bits major and 20 minor) and inode number of the watched file.
    pub inode: (u64, u64),
    /// The recorded description it watches; not known of a live one.
    pub watches: Option<ObjectId>,
    /// A process in whose table `fd` is that description.
    pub pid: i32,
}

impl Entry {
    /// Whether it is one-shot and has fired: it has no events left until it is set again.
    pub fn is_fired_one_shot(&self) -> bool {
        self.events & ONE_SHOT != 0 && self.events & !FLAGS == 0
    }

    fn is_same(&self, other: &Self) -> bool {
        (self.fd, self.inode) == (other.fd, other.inode)
    }
}

/// What must be done to an instance.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Change {
    /// Entries to delete while the numbers are still as they were found: a place of the instance, and the number.
    pub delete: Vec<(Place, i32)>,
    /// Entries to set when the numbers are as recorded.
    pub set: Vec<Entry>,
}

/// The number of a device as the kernel has it inside, from `st_dev`.
pub fn kernel_device(dev: u64) -> u64 {
    (nix::sys::stat::major(dev) << 20) | nix::sys::stat::minor(dev)
}

fn parse(info: &Fdinfo) -> Result<State, Error> {
    let mut entries = Vec::new();
    for line in info.lines("tfd") {
        let (fd, rest) = line.split_once(' ').unwrap_or((line, ""));
        let fd = fd.parse().map_err(|_| Error::Text {
            path: "fdinfo".into(),
            problem: format!("tfd {line:?} has no number"),
        })?;
        entries.push(Entry {
            fd,
            events: info.word_number(rest, "events", 16)? as u32,
            data: info.word_number(rest, "data", 16)?,
            inode: (
                info.word_number(rest, "sdev", 16)?,
                info.word_number(rest, "ino", 16)?,
            ),
            watches: None,
            pid: 0,
        });
    }
    entries.sort_by_key(|entry| entry.fd);
    Ok(State { entries })
}

/// Records or observes an instance; what its entries watch is found out later, when all descriptions are known.
pub fn capture(live: &Live<'_>) -> Result<State, Error> {
    parse(live.fdinfo()?)
}

impl State {
    /// What must change in `now`; `None` if the instance must be replaced by a new one.
    ///
    /// `watched` tells what each entry of `now` watches, `is` which recorded description a live one is and stays.
    pub fn difference(
        &self,
        now: &Self,
        watched: &[Watched],
        is: impl Fn(usize) -> Option<ObjectId>,
    ) -> Option<Change> {
        let mut change = Change::default();
        let mut left: Vec<(&Entry, Watched)> =
            now.entries.iter().zip(watched.iter().copied()).collect();
        for recorded in &self.entries {
            let is_it = |(entry, watched): &(&Entry, Watched)| {
                entry.fd == recorded.fd
                    && recorded.watches.is_some()
                    && watched.live.and_then(&is) == recorded.watches
            };
            let Some(index) = left.iter().position(is_it) else {
                change.set.push(*recorded);
                continue;
            };
            let (entry, _) = left.remove(index);
            let unchanged = (entry.events, entry.data) == (recorded.events, recorded.data);
            let must_look_again = recorded.events & EDGE_TRIGGERED != 0
                || (recorded.events & ONE_SHOT != 0 && !recorded.is_fired_one_shot());
            if !unchanged || must_look_again {
                change.set.push(*recorded);
            }
        }
        for (extra, watched) in left {
            let goes = |live: usize| is(live).is_none();
            match watched.at {
                Some(instance) => change.delete.push((instance, extra.fd)),
                // With what it watches.
                None if watched.live.is_some_and(goes) => {}
                None => return None,
            }
        }
        Some(change)
    }

    /// How `now` differs, in words.
    pub fn compare(&self, now: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        let mut left = now.entries.clone();
        for recorded in &self.entries {
            let Some(index) = left.iter().position(|entry| entry.is_same(recorded)) else {
                differences.push(format!("epoll entry for fd {} is missing", recorded.fd));
                continue;
            };
            let entry = left.remove(index);
            if (entry.events, entry.data) != (recorded.events, recorded.data) {
                differences.push(format!(
                    "epoll entry for fd {} has events {:x} and data {:x} instead of {:x} and {:x}",
                    recorded.fd, entry.events, entry.data, recorded.events, recorded.data
                ));
            }
        }
        differences.extend(
            left.iter()
                .map(|entry| format!("epoll entry for fd {} is new", entry.fd)),
        );
        differences
    }
}

/// `struct epoll_event`, which is packed on x86-64.
fn event(events: u32, data: u64) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&events.to_ne_bytes());
    bytes[4..].copy_from_slice(&data.to_ne_bytes());
    bytes
}

fn control(batch: &mut Batch, epoll: i32, op: i32, fd: i32, events: u32, data: u64) -> StepId {
    let argument = batch.input(&event(events, data));
    batch.call(
        libc::SYS_epoll_ctl,
        &[epoll.into(), op.into(), fd.into(), argument],
    )
}

/// Adds the steps that delete an entry of the instance at `epoll`.
pub fn delete(batch: &mut Batch, epoll: i32, fd: i32) -> StepId {
    control(batch, epoll, libc::EPOLL_CTL_DEL, fd, 0, 0)
}

/// The steps that set an entry: two of which one must have worked.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    modify: StepId,
    add: StepId,
}

/// Steps [`set`] adds at most.
pub const STEPS_TO_SET: usize = 4;
/// Bytes of data [`set`] needs at most.
pub const DATA_TO_SET: usize = 64 + EVENTS * 12;
const EVENTS: usize = 16;

/// Adds the steps that set an entry of the instance at `epoll`, whether it is there or not.
///
/// One that had fired its one shot has no events at all, which can't be asked for; it is set to any event and made to fire.
pub fn set(batch: &mut Batch, epoll: i32, entry: &Entry) -> Setting {
    let fired = entry.is_fired_one_shot();
    let anything = (libc::EPOLLIN | libc::EPOLLOUT) as u32;
    let events = if fired {
        entry.events | anything
    } else {
        entry.events
    };
    if entry.events & EXCLUSIVE != 0 {
        // It can't be modified (epoll_ctl(2)).
        delete(batch, epoll, entry.fd);
    }
    let modify = control(
        batch,
        epoll,
        libc::EPOLL_CTL_MOD,
        entry.fd,
        events,
        entry.data,
    );
    let add = control(
        batch,
        epoll,
        libc::EPOLL_CTL_ADD,
        entry.fd,
        events,
        entry.data,
    );
    if fired {
        let room = batch.output(EVENTS * 12);
        batch.call(
            libc::SYS_epoll_pwait,
            &[
                epoll.into(),
                room.arg(),
                EVENTS.into(),
                0.into(),
                0.into(),
                8.into(),
            ],
        );
    }
    Setting { modify, add }
}

impl Setting {
    /// Whether the entry is set, and if not why.
    pub fn result(&self, outputs: &Outputs) -> Result<(), nix::errno::Errno> {
        match outputs.result(self.modify) {
            Ok(_) => Ok(()),
            Err(_) => outputs.result(self.add).map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(fd: i32, events: u32, object: u64) -> Entry {
        let watches = ObjectId::from_raw(object);
        Entry {
            fd,
            events,
            data: fd as u64,
            inode: (15, 100 + object),
            watches,
            pid: 7,
        }
    }

    const IN: u32 = libc::EPOLLIN as u32;
    const INSTANCE: Place = Place { pid: 7, fd: 3 };

    fn state(entries: &[Entry]) -> State {
        State {
            entries: entries.to_vec(),
        }
    }

    /// Of entries that watch what they say; live descriptions have the numbers of the recorded ones.
    fn plan(recorded: &[Entry], now: &[Entry], stays: bool) -> Option<Change> {
        let watched: Vec<Watched> = now
            .iter()
            .map(|entry| Watched {
                live: entry.watches.map(|id| id.raw() as usize),
                at: Some(INSTANCE),
            })
            .collect();
        let is = |live: usize| ObjectId::from_raw(live as u64).filter(|_| stays);
        state(recorded).difference(&state(now), &watched, is)
    }

    #[test]
    fn unchanged_level_triggered_entries_cost_nothing() {
        let entries = [entry(4, IN, 1), entry(5, IN, 2)];
        assert_eq!(plan(&entries, &entries, true), Some(Change::default()));
    }

    #[test]
    fn edges_are_looked_at_again() {
        let edge = entry(4, IN | EDGE_TRIGGERED, 1);
        assert_eq!(plan(&[edge], &[edge], true).unwrap().set, [edge]);
        let fired = entry(4, ONE_SHOT, 1);
        assert_eq!(plan(&[fired], &[fired], true).unwrap().set, []);
    }

    #[test]
    fn what_was_added_goes_and_what_was_deleted_comes() {
        let (kept, gone, new) = (entry(4, IN, 1), entry(5, IN, 2), entry(6, IN, 3));
        let change = plan(&[kept, gone], &[kept, new], true).unwrap();
        assert_eq!(
            change,
            Change {
                delete: vec![(INSTANCE, new.fd)],
                set: vec![gone]
            }
        );
    }

    #[test]
    fn an_entry_of_a_description_made_anew_is_added() {
        let lost = entry(4, IN, 1);
        assert_eq!(plan(&[lost], &[], false).unwrap().set, [lost]);
    }

    #[test]
    fn the_same_number_for_another_description_is_another_entry() {
        let (recorded, now) = (entry(4, IN, 1), entry(4, IN, 2));
        let change = plan(&[recorded], &[now], true).unwrap();
        assert_eq!(change.delete, [(INSTANCE, 4)]);
        assert_eq!(change.set, [recorded]);
    }

    #[test]
    fn a_stale_entry_of_a_survivor_needs_another_instance() {
        let (kept, stale) = (entry(4, IN, 1), entry(9, IN, 2));
        let live = |live: Option<usize>, at: Option<Place>| Watched { live, at };
        let plan = |watched: Watched| {
            let all = [live(Some(1), Some(INSTANCE)), watched];
            state(&[kept]).difference(&state(&[kept, stale]), &all, |live| {
                ObjectId::from_raw(live as u64).filter(|_| live < 3)
            })
        };
        assert_eq!(plan(live(Some(2), None)), None);
        assert_eq!(plan(live(None, None)), None);
        assert_eq!(plan(live(Some(3), None)), Some(Change::default()));
    }
}
