//! Live state to records.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;

use nix::sys::stat::fstat;
use nix::sys::statfs::fstatfs;
use nix::unistd::Pid;
use zerocopy::IntoBytes;

use crate::freeze::{Stopped, refuse};
use crate::kernel::host_names::{self, NOBODYS};
use crate::kernel::namespaces::{self, Inodes};
use crate::kernel::ptrace::SignalInfo;
use crate::kernel::{pidfd, procfs, registers};
use crate::record::{Context, Kind, ObjectId, ObjectKey};

use super::ask::{Asked, AskedProcess, AskedThread, Told};
use super::layout::{Identity, ProcessRecord, ProcessState, ThreadRecord};
use super::settings::{self, Settings};
use super::time_left::{self, Blocks};
use super::{About, Result, interrupted};

impl Asked {
    /// Records them all, with what `/proc` tells of them. Batches may run in the tree meanwhile.
    ///
    /// The records of a process and its threads are found through [`Recorded::read`].
    ///
    /// [`Recorded::read`]: super::Recorded::read
    pub fn record(self, stopped: &Stopped<'_>, context: &mut Context) -> Result<()> {
        for AskedProcess { pid, told } in self.0 {
            let identity = identify(stopped, pid)?;
            let key = ObjectKey::new(Kind::Process, identity.pid as u64, identity.start_time);
            let id = context.intern(key).id();
            match told {
                Some(told) => record_process(stopped, context, identity, id, told)?,
                None => {
                    let record = ProcessRecord {
                        identity,
                        state: ProcessState::nothing(),
                        settings: Settings::nothing(),
                    };
                    context.put(Kind::Process, id, &record, b"")?;
                }
            }
        }
        Ok(())
    }
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

fn record_process(
    stopped: &Stopped<'_>,
    context: &mut Context,
    identity: Identity,
    id: ObjectId,
    told: Told,
) -> Result<()> {
    let pid = Pid::from_raw(identity.pid);
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
    let mut observed = told.observed;
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
    context.put(Kind::Timers, id, &observed.timers, told.timers.as_bytes())?;
    context.append(Kind::Credentials, id, &[rights.as_bytes()])?;
    put_pending(context, id, &told.pending)?;
    let count = told.threads.len();
    let blocks = Blocks::of(pid);
    for thread in told.threads {
        let namespaces = match looks_at_namespaces(pid, thread.tid, count) {
            true => namespaces_of(stopped, pid, thread.tid)?,
            false => Inodes::default(),
        };
        let record = record_thread(context, id, &thread, namespaces)?;
        let call = (thread.tid, &thread.registers, thread.number);
        time_left::capture(context, record, call, &blocks)?;
    }
    Ok(())
}

/// Returns the id of its record.
fn record_thread(
    context: &mut Context,
    process_id: ObjectId,
    thread: &AskedThread,
    namespaces: Inodes,
) -> Result<ObjectId> {
    let registers = interrupted::to_record(&thread.registers, thread.number);
    let record = ThreadRecord {
        process: context.refer(process_id)?,
        tid: thread.tid.as_raw() as u64,
        registers: registers::to_words(&registers),
        signal_mask: thread.signal_mask,
        rseq_address: thread.rseq.address,
        rseq_size: thread.rseq.size,
        rseq_signature: thread.rseq.signature,
        namespaces,
        state: thread.state,
    };
    let id = context.new_object();
    context.put(Kind::Thread, id, &record, &thread.xstate)?;
    put_pending(context, id, &thread.pending)?;
    Ok(id)
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

/// Most queues are empty, and have no record.
fn put_pending(context: &mut Context, id: ObjectId, signals: &[SignalInfo]) -> Result<()> {
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
