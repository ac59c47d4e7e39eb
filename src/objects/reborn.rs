//! Processes that have ended and are made again.

use std::collections::BTreeMap;

use super::capture::Capture;
use super::file::Form;
use super::locks;
use super::state::State;

/// Recorded processes that are not there or will not stay, by host PID, and for each another that sees the same files and
/// lives in the same namespaces. Their tables count as empty, which they will be when they have been made again.
pub type Gone = BTreeMap<i32, i32>;

/// Notes that a process was made again: it has a host PID and an inode of its pidfds, and had others.
pub fn reborn(capture: &mut Capture, (was, old_inode): (i32, u64), (is, inode): (i32, u64)) {
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
