//! Processes that have ended and are made again.

use std::collections::BTreeMap;

use super::capture::Capture;
use super::file::Form;
use super::state::State;
use super::{locks, proc_file};

/// Recorded processes that are not there or will not stay, by host PID. Their tables count as empty, which they will be when
/// they have been made again.
pub type Gone = BTreeMap<i32, Stead>;

/// What is known of a process that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stead {
    /// The host PID of another that sees the same files and lives in the same namespaces.
    pub other: i32,
    /// The PID that it has in its own namespace.
    pub number: i32,
}

/// A process that was made again: its host PID and the inode of its pidfds, as they were and as they are, and the PID in its own
/// namespace.
#[derive(Debug, Clone, Copy)]
pub struct Reborn {
    /// Those that it had.
    pub was: (i32, u64),
    /// Those that it has.
    pub is: (i32, u64),
    /// The one that stays.
    pub number: i32,
}

/// Notes that a process was made again.
pub fn reborn(capture: &mut Capture, process: Reborn) {
    let Reborn {
        was: (was, old_inode),
        is: (is, inode),
        number,
    } = process;
    let of_it: Gone = [(was, Stead { other: is, number })].into();
    let recorded = &mut capture.recorded;
    let rename = |pid: &mut i32| {
        if *pid == was {
            *pid = is;
        }
    };
    for table in &mut recorded.tables {
        table.holders.iter_mut().for_each(rename);
        table.holders.sort_unstable();
    }
    for (id, description) in &mut recorded.descriptions {
        match &mut description.state {
            State::Epoll(epoll) => epoll
                .entries
                .iter_mut()
                .for_each(|entry| rename(&mut entry.pid)),
            State::File(file) if file.form == Form::Process(was) => {
                file.form = Form::Process(is);
                if description.common.ino == old_inode {
                    description.common.ino = inode;
                }
            }
            State::File(file) => {
                let pin = capture.pins.get(id);
                let owner = |pin| proc_file::owner(file, &description.common, pin, &of_it);
                if pin.and_then(owner).is_some() {
                    match proc_file::again(file, &mut description.common, is) {
                        Some(pin) => drop(capture.pins.insert(*id, pin)),
                        None => {
                            // Nothing leads to it any more.
                            description.common.ino = 0;
                            capture.pins.remove(id);
                        }
                    }
                }
            }
            _ => {}
        }
    }
    for lock in &mut recorded.locks {
        if let locks::Owner::Process(place) = &mut lock.owner {
            rename(&mut place.pid);
        }
    }
    if let Some(name) = recorded.names.remove(&was) {
        recorded.names.insert(is, name);
    }
}
