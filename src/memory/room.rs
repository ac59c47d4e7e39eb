//! Whether there is room: in a memory limit for the shadows of a tree, in the machine for copies.

use std::collections::BTreeSet;

use nix::unistd::Pid;

use crate::kernel::{memory_limit, procfs};
use crate::outcome::Refusal;

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

/// Refuses to take so many bytes of memory for something if that would leave too little: what would be ended for it may be
/// anything.
///
/// # Errors
///
/// Refused, or `/proc` can't be read.
pub fn check_available(holder: &str, bytes: u64) -> Result<()> {
    /// Bytes that are left to others.
    const SPARE: u64 = 64 << 20;
    let us = Pid::this();
    let looking = |error| system(us, "look how much memory is available", error);
    let machine = memory_limit::available().map_err(looking)?;
    let ours = memory_limit::room(us).map_err(looking)?;
    let room = ours.map_or(machine, |ours| ours.bytes.min(machine));
    if bytes.saturating_add(SPARE) <= room {
        return Ok(());
    }
    let remedy = format!(
        "it takes {} MiB in RAM, and {} MiB are available; make room for it",
        (bytes >> 20) + (SPARE >> 20),
        room >> 20
    );
    Err(Refusal {
        object: "a copy of memory".into(),
        holder: holder.into(),
        remedy,
    }
    .into())
}
