//! What was set on the VMAs of a stopped process.
//!
//! `smaps` names it, but walks all page tables: 20 ms a GiB. The kernel's own flags, of which those names are a function, can be
//! had without (`kernel::vma_flags`); so names are learned from `smaps` once for each combination that is met.

use std::collections::HashMap;
use std::sync::OnceLock;

use nix::unistd::Pid;
use parking_lot::Mutex;

use crate::kernel::vma_flags::{Flagged, Reader};
use crate::kernel::{procfs, smaps};

use super::Result;
use super::space::system;

static READER: OnceLock<Option<Reader>> = OnceLock::new();

/// Prepares to read flags, which takes some milliseconds: to be called before the tree is stopped.
pub fn prepare_flags() {
    READER.get_or_init(|| {
        let loaded = Reader::load();
        loaded
            .inspect_err(|errno| tracing::info!(%errno, "flags of memory are read from smaps"))
            .ok()
    });
}

/// The flags of all VMAs, and whether any may have a memory policy of its own. The process is stopped.
pub(super) fn read(pid: Pid) -> Result<(Vec<smaps::Flags>, bool)> {
    static NAMES: Mutex<Option<HashMap<u64, smaps::Flags>>> = Mutex::new(None);
    let reader = READER.get().and_then(Option::as_ref);
    // A process that can't be looked at like that is by smaps.
    let raw = reader.and_then(|reader| reader.read(pid).ok());
    let raw: Vec<Flagged> = raw.unwrap_or_default();
    let has_policies = raw.is_empty() || raw.iter().any(|vma| vma.policy != 0);
    let mut names = NAMES.lock();
    let names = names.get_or_insert_default();
    let known = raw.iter().map(|vma| {
        let of_others = names.get(&vma.flags)?;
        Some(of_others.clone().at(vma.start, vma.end))
    });
    if let Some(known) = known.collect::<Option<Vec<_>>>()
        && !known.is_empty()
    {
        return Ok((known, has_policies));
    }
    let text = std::fs::read(procfs::path(pid, "smaps"))
        .map_err(|error| system(pid, "read its memory flags", error))?;
    let read = smaps::parse(&String::from_utf8_lossy(&text));
    for vma in raw {
        let is_it = |flags: &&smaps::Flags| (flags.start, flags.end) == (vma.start, vma.end);
        if let Some(flags) = read.iter().find(is_it) {
            names.insert(vma.flags, flags.clone());
        }
    }
    Ok((read, has_policies))
}
