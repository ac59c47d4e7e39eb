//! Whether a memory limit has room for the shadows of a tree.

use std::collections::BTreeSet;

use nix::unistd::Pid;

use crate::kernel::{memory_limit, procfs};

use super::Result;
use super::space::{refuse, system};

/// Bytes that a shadow and a window take besides page tables: kernel stack and structures, what of the window is used.
const EACH: u64 = 128 << 10;

/// Refuses if the container's memory limit has no room for a shadow of each process below `root`: the kernel would end one
/// of them for it. Nothing is stopped.
pub fn check_room(root: Pid) -> Result<()> {
    let room = memory_limit::room(root);
    let Some(room) = room.map_err(|error| system(root, "look for a memory limit", error))? else {
        return Ok(());
    };
    let mut needed = 0;
    let mut seen = BTreeSet::from([root]);
    let mut pending = vec![root];
    while let Some(pid) = pending.pop() {
        // What ends meanwhile needs none.
        let status = std::fs::read_to_string(procfs::path(pid, "status")).unwrap_or_default();
        let tables = procfs::status_line(&status, "VmPTE").unwrap_or_default();
        let tables = tables.split_ascii_whitespace().next();
        let tables: u64 = tables.and_then(|word| word.parse().ok()).unwrap_or(0);
        needed += (tables << 10) + EACH;
        for tid in procfs::tasks(pid).unwrap_or_default() {
            let children = procfs::children(pid, tid).unwrap_or_default();
            pending.extend(children.into_iter().filter(|child| seen.insert(*child)));
        }
    }
    if needed <= room.bytes {
        return Ok(());
    }
    let remedy = format!(
        "shadows need some {} KiB, and {} leaves {}; raise it",
        needed >> 10,
        room.limit.display(),
        room.bytes >> 10
    );
    Err(refuse(root, "its memory limit", remedy))
}
