//! Files that are shared with the outside: open file descriptions of a tree that processes outside of it have too, as a log that
//! was inherited. Where those stand in it is theirs as well.
//!
//! They are looked for where they come from: in the processes that the tree descends from, but for the machine's init.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;

use nix::unistd::Pid;

use super::model::{Common, Inode, ObjectId, Place};
use crate::kernel::{kcmp, procfs};

/// Whether what others write to it would be overwritten by somebody who goes back in it.
fn is_written_at_its_offset(common: &Common) -> bool {
    let flags = libc::O_APPEND | libc::O_PATH;
    common.file_type() == libc::S_IFREG && common.can_write() && common.flags & flags == 0
}

/// Those of the files of a tree, which are here with a place each, that are written to and shared with the outside.
pub(super) fn shared<'a>(
    root: Pid,
    files: impl Iterator<Item = (ObjectId, Place, &'a Common)>,
) -> BTreeSet<ObjectId> {
    let files: Vec<_> = files
        .filter(|(_, _, common)| is_written_at_its_offset(common))
        .collect();
    let mut found = BTreeSet::new();
    if files.is_empty() {
        return found;
    }
    for (pid, fd, inode) in ancestors(root).flat_map(descriptors) {
        for (id, place, _) in files.iter().filter(|(.., common)| common.inode() == inode) {
            let here = (Pid::from_raw(place.pid), place.fd);
            // One that is gone, or that we may not look at, shares nothing that we know of.
            if kcmp::files((pid, fd), here) == Ok(Ordering::Equal) {
                found.insert(*id);
            }
        }
    }
    found
}

/// The processes that one descends from.
fn ancestors(of: Pid) -> impl Iterator<Item = Pid> {
    let parent = |pid: &Pid| procfs::Stat::read(*pid).ok().map(|stat| stat.parent());
    let all = std::iter::successors(parent(&of), parent);
    all.take_while(|pid| pid.as_raw() > 1)
}

/// The descriptors of a process, and what they are on.
fn descriptors(pid: Pid) -> impl Iterator<Item = (Pid, i32, Inode)> {
    let directory = procfs::path(pid, "fd");
    let numbers = procfs::numbers(&directory).unwrap_or_default();
    numbers.into_iter().filter_map(move |number| {
        let at = std::fs::metadata(directory.join(number.to_string())).ok()?;
        Some((pid, number.as_raw(), (at.dev(), at.ino())))
    })
}
