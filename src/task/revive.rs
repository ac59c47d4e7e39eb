//! Threads that have ended since the checkpoint.

use nix::unistd::Pid;

use crate::freeze::Stopped;
use crate::kernel::procfs;
use crate::outcome::Refusal;

use super::Result;
use super::check::{Observed, TAKE_ANOTHER, check_thread_rights, refuse};
use super::layout::ThreadState;
use super::lost::numbers;
use super::probe;
use super::recorded::{Recorded, RecordedProcess, RecordedThread};

/// Whether a thread that has ended can be made again: with the credentials and filters that the leader has now, under its
/// number.
pub(super) fn check_ended(
    stopped: &Stopped<'_>,
    process: &RecordedProcess<'_>,
    thread: &RecordedThread<'_>,
    leader: &ThreadState,
) -> Result<()> {
    let tid = thread.tid();
    if tid == process.pid() {
        let remedy = format!("it has ended while others run; {TAKE_ANOTHER}");
        return Err(refuse(process, "its main thread", remedy).into());
    }
    check_thread_rights(process, tid, &thread.record.state.rights, &leader.rights)?;
    // In a PID namespace of its own its number is free, as what was born since is ended before.
    let is_ours = thread.record.state.namespace_tid as i32 == tid.as_raw();
    if let Some(other) = taken_by(stopped, tid).filter(|_| is_ours) {
        return Err(Refusal {
            object: format!("thread {tid}"),
            holder: super::check::holder(process),
            remedy: format!(
                "it has ended since the checkpoint, and {other} has its number now; try again when that has ended"
            ),
        }
        .into());
    }
    Ok(())
}

/// Who has a number outside of the tree; what has it inside was born since, and is ended before.
pub(super) fn taken_by(stopped: &Stopped<'_>, tid: Pid) -> Option<String> {
    let status = std::fs::read_to_string(procfs::path(tid, "status")).ok()?;
    let pid = procfs::status_line(&status, "Tgid")?.parse().ok()?;
    let pid = Pid::from_raw(pid);
    stopped
        .process(pid)
        .is_none()
        .then(|| format!("pid {pid} ({})", procfs::comm(pid)))
}

/// Makes the threads again that have ended, to be restored like the others. Returns their
/// processes, and their TIDs in our namespace as they were and as they are now.
pub fn revive(
    stopped: &mut Stopped<'_>,
    recorded: &Recorded<'_>,
    observed: &mut Observed,
) -> Result<Vec<(Pid, Pid, Pid)>> {
    let mut revived = Vec::with_capacity(observed.ended.len());
    if observed.ended.is_empty() {
        return Ok(revived);
    }
    let mut numbers = numbers(recorded);
    for (pid, was) in std::mem::take(&mut observed.ended) {
        let thread = recorded
            .process(pid)
            .and_then(|process| process.threads.get(&was));
        let Some(thread) = thread else { continue };
        let inside = thread.record.state.namespace_tid as i32;
        let tid = stopped.make_thread(pid, was, inside, &numbers)?;
        numbers.insert(tid);
        let state = probe::thread(stopped, pid, tid)?;
        observed.threads.insert(tid, state);
        observed.revived.insert(tid);
        revived.push((pid, was, tid));
    }
    Ok(revived)
}
