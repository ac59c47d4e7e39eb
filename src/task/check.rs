//! Observes the live state and refuses what can't be undone, before anything is touched.

use std::collections::{BTreeMap, BTreeSet};

use nix::unistd::{Pid, getpgid, getsid};

use crate::freeze::{Arg, Batch, Stopped};
use crate::kernel::namespaces::{Inodes, KINDS};
use crate::kernel::procfs;
use crate::outcome::Refusal;

use super::layout::{LIMITS, Rights, ThreadState};
use super::lost::Lost;
use super::posix_timers;
use super::probe::{self, Leader, ProcessProbe};
use super::recorded::{Recorded, RecordedProcess};
use super::revive::check_ended;
use super::{About, Error, Result, capture};

/// The live state of the recorded processes and threads before a rollback, for [`restore`](super::restore) to compare.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    pub(super) processes: BTreeMap<Pid, ProcessProbe>,
    pub(super) threads: BTreeMap<Pid, ThreadState>,
    /// Threads that have ended, with their processes.
    pub(super) ended: Vec<(Pid, Pid)>,
}

/// Observes the recorded processes but those that are `lost` already. Returns what was found, and which of them have changed
/// what can't be undone where they are, with the refusal if they can't be made again: credentials, filters, parents,
/// sessions, lowered hard limits, a working directory that is gone.
///
/// Nothing is changed. `leaders` are the answers of the recorded processes' leaders to [`Questions`](probe::Questions);
/// [`prepare`](super::prepare) must have been called.
///
/// A process is known by its pidfd; a thread by its TID within the process: should one have ended and another have got
/// its TID, that other becomes the recorded one, since nothing that distinguishes them is kept. Credentials that
/// `capget(2)` and its like tell are compared for every thread; the bounding and ambient sets and the number of seccomp
/// filters for main threads only.
pub fn check(
    stopped: &mut Stopped<'_>,
    recorded: &Recorded<'_>,
    lost: &Lost,
    mut leaders: BTreeMap<Pid, Leader>,
) -> Result<(Observed, Vec<(Pid, Refusal)>)> {
    let mut observed = Observed::default();
    let mut changed = Vec::new();
    let staying = |process: &&RecordedProcess<'_>| !lost.contains(process.pid());
    for process in recorded.processes().filter(staying) {
        if process.is_zombie() {
            continue;
        }
        let gone = crate::freeze::Error::Gone(process.pid());
        let leader = leaders.remove(&process.pid()).ok_or(gone)?;
        match check_process(stopped, recorded, process, leader, &mut observed) {
            Ok(()) => {}
            Err(Error::Refused(refusal)) => changed.push((process.pid(), refusal)),
            Err(error) => return Err(error),
        }
    }
    Ok((observed, changed))
}

fn check_process(
    stopped: &mut Stopped<'_>,
    recorded: &Recorded<'_>,
    process: &RecordedProcess<'_>,
    leader: Leader,
    observed: &mut Observed,
) -> Result<()> {
    check_family(stopped, recorded, process)?;
    check_rights(stopped, process)?;
    observe(stopped, process, leader, observed)?;
    check_timers(stopped, process)
}

/// A refusal about a recorded process that is still there.
pub(super) fn refuse(
    process: &RecordedProcess<'_>,
    object: impl Into<String>,
    remedy: String,
) -> Refusal {
    Refusal {
        object: object.into(),
        holder: holder(process),
        remedy,
    }
}

/// As messages name it: `pid 12 (redis-server)`. The name is the recorded one, since it may be gone.
pub(super) fn holder(process: &RecordedProcess<'_>) -> String {
    let name = process
        .threads
        .get(&process.pid())
        .map_or_else(String::new, |leader| comm(&leader.record.state.comm));
    format!("pid {} ({name})", process.pid())
}

/// A command name as text.
pub(super) fn comm(bytes: &[u8]) -> String {
    let end = bytes
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

pub(super) const TAKE_ANOTHER: &str = "it can't be brought back; take a new checkpoint";

/// Refuses if a recorded process is not there any more.
pub(super) fn check_is_there(stopped: &Stopped<'_>, recorded: &RecordedProcess<'_>) -> Result<()> {
    let pid = recorded.pid();
    let gone = |what: &str| {
        let remedy = format!("it has {what} since the checkpoint; {TAKE_ANOTHER}");
        Err(refuse(recorded, "the process", remedy).into())
    };
    let identity = &recorded.identity;
    let Some(live) = stopped.process(pid) else {
        return gone(if recorded.is_zombie() {
            "been reaped"
        } else {
            "exited"
        });
    };
    if recorded.is_zombie() {
        let same =
            procfs::Stat::read(pid).is_ok_and(|stat| stat.start_time() == identity.start_time);
        return if same && live.is_zombie() {
            Ok(())
        } else {
            gone("been reaped")
        };
    }
    if live.is_zombie() || !capture::is_alive(stopped, pid) {
        return gone("exited");
    }
    let same = if identity.pidfd_inode != 0 {
        capture::pidfd_inode(stopped, pid)? == identity.pidfd_inode
    } else {
        procfs::Stat::read(pid).about(pid, "stat")?.start_time() == identity.start_time
    };
    if !same {
        return gone("exited");
    }
    Ok(())
}

fn check_family(
    stopped: &Stopped<'_>,
    recorded: &Recorded<'_>,
    process: &RecordedProcess<'_>,
) -> Result<()> {
    let pid = process.pid();
    let identity = &process.identity;
    let changed = |object: &str, from: i32, to: i32| {
        let remedy = format!("it was {from} at the checkpoint and is {to} now; {TAKE_ANOTHER}");
        Err(refuse(process, object, remedy).into())
    };
    // A parent outside of the tree may come and go.
    let parent = Pid::from_raw(identity.parent);
    let now = stopped.process(pid).map_or(parent, |live| live.parent);
    if now != parent && recorded.process(parent).is_some() {
        return changed("its parent", identity.parent, now.as_raw());
    }
    let group = getpgid(Some(pid)).about(pid, "process group")?;
    if group.as_raw() != identity.group {
        return changed("its process group", identity.group, group.as_raw());
    }
    let stop = stopped.process(pid).and_then(|live| live.job_control_stop);
    if stop.unwrap_or(0) != identity.job_control_stop {
        let words = |signal| match signal {
            0 => "was running".to_owned(),
            signal => format!("was stopped by signal {signal}"),
        };
        let remedy = format!(
            "it {} at the checkpoint and {} now; stop it or let it go on (kill -STOP, kill -CONT), then try again",
            words(identity.job_control_stop),
            words(stop.unwrap_or(0)).replace("was", "is"),
        );
        return Err(refuse(process, "job control", remedy).into());
    }
    let session = getsid(Some(pid)).about(pid, "session")?;
    if session.as_raw() != identity.session {
        return changed("its session", identity.session, session.as_raw());
    }
    Ok(())
}

fn check_rights(stopped: &Stopped<'_>, process: &RecordedProcess<'_>) -> Result<()> {
    let now = capture::rights(stopped, process.pid())?;
    if now == process.rights {
        return Ok(());
    }
    let (was, is) = process
        .rights
        .lines()
        .zip(now.lines())
        .find(|(was, is)| was != is)
        .unwrap_or((process.rights, &now));
    let remedy = format!("they were `{was}` at the checkpoint and are `{is}` now; {TAKE_ANOTHER}");
    Err(refuse(process, "its credentials", remedy.replace('\t', " ")).into())
}

fn observe(
    stopped: &mut Stopped<'_>,
    process: &RecordedProcess<'_>,
    (live, leader): Leader,
    observed: &mut Observed,
) -> Result<()> {
    let pid = process.pid();
    check_state(process, &live)?;
    check_directory(stopped, process, &live)?;
    observed.processes.insert(pid, live);
    let live: BTreeSet<Pid> = stopped
        .process(pid)
        .into_iter()
        .flat_map(|process| &process.threads)
        .map(|thread| thread.tid)
        .collect();
    for (tid, thread) in &process.threads {
        if !live.contains(tid) {
            check_ended(stopped, process, thread, &leader)?;
            observed.ended.push((pid, *tid));
            continue;
        }
        let state = if *tid == pid {
            leader
        } else {
            probe::thread(stopped, pid, *tid)?
        };
        check_thread_rights(process, *tid, &thread.record.state.rights, &state.rights)?;
        check_scheduling(process, *tid, &thread.record.state, &state)?;
        let was = &thread.record.namespaces;
        if *was != Inodes::default() {
            let is = capture::namespaces_of(stopped, pid, *tid)?;
            check_namespaces(process, *tid, was, &is)?;
        }
        observed.threads.insert(*tid, state);
    }
    Ok(())
}

pub(super) fn check_thread_rights(
    process: &RecordedProcess<'_>,
    tid: Pid,
    was: &Rights,
    is: &Rights,
) -> Result<()> {
    if was == is {
        return Ok(());
    }
    let remedy = format!("they were {was:?} at the checkpoint and are {is:?} now; {TAKE_ANOTHER}");
    Err(refuse(process, format!("thread {tid}: its credentials"), remedy).into())
}

/// A nice value can be lowered, and a policy raised, with the privilege for it only.
pub(super) fn check_scheduling(
    process: &RecordedProcess<'_>,
    tid: Pid,
    was: &ThreadState,
    is: &ThreadState,
) -> Result<()> {
    const CAP_SYS_NICE: u64 = 1 << 23;
    if was.scheduling == is.scheduling {
        return Ok(());
    }
    let own = std::fs::read_to_string("/proc/self/status").about(Pid::this(), "status")?;
    let capabilities = procfs::status_line(&own, "CapEff")
        .and_then(|set| u64::from_str_radix(set, 16).ok())
        .unwrap_or(0);
    if capabilities & CAP_SYS_NICE != 0 {
        return Ok(());
    }
    let object = format!("thread {tid}: its scheduling");
    let remedy = "it was changed since the checkpoint; run snapback with CAP_SYS_NICE, without which it can't be changed back";
    Err(refuse(process, object, remedy.into()).into())
}

fn check_namespaces(
    process: &RecordedProcess<'_>,
    tid: Pid,
    was: &Inodes,
    is: &Inodes,
) -> Result<()> {
    let Some((name, _)) = KINDS
        .iter()
        .zip(was.iter().zip(is))
        .find(|(_, (was, is))| was != is)
    else {
        return Ok(());
    };
    let object = format!("thread {tid}: its {name} namespace");
    let remedy = format!("it has left the one it was in at the checkpoint; {TAKE_ANOTHER}");
    Err(refuse(process, object, remedy).into())
}

fn check_state(process: &RecordedProcess<'_>, live: &ProcessProbe) -> Result<()> {
    let was = &process.record.state;
    for limit in 0..LIMITS {
        let ([_, was], [_, is]) = (was.limits[limit], live.state.limits[limit]);
        if is < was {
            let remedy = format!(
                "it was lowered from {was} to {is} since the checkpoint, and only CAP_SYS_RESOURCE raises it; {TAKE_ANOTHER}"
            );
            return Err(refuse(process, format!("hard limit {limit}"), remedy).into());
        }
    }
    if was.root != live.state.root {
        let remedy = format!("it has called chroot since the checkpoint; {TAKE_ANOTHER}");
        return Err(refuse(process, "its root directory", remedy).into());
    }
    if was.dumpable != live.state.dumpable && was.dumpable > 1 {
        let remedy = format!(
            "its dumpable attribute was {} and is {}, and only exec sets it so; {TAKE_ANOTHER}",
            was.dumpable, live.state.dumpable
        );
        return Err(refuse(process, "the process", remedy).into());
    }
    Ok(())
}

/// If it has moved, whether the way back leads to the same directory.
fn check_directory(
    stopped: &mut Stopped<'_>,
    process: &RecordedProcess<'_>,
    live: &ProcessProbe,
) -> Result<()> {
    let was = process.record.state.directory;
    if live.state.directory == was {
        return Ok(());
    }
    let no_way_back = |why: &str| {
        let path = String::from_utf8_lossy(process.directory);
        let remedy = format!("`{path}` of the checkpoint {why}; {TAKE_ANOTHER}");
        Err(refuse(process, "its working directory", remedy).into())
    };
    if process.directory.is_empty() {
        return no_way_back("was deleted already");
    }
    let mut batch = Batch::new();
    let path = path_input(&mut batch, process.directory);
    let (out, stat) = probe::stat(&mut batch, path);
    let at = Arg::from(libc::AT_FDCWD);
    let access = batch.call(libc::SYS_faccessat, &[at, path, libc::X_OK.into()]);
    let done = stopped.run(process.pid(), &batch)?;
    if done.result(stat).is_err() || done.result(access).is_err() {
        return no_way_back("is gone or can't be entered any more");
    }
    if probe::device_and_inode(done.bytes(&out)) != was {
        return no_way_back("is another directory now");
    }
    Ok(())
}

/// Places a path, with its final NUL, in a batch.
pub(super) fn path_input(batch: &mut Batch, path: &[u8]) -> Arg {
    batch.input(&[path, b"\0"].concat())
}

/// Whether timers that are gone can be made again.
fn check_timers(stopped: &mut Stopped<'_>, process: &RecordedProcess<'_>) -> Result<()> {
    if process.posix_timers.is_empty() {
        return Ok(());
    }
    let pid = process.pid();
    let live = posix_timers::list(pid)?;
    let gone = |timer: &&posix_timers::PosixTimer| !live.iter().any(|there| there.is_same(timer));
    let Some(first) = process.posix_timers.iter().find(gone) else {
        return Ok(());
    };
    let object = format!("POSIX timer {}", first.id);
    if !posix_timers::can_be_made_again(stopped, pid)? {
        let remedy = "it was deleted since the checkpoint, and this kernel can't make one with a given number (Linux 6.15 can); take a new checkpoint";
        return Err(refuse(process, object, remedy.into()).into());
    }
    let of_a_thread = |timer: &posix_timers::PosixTimer| timer.is_of_a_thread();
    if process.threads.len() > 1
        && let Some(timer) = process
            .posix_timers
            .iter()
            .filter(gone)
            .find(|timer| of_a_thread(timer))
    {
        let object = format!("POSIX timer {}", timer.id);
        let remedy = format!(
            "it was deleted since the checkpoint; it was of one thread's processor time, and the kernel does not tell of which; {TAKE_ANOTHER}"
        );
        return Err(refuse(process, object, remedy).into());
    }
    Ok(())
}
