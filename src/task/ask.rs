//! Asks every thread of a stopped tree for what only itself or its tracer can be told.

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::freeze::{Stopped, refuse};
use crate::kernel::procfs;
use crate::kernel::ptrace::{self, Queue, Registers, RseqConfiguration, SignalInfo};

use super::layout::{Rights, ThreadState, TimerValue};
use super::posix_timers::PosixTimer;
use super::probe::ProcessProbe;
use super::{About, Result, pending, posix_timers, probe};

/// Room for the extended state of any processor so far: AMX has 11 KiB.
pub(super) const XSTATE_ROOM: usize = 16 << 10;

/// What the processes and threads of a stopped tree have told of themselves.
#[derive(Debug)]
pub struct Asked(pub(super) Vec<AskedProcess>);

#[derive(Debug)]
pub(super) struct AskedProcess {
    pub(super) pid: Pid,
    /// `None`: it is a zombie.
    pub(super) told: Option<Told>,
}

#[derive(Debug)]
pub(super) struct Told {
    pub(super) observed: ProcessProbe,
    pub(super) timers: Vec<PosixTimer>,
    pub(super) pending: Vec<SignalInfo>,
    pub(super) threads: Vec<AskedThread>,
}

#[derive(Debug)]
pub(super) struct AskedThread {
    pub(super) tid: Pid,
    pub(super) state: ThreadState,
    pub(super) registers: Registers,
    /// The number of the call that it is in.
    pub(super) number: u64,
    pub(super) signal_mask: u64,
    pub(super) rseq: RseqConfiguration,
    pub(super) xstate: Vec<u8>,
    pub(super) pending: Vec<SignalInfo>,
}

/// Asks every process and thread of a stopped tree. Every process but zombies needs a window, and [`prepare`] must
/// have been called.
///
/// [`prepare`]: super::prepare
pub fn ask(stopped: &mut Stopped<'_>) -> Result<Asked> {
    let processes: Vec<(Pid, bool)> = stopped
        .processes()
        .map(|process| (process.pid, process.is_zombie()))
        .collect();
    let mut asked = Vec::with_capacity(processes.len());
    for (pid, is_zombie) in processes {
        let told = match is_zombie {
            true => None,
            false => Some(ask_process(stopped, pid)?),
        };
        asked.push(AskedProcess { pid, told });
    }
    Ok(Asked(asked))
}

fn ask_process(stopped: &mut Stopped<'_>, pid: Pid) -> Result<Told> {
    let (mut observed, leader) = probe::process(stopped, pid)?;
    let timers = posix_timers::list_with_times(stopped, pid)?;
    // One that has fired, and whose signal waits, has no time left until that is taken; setting it so would disarm it.
    let due = |[interval, left]: &&mut TimerValue| *interval != [0, 0] && *left == [0, 0];
    let of_interval = observed.timers.interval.iter_mut();
    of_interval.filter(due).for_each(|[_, left]| *left = [0, 1]);

    if observed.state.local_descriptors != 0 {
        return Err(refuse(
            pid,
            "its local descriptor table (modify_ldt)",
            "it can't be put back yet; such programs, Wine among them, can't be taken",
        )
        .into());
    }
    let pending = ptrace::pending_signals(pid, Queue::Shared).about(pid, "pending signals")?;
    check_pending(pid, &pending)?;
    let tids: Vec<Pid> = match stopped.process(pid) {
        Some(process) => process.threads.iter().map(|thread| thread.tid).collect(),
        None => Vec::new(),
    };
    let mut threads = Vec::with_capacity(tids.len());
    for tid in tids {
        let state = match tid == pid {
            true => leader,
            false => probe::thread(stopped, pid, tid)?,
        };
        threads.push(ask_thread(stopped, (pid, tid), state)?);
    }
    Ok(Told {
        observed,
        timers,
        pending,
        threads,
    })
}

fn ask_thread(
    stopped: &mut Stopped<'_>,
    (pid, tid): (Pid, Pid),
    mut state: ThreadState,
) -> Result<AskedThread> {
    state.rights.filters = filters(pid, tid, &state.rights, 0)?;
    let gone = crate::freeze::Error::Gone(tid);
    let thread = stopped
        .process_mut(pid)
        .and_then(|process| process.threads.iter_mut().find(|thread| thread.tid == tid))
        .ok_or(gone)?;
    let registers = *thread.registers()?;
    let signal_mask = thread.signal_mask()?;
    let number = stopped.number_of_call(tid, &registers).ok_or_else(|| {
        refuse(
            pid,
            format!("thread {tid}: the system call it is in"),
            "it was interrupted before, and /proc/PID/syscall and stack do not tell which it is; try again",
        )
    })?;
    let mut xstate = vec![0; XSTATE_ROOM];
    let len = ptrace::xstate(tid, &mut xstate).about(tid, "extended state")?;
    if len == XSTATE_ROOM {
        return Err(refuse(
            pid,
            format!("thread {tid}: its extended state"),
            "it is larger than that of any processor known to this version",
        )
        .into());
    }
    xstate.truncate(len);
    let pending = ptrace::pending_signals(tid, Queue::Private).about(tid, "pending signals")?;
    check_pending(pid, &pending)?;
    Ok(AskedThread {
        tid,
        state,
        registers,
        number,
        signal_mask,
        rseq: ptrace::rseq(tid).about(tid, "rseq configuration")?,
        xstate,
        pending,
    })
}

/// The number of seccomp filters of a thread, which is not less than `known`: a filter is never taken away.
pub(super) fn filters(pid: Pid, tid: Pid, rights: &Rights, known: u64) -> Result<u64> {
    if rights.seccomp != u64::from(libc::SECCOMP_MODE_FILTER) {
        return Ok(0);
    }
    let mut count = known;
    loop {
        match ptrace::has_seccomp_filter(tid, count) {
            Ok(true) => count += 1,
            Ok(false) => return Ok(count),
            // We are filtered ourselves.
            Err(Errno::EACCES) => break,
            Err(errno) => return Err(errno).about(tid, "seccomp filters"),
        }
    }
    let path = format!("/proc/{pid}/task/{tid}/status");
    let status = std::fs::read_to_string(path).about(tid, "status")?;
    let count = procfs::status_line(&status, "Seccomp_filters");
    Ok(count.and_then(|count| count.parse().ok()).unwrap_or(0))
}

/// Refuses more signals than can be put back.
fn check_pending(pid: Pid, signals: &[SignalInfo]) -> Result<()> {
    if signals.len() > pending::MOST {
        return Err(refuse(
            pid,
            format!("{} signals that wait", signals.len()),
            format!("not more than {} can be kept", pending::MOST),
        )
        .into());
    }
    Ok(())
}
