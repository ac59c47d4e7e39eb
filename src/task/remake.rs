//! Processes that are made again, from a copy of their parent to what the rest of a rollback restores like any other.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::unistd::{Pid, getpgid};
use zerocopy::IntoBytes;

use crate::freeze::{Error, InCopy, Stopped};
use crate::kernel::{procfs, ptrace};

use super::check::Observed;
use super::layout::{Identity, LIMITS};
use super::recorded::{Recorded, RecordedProcess};
use super::settings::Settings;
use super::steps::{RSEQ_UNREGISTER, Steps};
use super::{About, Result, capture, lost, probe, rights};

/// Has a recorded process that is not there made again: by its parent, or by its shadow if that is not of the tree. Returns
/// what names it now; it has no window yet, and none of the numbers in `avoid` if it could not have its own.
pub fn make(
    stopped: &mut Stopped<'_>,
    recorded: &Recorded<'_>,
    pid: Pid,
    shadow: Option<Pid>,
    avoid: &BTreeSet<Pid>,
) -> Result<Identity> {
    let process = recorded.process(pid).ok_or(Error::Gone(pid))?;
    let Identity {
        namespace_pid,
        exit_signal,
        ..
    } = process.identity;
    let parent = process.parent();
    let is = match recorded.process(parent) {
        Some(_) => stopped.make_process(parent, pid, namespace_pid, exit_signal, avoid)?,
        None => {
            stopped.make_from_shadow(shadow.ok_or(Error::Gone(pid))?, pid, namespace_pid, avoid)?
        }
    };
    capture::identify(stopped, is)
}

/// Makes a process that was made again ready to be changed: it has no descriptors, which are its parent's, no rseq area,
/// which would be written to wherever it is, limits that do not stand in the way; and it leads its session if it did.
pub fn clear(stopped: &mut Stopped<'_>, recorded: &Recorded<'_>, pid: Pid) -> Result<()> {
    let process = recorded.process(pid).ok_or(Error::Gone(pid))?;
    let maker = recorded.begins_as(process).ok_or(Error::Gone(pid))?;
    let mut steps = Steps::new(pid);
    let all = [0.into(), u32::MAX.into(), 0.into()];
    steps.call("close_range", libc::SYS_close_range, &all);
    let rseq = ptrace::rseq(pid).about(pid, "rseq configuration")?;
    if rseq.address != 0 {
        steps.rseq(rseq.address, rseq.size, RSEQ_UNREGISTER, rseq.signature);
    }
    let limits = process.record.state.limits.iter();
    for (limit, ([was, _], [is, hard])) in limits.zip(&maker.record.state.limits).enumerate() {
        debug_assert!(limit < LIMITS);
        // Descriptors may have had numbers that the limit does not allow any more.
        let is_of_files = limit == libc::RLIMIT_NOFILE as usize && is < hard;
        if is < was || is_of_files {
            let soft = if is_of_files { *hard } else { *was };
            let value = steps.batch.input([soft, *hard].as_bytes());
            let arguments = [0.into(), limit.into(), value, 0.into()];
            steps.call("prlimit64", libc::SYS_prlimit64, &arguments);
        }
    }
    if process.identity.session == process.identity.pid {
        steps.call("setsid", libc::SYS_setsid, &[]);
    }
    steps.run(stopped, pid)
}

/// Gives a process that was made again the working directory and `oom_score_adj` that `like` has, and has it give up what
/// credentials it did not have; observes it, and which of its threads are to be made.
pub fn settle_in(
    stopped: &mut Stopped<'_>,
    recorded: &Recorded<'_>,
    pid: Pid,
    like: Pid,
    observed: &mut Observed,
) -> Result<()> {
    let process = recorded.process(pid).ok_or(Error::Gone(pid))?;
    let maker = recorded.begins_as(process).ok_or(Error::Gone(pid))?;
    if process.record.state.directory != maker.record.state.directory {
        let directory = File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(procfs::path(like, "cwd"))
            .about(like, "working directory")?;
        enter(stopped, pid, &directory)?;
    }
    rights::give_up(stopped, pid, process, maker.rights)?;
    let (mut live, leader) = probe::process(stopped, pid)?;
    let stat = procfs::Stat::read_held(&stopped.member(pid)?.stat).about(pid, "stat")?;
    live.settings = Settings::read(stopped, pid, &stat)?;
    observed.processes.insert(pid, live);
    observed.threads.insert(pid, leader);
    let others = process.threads.keys().filter(|tid| **tid != pid);
    observed.ended.extend(others.map(|tid| (pid, *tid)));
    Ok(())
}

/// Makes a directory a process's working directory.
fn enter(stopped: &mut Stopped<'_>, pid: Pid, directory: &File) -> Result<()> {
    let number = stopped.pass_descriptor(pid, directory.as_fd())?;
    let mut steps = Steps::new(pid);
    steps.call("fchdir", libc::SYS_fchdir, &[number.into()]);
    steps.call("close", libc::SYS_close, &[number.into()]);
    steps.run(stopped, pid)
}

/// Gives a process that was made of its record alone its working directory, and has it give up what credentials it did not
/// have.
pub fn settle_anew(
    stopped: &mut Stopped<'_>,
    recorded: &Recorded<'_>,
    pid: Pid,
    directory: &File,
) -> Result<()> {
    let process = recorded.process(pid).ok_or(Error::Gone(pid))?;
    enter(stopped, pid, directory)?;
    let has = capture::rights(stopped, pid)?;
    rights::give_up(stopped, pid, process, &has)
}

/// How a recorded zombie had ended, of the ways in which one can be made to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ending {
    /// By itself, with this status.
    Exit(u64),
    /// By `SIGKILL`. A signal that can be handled might be.
    Killed,
}

impl Ending {
    pub(super) fn of(process: &RecordedProcess<'_>) -> Option<Self> {
        let status = process.identity.wait_status;
        if libc::WIFEXITED(status) {
            return Some(Self::Exit(libc::WEXITSTATUS(status) as u64));
        }
        (status == libc::SIGKILL).then_some(Self::Killed)
    }
}

/// Ends a process that was made again as the recorded one had ended, once it is in its session and process group; its parent
/// has yet to be told of it. It has no window.
pub fn end(stopped: &mut Stopped<'_>, recorded: &Recorded<'_>, pid: Pid) -> Result<()> {
    let process = recorded.process(pid).ok_or(Error::Gone(pid))?;
    let (group, parent) = (Pid::from_raw(process.identity.group), process.parent());
    let mut calls = Vec::new();
    if process.identity.session == process.identity.pid {
        calls.push((libc::SYS_setsid, [0; 3]));
    } else if getpgid(Some(pid)).about(pid, "process group")? != group {
        let inside = group_inside(recorded, pid, group)?;
        calls.push((libc::SYS_setpgid, [0, inside as u64, 0]));
    }
    let ending = Ending::of(process).ok_or(Error::Gone(pid))?;
    if let Ending::Exit(status) = ending {
        calls.push((libc::SYS_exit_group, [status, 0, 0]));
    }
    if !calls.is_empty() {
        let made = stopped.start_in_copy(parent, pid, &calls);
        match (made.and_then(InCopy::finish), ending) {
            (Ok(_), Ending::Killed) | (Err(Error::Gone(_)), Ending::Exit(_)) => {}
            (Err(error), _) => return Err(error.into()),
            (Ok(_), Ending::Exit(_)) => return Err(Error::Gone(pid).into()),
        }
    }
    stopped.note_end(pid)?;
    let status = procfs::Stat::read(pid).about(pid, "stat")?;
    // A parent that ignores SIGCHLD leaves none.
    match status.state {
        'Z' => Ok(()),
        _ => Err(Error::Gone(pid).into()),
    }
}

/// Puts processes that were made again into their process groups; all of them are there.
pub fn join_groups(stopped: &mut Stopped<'_>, recorded: &Recorded<'_>, made: &[Pid]) -> Result<()> {
    let (leaders, members): (Vec<&RecordedProcess<'_>>, Vec<_>) = made
        .iter()
        .filter_map(|pid| recorded.process(*pid))
        .partition(|process| process.identity.group == process.identity.pid);
    for process in leaders.into_iter().chain(members) {
        let (pid, group) = (process.pid(), Pid::from_raw(process.identity.group));
        if getpgid(Some(pid)).about(pid, "process group")? == group {
            continue;
        }
        let inside = group_inside(recorded, pid, group)?;
        let mut steps = Steps::new(pid);
        steps.call("setpgid", libc::SYS_setpgid, &[0.into(), inside.into()]);
        steps.run(stopped, pid)?;
    }
    Ok(())
}

/// The number that a process group has in the PID namespace of a process that is to join it.
fn group_inside(recorded: &Recorded<'_>, pid: Pid, group: Pid) -> Result<i32> {
    if let Some(leader) = recorded.process(group) {
        return Ok(leader.identity.namespace_pid);
    }
    let namespace = |pid| std::fs::read_link(procfs::path(pid, "ns/pid")).ok();
    let lives_in = namespace(pid);
    let mut members = lost::members(group);
    let member = members.find(|(member, _)| namespace(*member) == lives_in);
    let (member, _) = member.ok_or(Error::Gone(group))?;
    let status = std::fs::read_to_string(procfs::path(member, "status")).about(member, "status")?;
    let numbers = procfs::status_line(&status, "NSpgid").unwrap_or_default();
    let inside = numbers.split_ascii_whitespace().last();
    Ok(inside
        .and_then(|word| word.parse().ok())
        .ok_or(Error::Gone(group))?)
}
