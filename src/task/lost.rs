//! Processes that can't be rolled back where they are: they have ended, or have changed what can't be changed back. They
//! are to be made again, and so are those that go with them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::killpg;
use nix::unistd::Pid;

use crate::freeze::Stopped;
use crate::kernel::{probe, procfs};
use crate::outcome::Refusal;

use super::check::{TAKE_ANOTHER, check_is_there, check_scheduling, refuse};
use super::layout::LIMITS;
use super::recorded::{Recorded, RecordedProcess};
use super::remake::Ending;
use super::revive::taken_by;
use super::{Error, Result, pending, posix_timers, rights};

/// Recorded processes that are to be made again, and why.
#[derive(Debug, Default)]
pub struct Lost {
    why: BTreeMap<Pid, Refusal>,
}

impl Lost {
    /// Those that are not there any more.
    pub fn missing(stopped: &Stopped<'_>, recorded: &Recorded<'_>) -> Result<Self> {
        let mut lost = Self::default();
        for process in recorded.processes() {
            match check_is_there(stopped, process) {
                Ok(()) => {}
                Err(Error::Refused(refusal)) => lost.add(process.pid(), refusal),
                Err(error) => return Err(error),
            }
        }
        Ok(lost)
    }

    /// Adds a process, with the refusal that there is if it can't be made again either.
    pub fn add(&mut self, pid: Pid, why: Refusal) {
        self.why.entry(pid).or_insert(why);
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.why.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.why.len()
    }

    /// Whether a process is among them.
    pub fn contains(&self, pid: Pid) -> bool {
        self.why.contains_key(&pid)
    }

    /// Them, parents before their children.
    pub fn in_order(&self, recorded: &Recorded<'_>) -> Vec<Pid> {
        let depth = |pid: &Pid| {
            let mut at = *pid;
            let mut depth = 0;
            while let Some(process) = recorded.process(at).filter(|_| depth < self.len()) {
                at = process.parent();
                depth += 1;
                if !self.contains(at) {
                    break;
                }
            }
            depth
        };
        let mut pids: Vec<Pid> = self.why.keys().copied().collect();
        pids.sort_by_key(depth);
        pids
    }

    /// Adds those that can't stay where others are lost: their children, since nobody can be given a parent, and members of
    /// process groups and sessions that have their numbers.
    pub fn complete(&mut self, recorded: &Recorded<'_>) {
        loop {
            let before = self.len();
            for process in recorded.processes() {
                let pid = process.pid();
                if self.contains(pid) {
                    continue;
                }
                let stat = procfs::Stat::read(pid);
                let belongs_to =
                    |other: &Pid| stat.as_ref().is_ok_and(|stat| stat.belongs_to(*other));
                let (what, other) = if self.contains(process.parent()) {
                    ("parent", process.parent())
                } else if let Some(other) = self.why.keys().find(|other| belongs_to(other)) {
                    ("process group or session", *other)
                } else {
                    continue;
                };
                let remedy = format!(
                    "its {what}, {other}, has ended since the checkpoint or has changed what can't be undone; {TAKE_ANOTHER}"
                );
                self.add(pid, refuse(process, "the process", remedy));
            }
            if self.len() == before {
                return;
            }
        }
    }

    /// The refusal that a process stays lost, for this reason.
    pub fn refuse(&self, pid: Pid, obstacle: &str) -> Refusal {
        let why = self.why.get(&pid).cloned().unwrap_or(Refusal {
            object: "the process".into(),
            holder: format!("pid {pid}"),
            remedy: String::new(),
        });
        let what = why.remedy.strip_suffix(TAKE_ANOTHER).unwrap_or(&why.remedy);
        let what = what.strip_suffix("; ").unwrap_or(what);
        Refusal {
            remedy: format!("{what}; it can't be made again, as {obstacle}; take a new checkpoint"),
            ..why
        }
    }

    /// Waits a moment until what has ended of the tree has been reaped by others, who may be about to: numbers of processes,
    /// and of their groups and sessions, are free only then.
    pub fn await_reapers(&self, stopped: &Stopped<'_>) {
        const PATIENCE: Duration = Duration::from_secs(2);
        let deadline = Instant::now() + PATIENCE;
        let is_waited_for =
            |pid: Pid, stat: &procfs::Stat| stat.state == 'Z' && stopped.process(pid).is_none();
        let is_taken = |lost: &Pid| {
            let ended = procfs::Stat::read(*lost).is_ok_and(|stat| is_waited_for(*lost, &stat));
            let holds = |(pid, stat): (Pid, procfs::Stat)| {
                stat.belongs_to(*lost) && is_waited_for(pid, &stat)
            };
            ended || killpg(*lost, None).is_ok() && all_processes().any(holds)
        };
        while self.why.keys().any(is_taken) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Refuses if one of them can't be made again.
    pub fn check(&self, stopped: &mut Stopped<'_>, recorded: &Recorded<'_>) -> Result<()> {
        for pid in self.why.keys() {
            let Some(process) = recorded.process(*pid) else {
                continue;
            };
            if let Some(obstacle) = self.obstacle(stopped, recorded, process)? {
                return Err(self.refuse(*pid, &obstacle).into());
            }
        }
        Ok(())
    }

    fn obstacle(
        &self,
        stopped: &mut Stopped<'_>,
        recorded: &Recorded<'_>,
        process: &RecordedProcess<'_>,
    ) -> Result<Option<String>> {
        let pid = process.pid();
        if pid == stopped.root() && stopped.process(pid).is_some() {
            return Ok(Some(
                "it is the root of the tree, and its parent would be told of its end".into(),
            ));
        }
        if process.is_zombie() && Ending::of(process).is_none() {
            return Ok(Some("a signal had ended it".into()));
        }
        if let Some(adopter) = stopped.process(pid).map(|live| live.parent)
            && stopped.process(adopter).is_none()
            && !takes_notice(adopter)
        {
            return Ok(Some(format!(
                "pid {adopter} ({}), which has adopted it, does not seem to reap its children",
                procfs::comm(adopter)
            )));
        }
        let Some(maker) = recorded.begins_as(process) else {
            return Ok(Some("its parent had ended".into()));
        };
        if let Some(obstacle) = self.family_obstacle(stopped, recorded, process, maker) {
            return Ok(Some(obstacle.into()));
        }
        let living = !process.is_zombie();
        if let Some(obstacle) = living.then(|| rights::obstacle(process, maker)).flatten() {
            return Ok(Some(obstacle.into()));
        }
        if living && let Some(obstacle) = state_obstacle(process, maker)? {
            return Ok(Some(obstacle.into()));
        }
        if let Some(obstacle) = timer_obstacle(process) {
            return Ok(Some(obstacle.into()));
        }
        if let Ok(stat) = procfs::Stat::read(pid)
            && stat.start_time() == process.identity.start_time
            && stopped.process(pid).is_none()
        {
            let reaper = stat.parent();
            return Ok(Some(format!(
                "its parent, pid {reaper} ({}), has not reaped it (wait(2)), and its number is not free before",
                procfs::comm(reaper)
            )));
        }
        // In a PID namespace of its own its numbers are free, as what was born since is ended before.
        let has_namespace = process.identity.namespace_pid != pid.as_raw();
        let threads = process.threads.keys().copied();
        let mut numbers = threads.chain([pid]).filter(|_| !has_namespace);
        if let Some(other) = numbers.find_map(|tid| taken_by(stopped, tid)) {
            return Ok(Some(format!("{other} has its number now")));
        }
        let is_ours = |process: &crate::freeze::Process| {
            procfs::Stat::read(process.pid).is_ok_and(|stat| stat.belongs_to(pid))
        };
        if !has_namespace && killpg(pid, None).is_ok() && !stopped.processes().any(is_ours) {
            return Ok(Some(
                "its number is that of a process group of others now".into(),
            ));
        }
        Ok(None)
    }

    /// Parent, session, process group, job control.
    fn family_obstacle(
        &self,
        stopped: &Stopped<'_>,
        recorded: &Recorded<'_>,
        process: &RecordedProcess<'_>,
        maker: &RecordedProcess<'_>,
    ) -> Option<&'static str> {
        let (was, makers) = (&process.identity, &maker.identity);
        if was.pid == makers.pid && was.exit_signal != libc::SIGCHLD {
            return Some("its end was told to its parent by another signal than SIGCHLD");
        }
        if was.job_control_stop != 0 {
            return Some("job control had stopped it");
        }
        if was.session == was.pid {
            if was.terminal != 0 {
                return Some("it led a session with a terminal");
            }
        } else if was.session != makers.session {
            return Some("its parent has left its session");
        }
        let remains = |other: &RecordedProcess<'_>| {
            let other = &other.identity;
            let stays = other.pid == was.group || !self.contains(Pid::from_raw(other.pid));
            stays && other.group == was.group && other.session == was.session
        };
        let leads = was.group == was.pid;
        let is_there = || {
            recorded.processes().any(remains)
                || members(Pid::from_raw(was.group)).any(|(pid, stat)| {
                    stat.session().as_raw() == was.session && stopped.process(pid).is_none()
                })
        };
        (!leads && !is_there()).then_some("its process group is gone")
    }
}

/// The living members of a process group, whoever they belong to.
pub(super) fn members(group: Pid) -> impl Iterator<Item = (Pid, procfs::Stat)> {
    all_processes()
        .filter(move |(_, stat)| stat.group() == group && !matches!(stat.state, 'Z' | 'X'))
}

fn all_processes() -> impl Iterator<Item = (Pid, procfs::Stat)> {
    let all = procfs::numbers(Path::new("/proc")).unwrap_or_default();
    all.into_iter()
        .filter_map(|pid| Some((pid, procfs::Stat::read(pid).ok()?)))
}

/// Why a process can't be made again from its shadow, if it can't.
pub fn shadow_obstacle(process: &RecordedProcess<'_>, shadow: Pid) -> Option<&'static str> {
    let was = &process.identity;
    if was.session == was.pid {
        return None;
    }
    let Ok(stat) = procfs::Stat::read(shadow) else {
        return Some("its shadow is gone");
    };
    if stat.session().as_raw() != was.session {
        return Some("it was in the session of a process that is of the tree, and not its parent");
    }
    (stat.field(7) as i32 != was.terminal).then_some("its controlling terminal is gone")
}

/// Whether a process is told of the end of its children, or waits for it.
fn takes_notice(pid: Pid) -> bool {
    let read = |name| std::fs::read_to_string(procfs::path(pid, name)).unwrap_or_default();
    let status = read("status");
    let is_set = |key| {
        let set =
            procfs::status_line(&status, key).and_then(|set| u64::from_str_radix(set, 16).ok());
        set.is_some_and(|set| set & pending::bit(libc::SIGCHLD) != 0)
    };
    let waits = [libc::SYS_wait4, libc::SYS_waitid]
        .iter()
        .any(|call| read("syscall").starts_with(&format!("{call} ")));
    waits || ["SigCgt", "SigIgn", "SigBlk"].into_iter().any(is_set)
}

/// What a child begins with as its parent has it, and can't change.
fn state_obstacle(
    process: &RecordedProcess<'_>,
    maker: &RecordedProcess<'_>,
) -> Result<Option<&'static str>> {
    let (Some(leader), Some(of_maker)) = (
        process.threads.get(&process.pid()),
        maker.threads.get(&maker.pid()),
    ) else {
        return Ok(Some("nothing is known of its main thread"));
    };
    if leader.record.namespaces != of_maker.record.namespaces {
        return Ok(Some("it lived in other namespaces than its parent"));
    }
    let (was, makers) = (&process.record.state, &maker.record.state);
    if was.root != makers.root {
        return Ok(Some("it had another root directory than its parent"));
    }
    if (0..LIMITS).any(|limit| was.limits[limit][1] > makers.limits[limit][1]) {
        return Ok(Some("it had higher hard limits than its parent"));
    }
    if was.dumpable > 1 {
        return Ok(Some("only exec makes a process dumpable like it"));
    }
    for thread in process.threads.values() {
        if check_scheduling(
            process,
            thread.tid(),
            &thread.record.state,
            &of_maker.record.state,
        )
        .is_err()
        {
            return Ok(Some("setting its scheduling takes CAP_SYS_NICE"));
        }
    }
    Ok(None)
}

fn timer_obstacle(process: &RecordedProcess<'_>) -> Option<&'static str> {
    if process.posix_timers.is_empty() {
        return None;
    }
    if !probe::timers_keep_numbers() {
        return Some("this kernel can't make a POSIX timer with a given number");
    }
    let of_a_thread = |timer: &posix_timers::PosixTimer| timer.is_of_a_thread();
    let many = process.threads.len() > 1;
    (many && process.posix_timers.iter().any(of_a_thread))
        .then_some("one of its POSIX timers was of one thread's processor time")
}

/// The numbers that recorded processes and threads have now: none that is made may get another's.
pub fn numbers(recorded: &Recorded<'_>) -> BTreeSet<Pid> {
    let threads = recorded
        .processes()
        .flat_map(|process| process.threads.keys());
    let processes = recorded.processes().map(RecordedProcess::pid);
    threads.copied().chain(processes).collect()
}
