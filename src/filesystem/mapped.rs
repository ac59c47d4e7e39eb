//! Which files are mapped shared by running processes that see the mounts of a tree.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use nix::unistd::Pid;

use crate::kernel::{maps, procfs};

/// Device and inode of each, the device as `/proc/PID/maps` has it.
///
/// Only those of the same mount namespace are looked at. What can't be read has ended.
pub fn mapped(root: Pid) -> HashSet<(u64, u64)> {
    let namespace = |process: &Path| fs::read_link(process.join("ns/mnt")).ok();
    let Some(of_root) = namespace(&procfs::path(root, "")) else {
        return HashSet::new();
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = processes
        .map(|entry| entry.path())
        .filter(|path| namespace(path).as_ref() == Some(&of_root));
    let vmas = processes.filter_map(|path| maps::parse(&fs::read(path.join("maps")).ok()?));
    vmas.flatten()
        .filter(|vma| vma.shared && !vma.is_anonymous())
        .map(|vma| (vma.device, vma.inode))
        .collect()
}
