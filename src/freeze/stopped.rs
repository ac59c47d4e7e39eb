//! A stopped tree.

use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::kernel::latency::Awake;
use crate::kernel::procfs;
use crate::kernel::ptrace::{self, Event, Options, Registers};
use crate::kernel::scheduling;

use super::thread::Thread;
use super::tree::{Member, OnTracerDeath, Tree, UnknownCall};
use super::{Context, Error, Result, calls, discover, refuse};

/// How long a task may take to stop: one in an uninterruptible wait (disk, a vfork child) does not.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long one attempt waits before it lets all go for a moment, so that a vfork child can exec.
const ATTEMPT: Duration = Duration::from_millis(50);
/// After this a task that has not stopped is looked at closely.
const SOON: Duration = Duration::from_millis(1);

/// A stopped process.
#[derive(Debug)]
pub struct Process {
    /// Its PID in our namespace.
    pub pid: Pid,
    /// Its parent's PID in our namespace.
    pub parent: Pid,
    /// The signal by which job control had stopped it already.
    pub job_control_stop: Option<i32>,
    /// Its threads, the leader first. Empty: it is a zombie.
    pub threads: Vec<Thread>,
}

impl Process {
    /// Whether it has ended and waits to be reaped.
    pub fn is_zombie(&self) -> bool {
        self.threads.is_empty()
    }

    /// One of its threads.
    pub(super) fn thread_mut(&mut self, tid: Pid) -> Option<&mut Thread> {
        self.threads.iter_mut().find(|thread| thread.tid == tid)
    }

    /// Adds a thread in its place.
    pub(super) fn add_thread(&mut self, thread: Thread) {
        self.threads.push(thread);
        let pid = self.pid;
        self.threads
            .sort_by_key(|thread| (thread.tid != pid, thread.tid));
    }

    /// Its command name, for messages.
    pub fn comm(&self) -> String {
        procfs::comm(self.pid)
    }

    /// As messages name it: `pid 12 (redis-server)`.
    pub fn holder(&self) -> String {
        format!("pid {} ({})", self.pid, self.comm())
    }
}

/// A tree all of whose tasks are stopped by this thread. Dropped, it lets them run on.
///
/// ptrace is bound to the thread that attached, so it can't be sent to another.
#[derive(Debug)]
pub struct Stopped<'t> {
    pub(super) tree: &'t mut Tree,
    pub(super) processes: BTreeMap<Pid, Process>,
    on_death: OnTracerDeath,
    since: Instant,
    /// While a tree is stopped, no processor is to sleep. `None` in an attempt at stopping it.
    _awake: Option<Awake>,
    bound_to_thread: PhantomData<*const ()>,
}

impl<'t> Stopped<'t> {
    pub(super) fn stop(tree: &'t mut Tree, on_death: OnTracerDeath) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let awake = tree.latency.awake();
        scheduling::move_away(tree.processors());
        loop {
            tree.let_stragglers_go();
            let mut attempt = Stopped {
                tree: &mut *tree,
                processes: BTreeMap::new(),
                on_death,
                since: Instant::now(),
                _awake: None,
                bound_to_thread: PhantomData,
            };
            match attempt.stop_all() {
                Ok(()) => {
                    let processes = std::mem::take(&mut attempt.processes);
                    let since = attempt.since;
                    drop(attempt);
                    return Ok(Stopped {
                        tree,
                        processes,
                        on_death,
                        since,
                        _awake: Some(awake),
                        bound_to_thread: PhantomData,
                    });
                }
                Err(Retry::Failed(error)) => return Err(error),
                Err(Retry::Stubborn(pid, tid)) => {
                    // Let go of all others: they may be what it waits for, as a vfork child is.
                    drop(attempt);
                    while tree.has_stragglers() && Instant::now() < deadline {
                        tree.let_stragglers_go();
                        std::thread::yield_now();
                    }
                    if Instant::now() >= deadline {
                        let state =
                            procfs::Stat::of_thread(pid, tid).map_or('?', |stat| stat.state);
                        return Err(refuse(
                            pid,
                            format!("thread {tid}"),
                            format!(
                                "it did not stop within {PATIENCE:?} (state {state}); try again when it does not wait for a disk or a vfork child"
                            ),
                        ));
                    }
                }
            }
        }
    }

    fn stop_all(&mut self) -> std::result::Result<(), Retry> {
        let members = self.tree.members.values();
        let living = members.filter(|member| member.is_alive());
        let mut found: BTreeSet<Pid> = living.map(|member| member.pid).collect();
        let mut orphans = BTreeSet::new();
        let mut looked_at = None;
        loop {
            let mut fresh = Vec::new();
            for pid in &found {
                self.seize_new_threads(*pid, &mut fresh)?;
            }
            let deadline = Instant::now() + ATTEMPT;
            for (pid, tid) in &fresh {
                self.await_stop(*pid, *tid, deadline)?;
            }
            if fresh.is_empty() && looked_at == Some(found.len()) {
                // All that runs was stopped before the children were listed and the births were told: both are complete.
                // One that ended before it could be stopped may have left children, hence the look at the number.
                self.drop_reaped();
                self.know_all();
                return Ok(());
            }
            self.catch_up(&mut found, &mut orphans);
            self.open_members()?;
            looked_at = Some(found.len());
            self.add_children(&mut found)?;
            self.add_orphans(&mut found, &mut orphans);
        }
    }

    /// Forgets zombies whose parents have reaped them before they were stopped themselves. From now on none of the tree will.
    fn drop_reaped(&mut self) {
        let zombies = self
            .processes
            .values()
            .filter(|process| process.is_zombie());
        let reaped = zombies.filter(|process| {
            procfs::Stat::read(process.pid).map_or(true, |stat| {
                stat.state != 'Z' || self.is_reaped_outside(stat.parent())
            })
        });
        let reaped: Vec<Pid> = reaped.map(|process| process.pid).collect();
        for pid in reaped {
            self.processes.remove(&pid);
        }
    }

    /// Seizes and interrupts the threads of a process that are not held yet.
    fn seize_new_threads(
        &mut self,
        pid: Pid,
        fresh: &mut Vec<(Pid, Pid)>,
    ) -> std::result::Result<(), Retry> {
        let options = match self.on_death {
            OnTracerDeath::RunOn => Options::HOLD,
            OnTracerDeath::Die => Options::HOLD_OR_KILL,
        };
        if self.holds_all_threads(pid) {
            return Ok(());
        }
        let Ok(tids) = procfs::tasks(pid) else {
            return Ok(()); // ended meanwhile
        };
        for tid in tids {
            let held = self.processes.get(&pid);
            if held.is_some_and(|process| process.threads.iter().any(|thread| thread.tid == tid)) {
                continue;
            }
            match self.seize(pid, tid, options)? {
                Seized::Taken => {}
                Seized::Gone => continue,
                Seized::Zombie { parent } => {
                    if !self.is_reaped_outside(parent) {
                        self.note_process(pid, parent);
                    }
                    continue;
                }
            }
            if !self.processes.contains_key(&pid) {
                let stat = match self.tree.members.get(&pid) {
                    Some(member) if member.is_alive() => procfs::Stat::read_held(&member.stat),
                    _ => procfs::Stat::read(pid),
                };
                let parent = stat.map_or(Pid::from_raw(0), |stat| stat.parent());
                self.note_process(pid, parent);
            }
            let Some(process) = self.processes.get_mut(&pid) else {
                continue;
            };
            process.add_thread(Thread::new(tid));
            fresh.push((pid, tid));
        }
        Ok(())
    }

    /// Whether a process has no threads but those that are stopped: then it has nobody to make more.
    fn holds_all_threads(&self, pid: Pid) -> bool {
        let (Some(process), Some(member)) = (self.processes.get(&pid), self.tree.members.get(&pid))
        else {
            return false;
        };
        let held = process.threads.iter().all(|thread| thread.state.stopped);
        let count = process.threads.len() as u64;
        held && count > 0 && procfs::thread_count(&member.tasks).is_ok_and(|all| all == count)
    }

    /// Seizes and interrupts one task. One that is just ending can't be seized and is not a zombie yet, so a failure
    /// counts only if it lasts.
    fn seize(&self, pid: Pid, tid: Pid, options: Options) -> Result<Seized> {
        let deadline = Instant::now() + ATTEMPT;
        loop {
            match ptrace::seize(tid, options) {
                Ok(()) => {
                    ptrace::interrupt(tid).context(|| format!("interrupt {tid}"))?;
                    return Ok(Seized::Taken);
                }
                Err(Errno::ESRCH) => return Ok(Seized::Gone),
                // A child of a task that we held when it was made is ours already.
                Err(_) if self.is_ours(pid, tid) => return Ok(Seized::Taken),
                Err(_) => {}
            }
            let Ok(stat) = procfs::Stat::of_thread(pid, tid) else {
                return Ok(Seized::Gone);
            };
            if matches!(stat.state, 'Z' | 'X') {
                if tid != pid {
                    return Ok(Seized::Gone);
                }
                if procfs::tasks(pid).is_ok_and(|tids| tids.len() == 1) {
                    return Ok(Seized::Zombie {
                        parent: stat.parent(),
                    });
                }
            }
            if Instant::now() > deadline {
                return Err(discover::why_not_seized(pid, tid));
            }
            std::thread::yield_now();
        }
    }

    fn is_ours(&self, pid: Pid, tid: Pid) -> bool {
        let status =
            std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).unwrap_or_default();
        procfs::status_line(&status, "TracerPid") == Some(&nix::unistd::gettid().to_string())
            || procfs::status_line(&status, "TracerPid") == Some(&Pid::this().to_string())
    }

    pub(super) fn note_process(&mut self, pid: Pid, parent: Pid) -> &mut Process {
        self.processes.entry(pid).or_insert_with(|| Process {
            pid,
            parent,
            job_control_stop: None,
            threads: Vec::new(),
        })
    }

    /// Opens what is held of processes seen for the first time, once they are stopped.
    fn open_members(&mut self) -> Result<()> {
        let missing: Vec<Pid> = self
            .processes
            .values()
            .filter(|process| !process.is_zombie())
            .map(|process| process.pid)
            .filter(|pid| !self.tree.members.get(pid).is_some_and(Member::is_alive))
            .collect();
        for pid in missing {
            match self.open_member(pid) {
                Ok(()) => {}
                // Killed while it was stopped: only SIGKILL does that.
                Err(_)
                    if procfs::Stat::read(pid)
                        .map_or(true, |stat| matches!(stat.state, 'Z' | 'X')) =>
                {
                    self.processes.remove(&pid);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Waits until an interrupted task has stopped, or notes that it ended.
    fn await_stop(
        &mut self,
        pid: Pid,
        tid: Pid,
        deadline: Instant,
    ) -> std::result::Result<(), Retry> {
        let began = Instant::now();
        let mut loose = None;
        let mut turns = 0u32;
        loop {
            match ptrace::poll(tid) {
                Ok(Some(Event::Interrupted)) => {
                    self.stop_again(loose.take().unwrap_or_default(), deadline)?;
                    let Some(process) = self.processes.get_mut(&pid) else {
                        return Ok(());
                    };
                    if tid == pid {
                        let signal = ptrace::stop_signal(tid)
                            .context(|| format!("the stop signal of {tid}"))?;
                        process.job_control_stop = (signal != libc::SIGTRAP).then_some(signal);
                    }
                    let mut threads = process.threads.iter_mut();
                    if let Some(thread) = threads.find(|thread| thread.tid == tid) {
                        thread.state.stopped = true;
                    }
                    return Ok(());
                }
                Ok(Some(Event::Exited(_))) | Err(_) => {
                    self.stop_again(loose.take().unwrap_or_default(), deadline)?;
                    if let Some(process) = self.processes.get_mut(&pid) {
                        process.threads.retain(|thread| thread.tid != tid);
                        if process.threads.is_empty() && !procfs::path(pid, "stat").exists() {
                            self.processes.remove(&pid);
                        }
                    }
                    return Ok(());
                }
                // A fork that was under way: the child is found below its parent.
                Ok(Some(Event::Forked(_) | Event::Other(_))) => {
                    ptrace::resume_to_stop(tid, 0).context(|| format!("resume {tid}"))?
                }
                // A signal on its way is handed back when the task runs on.
                Ok(Some(Event::Signal(signal))) => {
                    ptrace::resume_to_stop(tid, signal).context(|| format!("resume {tid}"))?
                }
                Ok(None) => {
                    turns += 1;
                    if turns > 64 {
                        if Instant::now() > deadline {
                            for (_, child) in loose.take().unwrap_or_default() {
                                // It may have ended.
                                let _ = ptrace::interrupt(child);
                            }
                            return Err(Retry::Stubborn(pid, tid));
                        }
                        if loose.is_none() && began.elapsed() > SOON && waits_in_kernel(pid, tid) {
                            loose = Some(self.let_children_run(pid, tid)?);
                        }
                        std::thread::yield_now();
                    }
                }
            }
        }
    }

    /// Lets the stopped children of a thread run: it may be in vfork(2), which ends when its child executes a program.
    fn let_children_run(&mut self, pid: Pid, tid: Pid) -> Result<Vec<(Pid, Pid)>> {
        let mut loose = Vec::new();
        for child in procfs::children(pid, tid).unwrap_or_default() {
            if self.tree.shadows.contains_key(&child) {
                continue;
            }
            if !self.processes.contains_key(&child) {
                // One that was made while its parent was held is born stopped.
                if !self.is_ours(child, child)
                    || !matches!(ptrace::wait(child), Ok(Event::Interrupted))
                {
                    continue;
                }
                self.note_process(child, pid)
                    .add_thread(Thread::born(child));
            }
            let threads = self
                .processes
                .get_mut(&child)
                .into_iter()
                .flat_map(|process| &mut process.threads);
            for thread in threads.filter(|thread| thread.state.stopped) {
                ptrace::resume(thread.tid, 0).context(|| format!("resume {}", thread.tid))?;
                thread.state.stopped = false;
                loose.push((child, thread.tid));
            }
        }
        Ok(loose)
    }

    /// Stops what [`Self::let_children_run`] let run.
    fn stop_again(
        &mut self,
        loose: Vec<(Pid, Pid)>,
        deadline: Instant,
    ) -> std::result::Result<(), Retry> {
        for (child, tid) in loose {
            // It may have ended, which the wait finds out.
            let _ = ptrace::interrupt(tid);
            self.await_stop(child, tid, deadline)?;
        }
        Ok(())
    }

    fn add_children(&mut self, found: &mut BTreeSet<Pid>) -> Result<()> {
        let mut known_inside = BTreeSet::new();
        for process in self.processes.values() {
            for thread in &process.threads {
                if let Ok(children) = procfs::children(process.pid, thread.tid) {
                    found.extend(
                        children
                            .into_iter()
                            .filter(|child| !self.tree.shadows.contains_key(child)),
                    );
                }
            }
        }
        for pid in &*found {
            if let Some(member) = self.tree.members.get(pid) {
                known_inside.insert(member.namespace_pid);
            }
        }
        known_inside.extend(self.tree.shadows.values());
        let mut known = found.clone();
        known.extend(self.tree.shadows.keys());
        found.extend(
            self.tree
                .scope
                .joined(self.tree.root, &known, &known_inside)?,
        );
        Ok(())
    }

    /// Takes note of a process's new address space, if it has executed another program since it became known. The
    /// window into the old one is gone with it.
    pub fn renew(&mut self, pid: Pid) -> Result<()> {
        if !self.member(pid)?.has_its_memory() {
            self.open_member(pid)?;
        }
        Ok(())
    }

    pub(super) fn open_member(&mut self, pid: Pid) -> Result<()> {
        self.tree.generations += 1;
        let generation = self.tree.generations;
        let member = Member {
            generation,
            ..Member::open(pid)?
        };
        self.tree.members.insert(pid, member);
        Ok(())
    }

    /// When the first task was stopped.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// The root's PID.
    pub fn root(&self) -> Pid {
        self.tree.root
    }

    /// What is known of the tree.
    pub fn tree(&self) -> &Tree {
        self.tree
    }

    /// What is known of the tree, to be changed.
    pub fn tree_mut(&mut self) -> &mut Tree {
        self.tree
    }

    /// Its processes by PID, zombies too.
    pub fn processes(&self) -> impl Iterator<Item = &Process> {
        self.processes.values()
    }

    /// Its processes by PID, zombies too, to be changed.
    pub fn processes_mut(&mut self) -> impl Iterator<Item = &mut Process> {
        self.processes.values_mut()
    }

    /// One process.
    pub fn process(&self, pid: Pid) -> Option<&Process> {
        self.processes.get(&pid)
    }

    /// One process, to be changed.
    pub fn process_mut(&mut self, pid: Pid) -> Option<&mut Process> {
        self.processes.get_mut(&pid)
    }

    /// What is held of a process of this tree.
    pub fn member(&self, pid: Pid) -> Result<&Member> {
        self.tree.members.get(&pid).ok_or(Error::Gone(pid))
    }

    /// Number of threads.
    pub fn thread_count(&self) -> usize {
        self.processes
            .values()
            .map(|process| process.threads.len())
            .sum()
    }

    /// Takes note of the system calls that the threads are in, or about to go on with. To be called once per stop, before
    /// their registers change; returns those whose call is not known.
    pub fn note_calls(&mut self) -> Result<Vec<UnknownCall>> {
        let mut found = Vec::new();
        for process in self.processes.values_mut() {
            for thread in &mut process.threads {
                let registers = *thread.registers()?;
                let back = calls::back_in_call(process.pid, &registers);
                if let Some(registers) = &back {
                    thread.set_registers(registers);
                }
                found.push((process.pid, thread.tid, back.unwrap_or(registers)));
            }
        }
        let calls = &mut self.tree.calls;
        calls.note(found.iter().map(|(_, tid, registers)| (*tid, *registers)));
        found.retain(|(_, tid, registers)| calls.number(*tid, registers).is_none());
        let unknown = |(pid, tid, registers)| UnknownCall::new(pid, tid, registers);
        Ok(found.into_iter().map(unknown).collect())
    }

    /// The number of the system call that a thread with these registers is in (see [`Stopped::note_calls`]).
    pub fn number_of_call(&self, tid: Pid, registers: &Registers) -> Option<u64> {
        self.tree.calls.number(tid, registers)
    }

    /// Forgets a process that was killed and is gone.
    pub fn remove(&mut self, pid: Pid) {
        self.processes.remove(&pid);
    }

    /// Lets every task run on.
    pub fn resume(mut self) -> Result<()> {
        self.release()
    }

    fn release(&mut self) -> Result<()> {
        self.finish_all();
        let mut first_error = Ok(());
        for process in std::mem::take(&mut self.processes).values_mut() {
            let result = self.release_threads(process);
            if first_error.is_ok() {
                first_error = result;
            }
            if let Some(window) = self
                .tree
                .members
                .get_mut(&process.pid)
                .and_then(|member| member.window.as_mut())
            {
                window.hide();
            }
        }
        first_error
    }

    fn release_threads(&mut self, process: &mut Process) -> Result<()> {
        let mut first_error = Ok(());
        for thread in &mut process.threads {
            if !thread.state.stopped {
                self.tree.stragglers.push(thread.tid);
                continue;
            }
            match thread.release() {
                Ok(true) => {}
                Ok(false) => self.tree.stragglers.push(thread.tid),
                Err(error) => first_error = first_error.and(Err(error)),
            }
        }
        first_error
    }

    /// Lets a process run on that is none of the tree's.
    pub(super) fn let_go(&mut self, pid: Pid) {
        if let Some(mut process) = self.processes.remove(&pid) {
            // Nothing was changed in it, so there is nothing that could fail but that it is gone.
            let _ = self.release_threads(&mut process);
        }
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        // Best effort: whoever cares about errors has called `resume`.
        let _ = self.release();
    }
}

/// Whether a task is in an uninterruptible wait, as the parent of a vfork child is.
fn waits_in_kernel(pid: Pid, tid: Pid) -> bool {
    procfs::Stat::of_thread(pid, tid).is_ok_and(|stat| stat.state == 'D')
}

/// What came of seizing a task.
enum Seized {
    /// It is ours and will stop.
    Taken,
    /// It has ended.
    Gone,
    /// It has ended and is all that is left of its process.
    Zombie { parent: Pid },
}

/// Why an attempt at stopping did not succeed.
enum Retry {
    /// This thread of this process does not stop.
    Stubborn(Pid, Pid),
    Failed(Error),
}

impl From<Error> for Retry {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}
