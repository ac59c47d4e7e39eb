//! Processes that have ended and are made again.

use std::collections::BTreeMap;

use super::capture::Capture;
use super::file::Form;
use super::locks;
use super::model::Recorded;
use super::state::State;
use crate::freeze::LEAST_NO_PID;

/// Recorded processes that are not there or will not stay, by host PID, and for each another that sees the same files and
/// lives in the same namespaces. Their tables count as empty, which they will be when they have been made again.
pub type Gone = BTreeMap<i32, i32>;

/// Notes that a process was made again: it has a host PID and an inode of its pidfds, and had others.
pub fn reborn(capture: &mut Capture, was: (i32, u64), is: (i32, u64)) {
    renumber(&mut capture.recorded, was, is);
}

/// Renames processes all at once: each from the first to the second. A number may be among both.
pub(super) fn renumber_all(
    recorded: &mut Recorded,
    names: impl Iterator<Item = ((i32, u64), (i32, u64))> + Clone,
) {
    // So they are all taken out of the way first.
    for ((was, inode), _) in names.clone() {
        renumber(recorded, (was, inode), (was + LEAST_NO_PID, inode));
    }
    for ((was, inode), is) in names {
        renumber(recorded, (was + LEAST_NO_PID, inode), is);
    }
}

fn renumber(recorded: &mut Recorded, (was, old_inode): (i32, u64), (is, inode): (i32, u64)) {
    let rename = |pid: &mut i32| {
        if *pid == was {
            *pid = is;
        }
    };
    for table in &mut recorded.tables {
        table.holders.iter_mut().for_each(rename);
        table.holders.sort_unstable();
    }
    for description in recorded.descriptions.values_mut() {
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
