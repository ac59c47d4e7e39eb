//! Observes the live state and refuses what can't be undone, before anything is touched.

use std::collections::{BTreeMap, BTreeSet};

use nix::unistd::Pid;

use crate::freeze::{Arg, Batch, Stopped};
use crate::kernel::namespaces::{Inodes, KINDS};
use crate::kernel::procfs::{self, Stat};
use crate::outcome::Refusal;

use super::layout::{LIMITS, Rights, ThreadState};
use super::lost::Lost;
use super::posix_timers;
use super::probe::{self, Leader, ProcessProbe};
use super::recorded::{Recorded, RecordedProcess};
use super::revive::check_ended;
use super::settings::{CGROUP, LOGIN_USER, Settings};
use super::{About, Error, Result, ask, capture};

/// The live state of the recorded processes and threads before a rollback, for [`restore`](super::restore) to compare.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    pub(super) processes: BTreeMap<Pid, ProcessProbe>,
    pub(super) threads: BTreeMap<Pid, ThreadState>,
    /// Threads that have ended, with their processes.
    pub(super) ended: Vec<(Pid, Pid)>,
    /// Threads that were made again.
    pub(super) revived: BTreeSet<Pid>,
}

/// Observes the recorded processes but those that are `lost` already. Returns what was found, and which of them have changed
/// what can't be undone where they are, with the refusal if they can't be made again: credentials, filters, parents,
/// sessions, lowered hard limits, a working directory that is gone.
///
/// Nothing is changed. `leaders` are the answers of the recorded processes' leaders to [`Questions`](probe::Questions),
/// `seen` is what [`check_from_outside`] has returned; [`prepare`](super::prepare) must have been called.
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
    seen: &BTreeMap<Pid, Settings>,
) -> Result<(Observed, Changed)> {
    let mut observed = Observed::default();
    let mut changed = Changed::new();
    for process in staying(recorded, lost) {
        let gone = || crate::freeze::Error::Gone(process.pid());
        let mut leader = leaders.remove(&process.pid()).ok_or_else(gone)?;
        leader.0.settings = *seen.get(&process.pid()).ok_or_else(gone)?;
        let checked = check_process(stopped, process, leader, &mut observed);
        note(checked, process, &mut changed)?;
    }
    Ok((observed, changed))
}

fn check_process(
    stopped: &mut Stopped<'_>,
    process: &RecordedProcess<'_>,
    leader: Leader,
    observed: &mut Observed,
) -> Result<()> {
    observe(stopped, process, leader, observed)?;
    check_timers(stopped, process, &observed.ended)
}

/// Looks for what can't be undone in a process where it is, as far as that can be seen while batches run in the tree: other
/// parents, groups and sessions, changed credentials, filters and cgroups. Returns what else can be seen then, for
/// [`check`], and as that does which processes have changed.
pub fn check_from_outside(
    stopped: &Stopped<'_>,
    recorded: &Recorded<'_>,
    lost: &Lost,
) -> Result<(BTreeMap<Pid, Settings>, Changed)> {
    let mut seen = BTreeMap::new();
    let mut changed = Changed::new();
    for process in staying(recorded, lost) {
        let looked = look_from_outside(stopped, recorded, process);
        if let Some(settings) = note(looked, process, &mut changed)? {
            seen.insert(process.pid(), settings);
        }
    }
    Ok((seen, changed))
}

fn look_from_outside(
    stopped: &Stopped<'_>,
    recorded: &Recorded<'_>,
    process: &RecordedProcess<'_>,
) -> Result<Settings> {
    let stat = check_family(stopped, recorded, process)?;
    check_rights(stopped, process)?;
    let settings = Settings::read(stopped, process.pid(), &stat)?;
    check_settings(stopped, process, &settings)?;
    Ok(settings)
}

/// Processes that have changed what can't be undone where they are, each with the refusal if it can't be made again.
pub type Changed = Vec<(Pid, Refusal)>;

/// The recorded processes that are there, but zombies.
fn staying<'r, 'c>(
    recorded: &'r Recorded<'c>,
    lost: &'r Lost,
) -> impl Iterator<Item = &'r RecordedProcess<'c>> {
    let processes = recorded.processes();
    processes.filter(|process| !process.is_zombie() && !lost.contains(process.pid()))
}

/// Notes a refusal about a process.
fn note<T>(
    result: Result<T>,
    process: &RecordedProcess<'_>,
    changed: &mut Changed,
) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Error::Refused(refusal)) => {
            changed.push((process.pid(), refusal));
            Ok(None)
        }
        Err(error) => Err(error),
    }
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
    format!("pid {} ({})", process.pid(), process.comm())
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
) -> Result<Stat> {
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
    let stat = Stat::read_held(&stopped.member(pid)?.stat).about(pid, "stat")?;
    let group = stat.field(5) as i32;
    if group != identity.group {
        return changed("its process group", identity.group, group);
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
    let session = stat.session().as_raw();
    if session != identity.session {
        return changed("its session", identity.session, session);
    }
    Ok(stat)
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
    if let (Some(was), Some(is)) = (was.strip_prefix(CGROUP), is.strip_prefix(CGROUP)) {
        let remedy = format!(
            "it was in `{was}` at the checkpoint and is in `{is}` now; move it back (write {} to its cgroup.procs), then try again",
            process.pid()
        );
        return Err(refuse(process, "its cgroup", remedy).into());
    }
    let object = match was.starts_with(LOGIN_USER) {
        true => "its login user id",
        false => "its credentials",
    };
    let remedy = format!("they were `{was}` at the checkpoint and are `{is}` now; {TAKE_ANOTHER}");
    Err(refuse(process, object, remedy.replace('\t', " ")).into())
}

fn check_settings(
    stopped: &Stopped<'_>,
    process: &RecordedProcess<'_>,
    live: &Settings,
) -> Result<()> {
    let was = &process.record.settings;
    if was.check_score(stopped, process.pid(), live)? {
        return Ok(());
    }
    let remedy = format!(
        "it was raised from {} to {} since the checkpoint, and only CAP_SYS_RESOURCE lowers it so far; {TAKE_ANOTHER}",
        was.oom_score, live.oom_score
    );
    Err(refuse(process, "its oom_score_adj", remedy).into())
}

fn observe(
    stopped: &mut Stopped<'_>,
    process: &RecordedProcess<'_>,
    (live, mut leader): Leader,
    observed: &mut Observed,
) -> Result<()> {
    let pid = process.pid();
    let known = process
        .threads
        .get(&pid)
        .map_or(0, |thread| thread.record.state.rights.filters);
    leader.rights.filters = ask::filters(pid, pid, &leader.rights, known)?;
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
            let mut state = probe::thread(stopped, pid, *tid)?;
            let known = thread.record.state.rights.filters;
            state.rights.filters = ask::filters(pid, *tid, &state.rights, known)?;
            state
        };
        check_thread_rights(process, *tid, &thread.record.state.rights, &state.rights)?;
        check_speculation(process, *tid, &thread.record.state, &state)?;
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
    let (what, was, is) = was.difference(is).unwrap_or_default();
    let remedy =
        format!("its {what} were {was} at the checkpoint and are {is} now; {TAKE_ANOTHER}");
    Err(refuse(process, format!("thread {tid}: its credentials"), remedy).into())
}

/// Speculation that was switched off for good stays off.
fn check_speculation(
    process: &RecordedProcess<'_>,
    tid: Pid,
    was: &ThreadState,
    is: &ThreadState,
) -> Result<()> {
    let for_good = |state: u64| state & u64::from(libc::PR_SPEC_FORCE_DISABLE) != 0;
    let mut pairs = was.speculation.iter().zip(&is.speculation);
    if !pairs.any(|(was, is)| for_good(*is) && !for_good(*was)) {
        return Ok(());
    }
    let object = format!("thread {tid}: its speculation control");
    let remedy =
        format!("it has switched speculation off for good since the checkpoint; {TAKE_ANOTHER}");
    Err(refuse(process, object, remedy).into())
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
    if was.denies_write_execute != live.state.denies_write_execute {
        let remedy = format!("PR_SET_MDWE was called since the checkpoint; {TAKE_ANOTHER}");
        return Err(refuse(process, "what its memory may become", remedy).into());
    }
    if was.local_descriptors != live.state.local_descriptors {
        let remedy = format!("modify_ldt was called since the checkpoint; {TAKE_ANOTHER}");
        return Err(refuse(process, "its local descriptor table", remedy).into());
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

/// Whether timers that are gone, or were for a thread that has ended, can be made again.
fn check_timers(
    stopped: &mut Stopped<'_>,
    process: &RecordedProcess<'_>,
    ended: &[(Pid, Pid)],
) -> Result<()> {
    if process.posix_timers.is_empty() {
        return Ok(());
    }
    let pid = process.pid();
    let live = posix_timers::list(pid)?;
    let of_ended = |timer: &posix_timers::PosixTimer| {
        ended.iter().any(|(_, tid)| timer.notifies(tid.as_raw()))
    };
    let gone = |timer: &&posix_timers::PosixTimer| {
        of_ended(timer) || !live.iter().any(|there| there.is_same(timer))
    };
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
