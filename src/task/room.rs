//! Whether there is room for the processes and threads that are to be made again.

use std::collections::BTreeMap;

use nix::unistd::Pid;

use crate::freeze::Stopped;
use crate::kernel::{pids_limit, procfs};
use crate::outcome::Refusal;

use super::check::Observed;
use super::lost::Lost;
use super::recorded::{Recorded, RecordedProcess};
use super::{About, Result};

/// Refuses if the container's process limit (`pids.max`) would be reached when those that are lost, and threads that have
/// ended, are made again. What was born since makes room.
pub fn check_room(
    stopped: &Stopped<'_>,
    recorded: &Recorded<'_>,
    lost: &Lost,
    observed: &Observed,
) -> Result<()> {
    if lost.is_empty() && observed.ended.is_empty() {
        return Ok(());
    }
    // By the text that names the cgroups, with a process that is there.
    let mut needed: BTreeMap<String, (Pid, u64)> = BTreeMap::new();
    let cgroups =
        |pid: Pid| std::fs::read_to_string(procfs::path(pid, "cgroup")).about(pid, "cgroup");
    let mut need = |home: Pid, count: u64| -> Result<()> {
        needed.entry(cgroups(home)?).or_insert((home, 0)).1 += count;
        Ok(())
    };
    for process in recorded
        .processes()
        .filter(|process| lost.contains(process.pid()))
    {
        if let Some(home) = home(recorded, lost, process) {
            need(home, process.threads.len().max(1) as u64)?;
        }
    }
    for (pid, _) in &observed.ended {
        need(*pid, 1)?;
    }
    for process in stopped.processes() {
        let goes = recorded.process(process.pid).is_none() || lost.contains(process.pid);
        // A process may end at any time, but not of those that are stopped.
        if goes
            && let Ok(text) = cgroups(process.pid)
            && let Some((_, count)) = needed.get_mut(&text)
        {
            *count = count.saturating_sub(process.threads.len().max(1) as u64);
        }
    }
    for (home, count) in needed.into_values() {
        let room = pids_limit::room(home).about(home, "cgroup")?;
        if let Some(room) = room.filter(|room| room.tasks < count) {
            return Err(Refusal {
                object: "its process limit".into(),
                holder: stopped
                    .process(home)
                    .map_or_else(String::new, |process| process.holder()),
                remedy: format!(
                    "processes and threads that have ended are to be made again, for which {count} more are needed, and {} leaves room for {}; raise it, then try again",
                    room.limit.display(),
                    room.tasks
                ),
            }
            .into());
        }
    }
    Ok(())
}

/// Of whom a lost process will have its cgroup: the first of its recorded ancestors that stays.
fn home(recorded: &Recorded<'_>, lost: &Lost, process: &RecordedProcess<'_>) -> Option<Pid> {
    let mut parent = recorded.process(process.parent())?;
    while lost.contains(parent.pid()) {
        parent = recorded.process(parent.parent())?;
    }
    Some(parent.pid())
}
