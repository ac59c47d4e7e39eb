//! A typed view of what a context holds of processes and threads.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use nix::unistd::Pid;

use crate::kernel::ptrace::{Registers, SignalInfo};
use crate::kernel::registers;
use crate::record::{Context, Error, Kind, ObjectId, Record};

use super::layout::{Action, Identity, ProcessRecord, SIGNALS, ThreadRecord, TimersRecord};
use super::posix_timers::PosixTimer;
use super::{Result, time_left};

/// All that a context holds of processes and threads, in place.
#[derive(Debug, Clone)]
pub struct Recorded<'c> {
    processes: BTreeMap<Pid, RecordedProcess<'c>>,
}

/// A recorded process.
#[derive(Debug, Clone)]
pub struct RecordedProcess<'c> {
    /// What names it: as recorded, or as it was made again.
    pub identity: Identity,
    /// Identity and process-wide state as recorded.
    pub record: &'c ProcessRecord,
    /// Path of its working directory; empty if that was deleted or out of reach.
    pub directory: &'c [u8],
    /// Its threads by TID; none: it was a zombie.
    pub threads: BTreeMap<Pid, RecordedThread<'c>>,
    /// What it does on signals 1 to 64; empty for a zombie.
    pub actions: &'c [Action],
    /// Its interval timers.
    pub timers: TimersRecord,
    /// Its POSIX timers; those for a thread name the TID that this has now.
    pub posix_timers: Vec<PosixTimer>,
    /// Signals that waited for any of its threads.
    pub pending: &'c [SignalInfo],
    /// What it may do, as lines of `/proc/PID/status`.
    pub rights: &'c str,
}

/// A recorded thread.
#[derive(Debug, Clone, Copy)]
pub struct RecordedThread<'c> {
    /// Its TID in our namespace: as recorded, or as it was made again.
    pub tid: Pid,
    /// Registers and other state.
    pub record: &'c ThreadRecord,
    /// Its extended state, XSAVE layout.
    pub xstate: &'c [u8],
    /// Signals that waited for this thread.
    pub pending: &'c [SignalInfo],
    /// What was left to wait of the call that it was in.
    pub(super) time_left: Option<Duration>,
}

impl RecordedProcess<'_> {
    /// Its PID in our namespace.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.identity.pid)
    }

    /// Its parent's PID in our namespace.
    pub fn parent(&self) -> Pid {
        Pid::from_raw(self.identity.parent)
    }

    /// Its command name; empty for a zombie.
    pub fn comm(&self) -> String {
        let leader = self.threads.get(&self.pid());
        leader.map_or_else(String::new, |leader| {
            super::check::comm(&leader.record.state.comm)
        })
    }

    /// Whether it had ended and waited to be reaped.
    pub fn is_zombie(&self) -> bool {
        self.identity.zombie != 0
    }

    /// The leader's id as the process itself knows it; 0 for a zombie.
    pub(super) fn namespace_pid(&self) -> u64 {
        self.threads
            .get(&self.pid())
            .map_or(0, |leader| leader.record.state.namespace_tid)
    }
}

impl RecordedThread<'_> {
    /// Its TID in our namespace.
    pub fn tid(&self) -> Pid {
        self.tid
    }

    /// The registers to run on with.
    pub fn registers(&self) -> Registers {
        registers::from_words(&self.record.registers)
    }
}

/// What is new about processes and threads that were made again. Keys are PIDs and TIDs as recorded.
#[derive(Debug, Clone, Default)]
pub struct Renamed {
    /// Those that have another number in our namespace now.
    numbers: BTreeMap<Pid, Pid>,
    /// Start time and inode of the pidfd of processes.
    births: BTreeMap<Pid, (u64, u64)>,
}

impl Renamed {
    /// The number that a process or thread has now.
    pub fn number(&self, recorded: Pid) -> Pid {
        self.numbers.get(&recorded).copied().unwrap_or(recorded)
    }

    /// Notes that the process or thread with the number `was` has another one.
    pub fn rename(&mut self, was: Pid, is: Pid) {
        match self.numbers.values_mut().find(|number| **number == was) {
            Some(number) => *number = is,
            None => {
                self.numbers.insert(was, is);
            }
        }
    }

    /// Notes that the process with the number `was` was made again.
    pub fn reborn(&mut self, was: Pid, is: &Identity) {
        let recorded = self.numbers.iter().find(|(_, number)| **number == was);
        let recorded = recorded.map_or(was, |(recorded, _)| *recorded);
        self.births
            .insert(recorded, (is.start_time, is.pidfd_inode));
        self.rename(was, Pid::from_raw(is.pid));
    }

    /// What names a process now.
    fn identity(&self, recorded: &Identity) -> Identity {
        let number = |recorded| self.number(Pid::from_raw(recorded)).as_raw();
        let mut now = Identity {
            pid: number(recorded.pid),
            parent: number(recorded.parent),
            group: number(recorded.group),
            session: number(recorded.session),
            ..*recorded
        };
        if let Some((start_time, inode)) = self.births.get(&Pid::from_raw(recorded.pid)) {
            (now.start_time, now.pidfd_inode) = (*start_time, *inode);
        }
        now
    }
}

impl<'c> Recorded<'c> {
    /// Finds the records of a context that is kept or was loaded.
    ///
    /// # Errors
    ///
    /// [`Error::Payload`] if a record is missing or not what its kind promises.
    pub fn read(context: &'c Context, renamed: &Renamed) -> Result<Self> {
        let mut of_process: HashMap<u64, Vec<RecordedThread<'c>>> = HashMap::new();
        for record in context.records_of(Kind::Thread) {
            let (thread, xstate) = record.fixed::<ThreadRecord>()?;
            let tid = Pid::from_raw(thread.tid as i32);
            of_process
                .entry(thread.process)
                .or_default()
                .push(RecordedThread {
                    tid: renamed.number(tid),
                    record: thread,
                    xstate,
                    pending: pending(context, record.id())?,
                    time_left: time_left::read(context, record.id())?,
                });
        }
        let mut processes = BTreeMap::new();
        for record in context.records_of(Kind::Process) {
            let threads = of_process.remove(&record.id().raw()).unwrap_or_default();
            let process = process(context, renamed, record, threads)?;
            processes.insert(process.pid(), process);
        }
        Ok(Self { processes })
    }

    /// The processes by PID, zombies too.
    pub fn processes(&self) -> impl Iterator<Item = &RecordedProcess<'c>> {
        self.processes.values()
    }

    /// Whose copy a process begins as that is made again: its parent's; or, if that is not of the tree, its own shadow's.
    pub fn begins_as(&self, process: &RecordedProcess<'c>) -> Option<&RecordedProcess<'c>> {
        match self.process(process.parent()) {
            Some(parent) => Some(parent).filter(|parent| !parent.is_zombie()),
            None => self.process(process.pid()),
        }
    }

    /// One process.
    pub fn process(&self, pid: Pid) -> Option<&RecordedProcess<'c>> {
        self.processes.get(&pid)
    }

    /// The rseq areas of all threads, first address and end: the kernel writes to them whenever their thread runs, be it
    /// only a batch.
    pub fn rseq_areas(&self) -> impl Iterator<Item = (u64, u64)> {
        self.processes
            .values()
            .flat_map(|process| process.threads.values())
            .map(|thread| thread.record)
            .filter(|record| record.rseq_address != 0)
            .map(|record| {
                let end = record.rseq_address + u64::from(record.rseq_size);
                (record.rseq_address, end)
            })
    }

    /// Number of threads.
    pub fn thread_count(&self) -> usize {
        self.processes
            .values()
            .map(|process| process.threads.len())
            .sum()
    }
}

fn pending(context: &Context, id: ObjectId) -> Result<&[SignalInfo]> {
    match context.find(Kind::PendingSignals, id) {
        Some(record) => Ok(record.list()?),
        None => Ok(&[]),
    }
}

fn process<'c>(
    context: &'c Context,
    renamed: &Renamed,
    record: Record<'c>,
    threads: Vec<RecordedThread<'c>>,
) -> Result<RecordedProcess<'c>> {
    let id = record.id();
    let (fixed, directory) = record.fixed::<ProcessRecord>()?;
    let mut process = RecordedProcess {
        identity: renamed.identity(&fixed.identity),
        record: fixed,
        directory,
        threads: threads
            .into_iter()
            .map(|thread| (thread.tid(), thread))
            .collect(),
        actions: &[],
        timers: TimersRecord::default(),
        posix_timers: Vec::new(),
        pending: pending(context, id)?,
        rights: "",
    };
    if process.is_zombie() {
        return Ok(process);
    }
    let bad = |kind, problem: &str| Error::Payload {
        kind,
        id,
        problem: problem.into(),
    };
    let find = |kind| {
        context
            .find(kind, id)
            .ok_or_else(|| bad(kind, "it is missing"))
    };
    if !process.threads.contains_key(&process.pid()) {
        return Err(bad(Kind::Thread, "the main thread is missing").into());
    }
    process.actions = find(Kind::SignalHandlers)?.list()?;
    if process.actions.len() != SIGNALS {
        return Err(bad(Kind::SignalHandlers, "not one for each signal").into());
    }
    let (timers, posix_timers) = find(Kind::Timers)?.fixed_list::<TimersRecord, PosixTimer>()?;
    process.timers = *timers;
    process.posix_timers = posix_timers.to_vec();
    for timer in &mut process.posix_timers {
        let mut threads = process.threads.values();
        if let Some(thread) = threads.find(|thread| timer.notifies(thread.record.tid as i32)) {
            timer.target = thread.tid.as_raw();
        } else if timer.target == fixed.identity.pid {
            timer.target = process.identity.pid;
        }
    }
    process.rights = std::str::from_utf8(find(Kind::Credentials)?.payload())
        .map_err(|_| bad(Kind::Credentials, "not UTF-8"))?;
    Ok(process)
}
