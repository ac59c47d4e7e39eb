//! Live state to records.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::sys::stat::fstat;
use nix::sys::statfs::fstatfs;
use nix::unistd::Pid;
use zerocopy::IntoBytes;

use crate::freeze::{Stopped, refuse};
use crate::kernel::host_names::{self, NOBODYS};
use crate::kernel::namespaces::{self, Inodes};
use crate::kernel::ptrace::{self, Queue, Registers};
use crate::kernel::{pidfd, procfs, registers};
use crate::record::{Context, Kind, ObjectId, ObjectKey};

use super::layout::{
    Identity, ProcessRecord, ProcessState, Rights, ThreadRecord, ThreadState, TimerValue,
};
use super::settings::{self, Settings};
use super::time_left::{self, Blocks};
use super::{About, Result, interrupted, pending, posix_timers, probe};

/// Room for the extended state of any processor so far: AMX has 11 KiB.
pub(super) const XSTATE_ROOM: usize = 16 << 10;

/// Records every process and thread of a stopped tree. Every process but zombies needs a window, and [`prepare`] must
/// have been called.
///
/// The records of a process and its threads are found through [`Recorded::read`].
///
/// [`prepare`]: super::prepare
/// [`Recorded::read`]: super::Recorded::read
pub fn capture(stopped: &mut Stopped<'_>, context: &mut Context) -> Result<()> {
    let pids: Vec<Pid> = stopped.processes().map(|process| process.pid).collect();
    for pid in pids {
        let identity = identify(stopped, pid)?;
        let key = ObjectKey::new(Kind::Process, identity.pid as u64, identity.start_time);
        let id = context.intern(key).id();
        if identity.zombie != 0 {
            let record = ProcessRecord {
                identity,
                state: ProcessState::nothing(),
                settings: Settings::nothing(),
            };
            context.put(Kind::Process, id, &record, b"")?;
        } else {
            capture_process(stopped, context, identity, id)?;
        }
    }
    Ok(())
}

/// What names a process of the stopped tree.
pub fn identify(stopped: &Stopped<'_>, pid: Pid) -> Result<Identity> {
    let process = stopped
        .process(pid)
        .ok_or(crate::freeze::Error::Gone(pid))?;
    // Nothing is held open of zombies.
    let stat = procfs::Stat::read(pid).about(pid, "stat")?;
    let (pidfd_inode, namespace_pid) = if process.is_zombie() {
        let status = std::fs::read_to_string(procfs::path(pid, "status")).about(pid, "status")?;
        (0, procfs::pid_inside(&status).unwrap_or(pid.as_raw()))
    } else {
        (
            pidfd_inode(stopped, pid)?,
            stopped.member(pid)?.namespace_pid,
        )
    };
    Ok(Identity {
        pid: pid.as_raw(),
        parent: stat.parent().as_raw(),
        group: stat.field(5) as i32,
        session: stat.field(6) as i32,
        start_time: stat.start_time(),
        pidfd_inode,
        zombie: u32::from(process.is_zombie()),
        job_control_stop: process.job_control_stop.unwrap_or(0),
        namespace_pid,
        exit_signal: stat.exit_signal(),
        wait_status: stat.field(52) as i32,
        terminal: stat.field(7) as i32,
    })
}

/// The inode of the pidfd that is held of a process; 0 if pidfds have none of their own (before Linux 6.9).
pub(super) fn pidfd_inode(stopped: &Stopped<'_>, pid: Pid) -> Result<u64> {
    static OWN_INODES: OnceLock<bool> = OnceLock::new();
    const PID_FS_MAGIC: i64 = 0x5049_4446;
    let pidfd = &stopped.member(pid)?.pidfd;
    let own = *OWN_INODES.get_or_init(|| {
        fstatfs(pidfd).is_ok_and(|filesystem| filesystem.filesystem_type().0 == PID_FS_MAGIC)
    });
    if !own {
        return Ok(0);
    }
    Ok(fstat(pidfd.as_raw_fd()).about(pid, "pidfd")?.st_ino)
}

fn capture_process(
    stopped: &mut Stopped<'_>,
    context: &mut Context,
    identity: Identity,
    id: ObjectId,
) -> Result<()> {
    let pid = Pid::from_raw(identity.pid);
    // Before any batch: it tells of the thread as the program left it.
    let rights = rights(stopped, pid)?;
    if rights
        .lines()
        .any(|line| line.starts_with(FEATURES) && line.contains("shstk"))
    {
        return Err(refuse(
            pid,
            "its shadow stack",
            "shadow stacks can't be put back yet; start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
        )
        .into());
    }
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

    if host_names::are_ours(pid).about(pid, "its UTS namespace")? {
        observed.state.host_names = NOBODYS;
    }
    let stat = procfs::Stat::read_held(&stopped.member(pid)?.stat).about(pid, "stat")?;
    let record = ProcessRecord {
        identity,
        state: observed.state,
        settings: Settings::read(stopped, pid, &stat)?,
    };
    let directory = observed.directory.unwrap_or_default();
    context.put(Kind::Process, id, &record, &directory)?;
    context.put_list(Kind::SignalHandlers, id, &observed.actions)?;
    context.put(Kind::Timers, id, &observed.timers, timers.as_bytes())?;
    context.append(Kind::Credentials, id, &[rights.as_bytes()])?;
    let shared = ptrace::pending_signals(pid, Queue::Shared).about(pid, "pending signals")?;
    put_pending(context, id, pid, &shared)?;

    let tids: Vec<Pid> = match stopped.process(pid) {
        Some(process) => process.threads.iter().map(|thread| thread.tid).collect(),
        None => Vec::new(),
    };
    let count = tids.len();
    let blocks = Blocks::of(pid);
    for tid in tids {
        let mut state = if tid == pid {
            leader
        } else {
            probe::thread(stopped, pid, tid)?
        };
        state.rights.filters = filters(pid, tid, &state.rights, 0)?;
        let namespaces = if looks_at_namespaces(pid, tid, count) {
            namespaces_of(stopped, pid, tid)?
        } else {
            Inodes::default()
        };
        let thread = capture_thread(stopped, context, (pid, tid), id, state, namespaces)?;
        let (thread, registers, number) = thread;
        time_left::capture(context, thread, (tid, &registers, number), &blocks)?;
    }
    Ok(())
}

/// Returns the id of its record, its registers, and the number of the call that it is in.
fn capture_thread(
    stopped: &mut Stopped<'_>,
    context: &mut Context,
    (pid, tid): (Pid, Pid),
    process_id: ObjectId,
    state: ThreadState,
    namespaces: Inodes,
) -> Result<(ObjectId, Registers, u64)> {
    let gone = crate::freeze::Error::Gone(tid);
    let thread = stopped
        .process_mut(pid)
        .and_then(|process| process.threads.iter_mut().find(|thread| thread.tid == tid))
        .ok_or(gone)?;
    let rseq = ptrace::rseq(tid).about(tid, "rseq configuration")?;
    let registers = *thread.registers()?;
    let signal_mask = thread.signal_mask()?;
    let number = stopped.number_of_call(tid, &registers).ok_or_else(|| {
        refuse(
            pid,
            format!("thread {tid}: the system call it is in"),
            "it was interrupted before, and /proc/PID/syscall and stack do not tell which it is; try again",
        )
    })?;
    let to_record = interrupted::to_record(&registers, number);
    let record = ThreadRecord {
        process: context.refer(process_id)?,
        tid: tid.as_raw() as u64,
        registers: registers::to_words(&to_record),
        signal_mask,
        rseq_address: rseq.address,
        rseq_size: rseq.size,
        rseq_signature: rseq.signature,
        namespaces,
        state,
    };
    let mut xstate = [0; XSTATE_ROOM];
    let len = ptrace::xstate(tid, &mut xstate).about(tid, "extended state")?;
    if len == XSTATE_ROOM {
        return Err(refuse(
            pid,
            format!("thread {tid}: its extended state"),
            "it is larger than that of any processor known to this version",
        )
        .into());
    }
    let id = context.new_object();
    context.put(Kind::Thread, id, &record, &xstate[..len])?;
    let private = ptrace::pending_signals(tid, Queue::Private).about(tid, "pending signals")?;
    put_pending(context, id, pid, &private)?;
    Ok((id, registers, number))
}

/// Whether the namespaces of a thread are looked at, of a process that has `count`: of the main thread always, of others
/// if they are few.
fn looks_at_namespaces(pid: Pid, tid: Pid, count: usize) -> bool {
    const FEW: usize = 16;
    tid == pid || count <= FEW
}

/// The namespaces a thread lives in.
pub(super) fn namespaces_of(stopped: &Stopped<'_>, pid: Pid, tid: Pid) -> Result<Inodes> {
    let member = stopped.member(pid)?;
    let inodes = if tid == pid {
        namespaces::of(member.namespaces.as_fd())
    } else {
        let directory = procfs::open_below(&member.tasks, &format!("{tid}/ns"));
        namespaces::of(directory.about(tid, "namespaces")?.as_fd())
    };
    inodes.about(tid, "namespaces")
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

/// Most queues are empty, and have no record.
fn put_pending(
    context: &mut Context,
    id: ObjectId,
    pid: Pid,
    signals: &[ptrace::SignalInfo],
) -> Result<()> {
    if signals.len() > pending::MOST {
        return Err(refuse(
            pid,
            format!("{} signals that wait", signals.len()),
            format!("not more than {} can be kept", pending::MOST),
        )
        .into());
    }
    if !signals.is_empty() {
        context.put_list(Kind::PendingSignals, id, signals)?;
    }
    Ok(())
}

/// The line of `/proc/PID/status` that names the processor features a thread has switched on (Linux 6.6).
pub(super) const FEATURES: &str = "x86_Thread_features";

/// The lines of `/proc/PID/status` that tell what a process of the tree may do, and those of its login user and its
/// control groups.
pub(super) fn rights(stopped: &Stopped<'_>, pid: Pid) -> Result<String> {
    let status = procfs::text_held(&stopped.member(pid)?.status).about(pid, "status")?;
    Ok(rights_in(&status) + &settings::membership(stopped, pid)?)
}

/// The lines of that text that tell what a process may do.
fn rights_in(status: &str) -> String {
    const KEYS: [&str; 12] = [
        "Uid",
        "Gid",
        "Groups",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "Seccomp_filters",
        FEATURES,
    ];
    let of_interest = |line: &&str| {
        line.split_once(':')
            .is_some_and(|(key, _)| KEYS.contains(&key))
    };
    status
        .lines()
        .filter(of_interest)
        .flat_map(|line| [line.trim_end(), "\n"])
        .collect()
}

/// Whether a process that is held by a pidfd has not been reaped.
pub(super) fn is_alive(stopped: &Stopped<'_>, pid: Pid) -> bool {
    stopped
        .member(pid)
        .is_ok_and(|member| pidfd::send_signal(member.pidfd.as_fd(), 0).is_ok())
}
