//! Ends what was born since the checkpoint.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use crate::freeze::{Batch, Stopped};
use crate::kernel::procfs;

use super::lost::Lost;
use super::recorded::Recorded;
use super::{About, Error, Result};

/// Kills the processes that are not recorded, and those that are lost; has their parents reap them and what other zombies
/// they got since; and makes threads that are not recorded exit. Returns how many processes and threads were ended that are
/// not recorded.
///
/// To be called before memory goes back: a thread that exits writes to it, and a parent that is told of a child's end
/// gets `SIGCHLD`, which [`restore`](super::restore) takes back.
pub fn kill_born(stopped: &mut Stopped<'_>, recorded: &Recorded<'_>, lost: &Lost) -> Result<usize> {
    let is_born = |pid: Pid| recorded.process(pid).is_none();
    let born: Vec<Pid> = stopped
        .processes()
        .map(|process| process.pid)
        .filter(|pid| is_born(*pid) || lost.contains(*pid))
        .collect();
    let (zombies, living): (Vec<Pid>, Vec<Pid>) = born.iter().partition(|pid| {
        stopped
            .process(**pid)
            .is_none_or(|process| process.is_zombie())
    });
    stopped.kill(&living)?;
    reap(stopped, recorded, lost, born.iter().copied().collect())?;
    for pid in zombies {
        stopped.remove(pid);
    }
    for pid in born.iter().filter(|pid| lost.contains(**pid)) {
        await_reaper(*pid)?;
    }
    let threads = end_threads(stopped, recorded)?;
    Ok(living.iter().filter(|pid| is_born(**pid)).count() + threads)
}

/// Has zombies reaped by those of their parents that belong to the tree. Others belong to a reaper outside.
fn reap(
    stopped: &mut Stopped<'_>,
    recorded: &Recorded<'_>,
    lost: &Lost,
    mut zombies: BTreeSet<Pid>,
) -> Result<()> {
    while let Some(pid) = zombies.pop_first() {
        // None: its parent ignores SIGCHLD, or its reaper was quick.
        let Ok(stat) = procfs::Stat::read(pid) else {
            continue;
        };
        let parent = stat.parent();
        if recorded
            .process(parent)
            .is_none_or(|parent| parent.is_zombie() || lost.contains(parent.pid()))
        {
            continue;
        }
        let Ok(status) = std::fs::read_to_string(procfs::path(pid, "status")) else {
            continue;
        };
        let Some(inside) = pid_as_seen_by(parent, &status)? else {
            continue;
        };
        let mut batch = Batch::new();
        let options = libc::__WALL | libc::WNOHANG;
        let wait = batch.call(
            libc::SYS_wait4,
            &[inside.into(), 0.into(), options.into(), 0.into()],
        );
        let done = stopped.run(parent, &batch)?;
        match done.result(wait) {
            Ok(reaped) if reaped == inside as u64 => {}
            Ok(_) => {
                return Err(Error::Freeze(crate::freeze::Error::Unexpected {
                    tid: pid,
                    event: "life after it was killed".into(),
                }));
            }
            Err(errno) => {
                return Err(Error::Call {
                    tid: parent,
                    what: "wait4",
                    errno,
                });
            }
        }
    }
    Ok(())
}

/// Waits until whoever has adopted a process that was killed has reaped it: its number is needed.
fn await_reaper(pid: Pid) -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let began = Instant::now();
    while procfs::path(pid, "stat").exists() {
        if began.elapsed() > PATIENCE {
            return Err(Error::Freeze(crate::freeze::Error::Unexpected {
                tid: pid,
                event: "its end, but nobody reaps it".into(),
            }));
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

/// The PID that `parent` knows the process with this `/proc/PID/status` by: it may live in a namespace further down.
fn pid_as_seen_by(parent: Pid, status: &str) -> Result<Option<i32>> {
    let parent_status =
        std::fs::read_to_string(procfs::path(parent, "status")).about(parent, "status")?;
    let level = procfs::namespace_pids(&parent_status).len();
    Ok(procfs::namespace_pids(status)
        .get(level.saturating_sub(1))
        .copied())
}

fn end_threads(stopped: &mut Stopped<'_>, recorded: &Recorded<'_>) -> Result<usize> {
    let mut born = Vec::new();
    for process in stopped.processes() {
        let Some(recorded) = recorded.process(process.pid) else {
            continue;
        };
        let tids = process.threads.iter().map(|thread| thread.tid);
        born.extend(
            tids.filter(|tid| !recorded.threads.contains_key(tid))
                .map(|tid| (process.pid, tid)),
        );
    }
    for (pid, tid) in &born {
        stopped.end_thread(*pid, *tid)?;
    }
    Ok(born.len())
}
