//! The oracle: compares the live state with the record by other means than those that put it back.

use std::fmt::Debug;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use nix::unistd::Pid;

use crate::freeze::Stopped;
use crate::kernel::host_names::{self, NOBODYS};
use crate::kernel::ptrace::{self, Queue, SignalInfo};
use crate::kernel::{procfs, registers, scheduling};
use crate::outcome::Difference;

use super::ask::{XSTATE_ROOM, filters};
use super::check::{comm, holder};
use super::layout::{Action, MemoryPolicy, ThreadState, TimerValue};
use super::probe::ProcessProbe;
use super::recorded::{Recorded, RecordedProcess, RecordedThread};
use super::settings::Settings;
use super::{About, Result, pending, posix_timers, probe};

/// Compares every recorded process and thread with the live ones. What differs is returned, in words.
///
/// Time goes on meanwhile: a timer may have less time left than recorded, and one that is due may have sent its signal.
pub fn verify(stopped: &mut Stopped<'_>, recorded: &Recorded<'_>) -> Result<Vec<Difference>> {
    let mut differences = Vec::new();
    for process in stopped.processes() {
        if recorded.process(process.pid).is_none() {
            differences.push(Difference {
                what: process.holder(),
                expected: "no such process".into(),
                found: "a process".into(),
            });
        }
    }
    for process in recorded.processes() {
        let mut report = Report {
            holder: holder(process),
            differences: &mut differences,
        };
        verify_process(stopped, process, &mut report)?;
    }
    Ok(differences)
}

struct Report<'d> {
    holder: String,
    differences: &'d mut Vec<Difference>,
}

impl Report<'_> {
    fn differs(&mut self, what: &str, expected: impl Into<String>, found: impl Into<String>) {
        self.differences.push(Difference {
            what: format!("{}: {what}", self.holder),
            expected: expected.into(),
            found: found.into(),
        });
    }

    fn same<T: PartialEq + Debug>(&mut self, what: &str, expected: &T, found: &T) {
        if expected != found {
            self.differs(what, format!("{expected:x?}"), format!("{found:x?}"));
        }
    }
}

fn verify_process(
    stopped: &mut Stopped<'_>,
    process: &RecordedProcess<'_>,
    report: &mut Report<'_>,
) -> Result<()> {
    let pid = process.pid();
    let Some(live) = stopped.process_mut(pid) else {
        report.differs("the process", "there", "gone");
        return Ok(());
    };
    report.same("zombie", &process.is_zombie(), &live.is_zombie());
    if process.is_zombie() || live.is_zombie() {
        return Ok(());
    }
    settle(live)?;
    let live: Vec<Pid> = live.threads.iter().map(|thread| thread.tid).collect();
    let mut expected: Vec<Pid> = process.threads.keys().copied().collect();
    expected.sort_by_key(|tid| (*tid != pid, *tid));
    report.same("threads", &expected, &live);

    // What can be seen from outside first: a batch changes some of it for a while.
    for tid in live {
        if let Some(thread) = process.threads.get(&tid) {
            verify_thread(process, thread, report)?;
        }
    }
    verify_from_outside(process, report)?;
    verify_by_batch(stopped, process, report)?;
    match stopped.process_mut(pid) {
        Some(live) => settle(live),
        None => Ok(()),
    }
}

/// Puts the registers and masks to run on with into the threads.
fn settle(process: &mut crate::freeze::Process) -> Result<()> {
    for thread in &mut process.threads {
        thread.settle()?;
    }
    Ok(())
}

/// Names of the general registers, in the order of `user_regs_struct`.
const REGISTERS: [&str; registers::WORDS] = [
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi",
    "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs",
    "gs",
];

fn verify_thread(
    process: &RecordedProcess<'_>,
    thread: &RecordedThread<'_>,
    report: &mut Report<'_>,
) -> Result<()> {
    let tid = thread.tid();
    let record = thread.record;
    let live = registers::to_words(&ptrace::registers(tid).about(tid, "registers")?);
    for ((name, was), is) in REGISTERS.iter().zip(&record.registers).zip(&live) {
        report.same(&format!("thread {tid}: {name}"), was, is);
    }
    let mut xstate = [0; XSTATE_ROOM];
    let len = ptrace::xstate(tid, &mut xstate).about(tid, "extended state")?;
    // A component that is not in use reads as what it is initially, so that the contents tell; whether one with that
    // content counts as in use is up to the processor.
    let mut bytes = (0..len.max(thread.xstate.len())).filter(|at| !XSTATE_IN_USE.contains(at));
    if let Some(at) = bytes.find(|&at| xstate[..len].get(at) != thread.xstate.get(at)) {
        let byte = |state: &[u8]| format!("{:x?} at byte {at}", state.get(at));
        let (expected, found) = (byte(thread.xstate), byte(&xstate[..len]));
        report.differs(&format!("thread {tid}: extended state"), expected, found);
    }
    let mask = ptrace::signal_mask(tid).about(tid, "signal mask")?;
    report.same(
        &format!("thread {tid}: signal mask"),
        &record.signal_mask,
        &mask,
    );
    let rseq = ptrace::rseq(tid).about(tid, "rseq configuration")?;
    let was = (record.rseq_address, record.rseq_size, record.rseq_signature);
    let is = (rseq.address, rseq.size, rseq.signature);
    // Without an area the rest has no meaning.
    if was.0 != 0 || is.0 != 0 {
        report.same(&format!("thread {tid}: rseq"), &was, &is);
    }

    let read = |name| fs::read_to_string(format!("/proc/{}/task/{tid}/{name}", process.pid()));
    let name = read("comm").about(tid, "comm")?;
    let name = name.strip_suffix('\n').unwrap_or(&name);
    report.same(
        &format!("thread {tid}: comm"),
        &comm(&record.state.comm).as_str(),
        &name,
    );
    let status = Status(read("status").about(tid, "status")?);
    let what = format!("thread {tid}: signals blocked");
    report.same(&what, &record.signal_mask, &status.set("SigBlk"));
    let private = ptrace::pending_signals(tid, Queue::Private).about(tid, "pending signals")?;
    let what = format!("thread {tid}: signals that wait");
    let pending = status.set("SigPnd");
    verify_pending(report, &what, process, (thread.pending, &private), pending);

    let live = scheduling::attributes(tid).about(tid, "sched_getattr")?;
    report.same(
        &format!("thread {tid}: scheduling"),
        &record.state.scheduling,
        &live,
    );
    let live = scheduling::processors(tid).about(tid, "sched_getaffinity")?;
    report.same(
        &format!("thread {tid}: processors"),
        &record.state.processors,
        &live,
    );
    Ok(())
}

/// Where the XSAVE header says which components are in use (`XSTATE_BV`).
const XSTATE_IN_USE: Range<usize> = 512..520;

struct Status(String);

impl Status {
    fn number(&self, key: &str, radix: u32) -> u64 {
        procfs::status_line(&self.0, key)
            .and_then(|value| u64::from_str_radix(value, radix).ok())
            .unwrap_or(0)
    }

    /// A set of signals.
    fn set(&self, key: &str) -> u64 {
        self.number(key, 16)
    }
}

/// Compares queues, and with the set that `/proc` shows, since a signal that found no memory is in no queue. Timers go
/// on: what a recorded timer has sent since may wait too.
fn verify_pending(
    report: &mut Report<'_>,
    what: &str,
    process: &RecordedProcess<'_>,
    (was, is): (&[SignalInfo], &[SignalInfo]),
    shown: u64,
) {
    let by_timer = |info: &SignalInfo| match pending::code(info) {
        libc::SI_TIMER => process
            .posix_timers
            .iter()
            .any(|timer| timer.is_armed() && timer.id == pending::timer(info)),
        libc::SI_KERNEL => match pending::number(info) {
            libc::SIGALRM => process.timers.interval[0][1] != [0, 0],
            libc::SIGVTALRM => process.timers.interval[1][1] != [0, 0],
            libc::SIGPROF => process.timers.interval[2][1] != [0, 0],
            _ => false,
        },
        _ => false,
    };
    let of_others = |signals: &[SignalInfo]| -> Vec<SignalInfo> {
        let others = signals.iter().filter(|info| !by_timer(info));
        others.copied().collect()
    };
    let timers = process.posix_timers.iter().map(|timer| timer.signal);
    let of_timers = [libc::SIGALRM, libc::SIGVTALRM, libc::SIGPROF].into_iter();
    let known = of_timers
        .chain(timers)
        .fold(pending::set(is), |all, signal| all | pending::bit(signal));
    if shown & !known != 0 {
        let found = format!("also {:x}", shown & !known);
        report.differs(what, format!("{:x}", pending::set(was)), found);
    }
    let (was, is) = (of_others(was), of_others(is));
    if was != is {
        let words = |signals: &[SignalInfo]| {
            let word = |info| format!("{} (code {})", pending::number(info), pending::code(info));
            signals.iter().map(word).collect::<Vec<_>>().join(", ")
        };
        report.differs(what, words(&was), words(&is));
    }
}

fn verify_from_outside(process: &RecordedProcess<'_>, report: &mut Report<'_>) -> Result<()> {
    let pid = process.pid();
    let status = Status(fs::read_to_string(procfs::path(pid, "status")).about(pid, "status")?);
    let umask = status.number("Umask", 8);
    report.same("umask", &process.record.state.umask, &umask);
    let (ignored, caught) = dispositions(process.actions);
    report.same("signals ignored", &ignored, &status.set("SigIgn"));
    report.same("signals caught", &caught, &status.set("SigCgt"));
    let shared = ptrace::pending_signals(pid, Queue::Shared).about(pid, "pending signals")?;
    let what = "signals that wait for the process";
    let queues = (process.pending, shared.as_slice());
    verify_pending(report, what, process, queues, status.set("ShdPnd"));

    let directory = fs::metadata(procfs::path(pid, "cwd")).about(pid, "working directory")?;
    let live = [directory.dev(), directory.ino()];
    report.same("working directory", &process.record.state.directory, &live);
    let names = &process.record.state.host_names;
    if *names != NOBODYS {
        let live = host_names::read(pid).about(pid, "the name of the host")?;
        report.same("names of the host and its domain", names, &live);
    }
    verify_settings(process, &process.record.settings, report)
}

fn verify_settings(
    process: &RecordedProcess<'_>,
    was: &Settings,
    report: &mut Report<'_>,
) -> Result<()> {
    let pid = process.pid();
    let read = |name| fs::read_to_string(procfs::path(pid, name)).unwrap_or_default();
    let score = read("oom_score_adj").trim().parse().unwrap_or(0);
    report.same("oom_score_adj", &was.oom_score, &score);
    let filter = u64::from_str_radix(read("coredump_filter").trim(), 16).unwrap_or(0);
    report.same("coredump_filter", &was.core_filter, &filter);
    let stat = procfs::Stat::read(pid).about(pid, "stat")?;
    report.same("bounds of the program", &was.bounds, &stat.bounds());
    Ok(())
}

fn dispositions(actions: &[Action]) -> (u64, u64) {
    let (mut ignored, mut caught) = (0, 0);
    for (index, action) in actions.iter().enumerate() {
        match action.handler as libc::sighandler_t {
            libc::SIG_DFL => {}
            libc::SIG_IGN => ignored |= 1 << index,
            _ => caught |= 1 << index,
        }
    }
    (ignored, caught)
}

fn verify_by_batch(
    stopped: &mut Stopped<'_>,
    process: &RecordedProcess<'_>,
    report: &mut Report<'_>,
) -> Result<()> {
    let pid = process.pid();
    let (live, leader) = probe::process(stopped, pid)?;
    verify_process_state(process, &live, report);
    let timers = posix_timers::list_with_times(stopped, pid)?;
    for timer in &timers {
        if !process.posix_timers.iter().any(|was| was.is_same(timer)) {
            let what = format!("POSIX timer {}", timer.id);
            report.differs(&what, "no such timer", timer.describe());
        }
    }
    for was in &process.posix_timers {
        let what = format!("POSIX timer {}", was.id);
        match timers.iter().find(|timer| timer.is_same(was)) {
            Some(timer) => verify_time(report, &what, &was.time, &timer.time, NANOSECONDS),
            None => report.differs(&what, was.describe(), "no such timer"),
        }
    }
    for (tid, thread) in &process.threads {
        let mut live = if *tid == pid {
            leader
        } else {
            probe::thread(stopped, pid, *tid)?
        };
        live.rights.filters = filters(pid, *tid, &live.rights, 0)?;
        let was = &thread.record.state;
        let mut same = |what: &str, was: &[u64], is: &[u64]| {
            report.same(&format!("thread {tid}: {what}"), &was, &is);
        };
        same(
            "alternate stack",
            &was.alternate_stack,
            &live.alternate_stack,
        );
        same("robust list", &was.robust_list, &live.robust_list);
        same("tid address", &[was.tid_address], &[live.tid_address]);
        let (was_kept, is_kept) = (was.keep_capabilities, live.keep_capabilities);
        same("capabilities kept", &[was_kept], &[is_kept]);
        let policy = |policy: &MemoryPolicy| [&[policy.mode][..], &policy.nodes].concat();
        let (was_policy, is_policy) = (policy(&was.memory_policy), policy(&live.memory_policy));
        same("memory policy", &was_policy, &is_policy);
        same(
            "machine-check policy, time stamp counter, processor identification",
            &switches(was),
            &switches(&live),
        );
        same("speculation", &was.speculation, &live.speculation);
        same("I/O priority", &[was.io_priority], &[live.io_priority]);
        same("timer slack", &[was.timer_slack], &[live.timer_slack]);
        let (was_signal, is_signal) = (was.parent_death_signal, live.parent_death_signal);
        same("parent death signal", &[was_signal], &[is_signal]);
        report.same(
            &format!("thread {tid}: credentials"),
            &was.rights,
            &live.rights,
        );
    }
    Ok(())
}

fn switches(state: &ThreadState) -> [u64; 3] {
    [
        state.machine_check_policy,
        state.time_stamp_counter,
        state.processor_identification,
    ]
}

fn verify_process_state(
    process: &RecordedProcess<'_>,
    live: &ProcessProbe,
    report: &mut Report<'_>,
) {
    for (index, (was, is)) in process.actions.iter().zip(&live.actions).enumerate() {
        report.same(&format!("action of signal {}", index + 1), was, is);
    }
    let was = &process.record.state;
    for (limit, (was, is)) in was.limits.iter().zip(&live.state.limits).enumerate() {
        report.same(&format!("limit {limit}"), was, is);
    }
    report.same("root directory", &was.root, &live.state.root);
    report.same("dumpable", &was.dumpable, &live.state.dumpable);
    report.same("child subreaper", &was.subreaper, &live.state.subreaper);
    let (was_disabled, is_disabled) = (was.huge_pages_disabled, live.state.huge_pages_disabled);
    report.same("huge pages disabled", &was_disabled, &is_disabled);
    let (was_merges, is_merges) = (was.merges_memory, live.state.merges_memory);
    report.same("memory merged", &was_merges, &is_merges);
    report.same("personality", &was.personality, &live.state.personality);
    let timers = process.timers.interval.iter().zip(&live.timers.interval);
    for (timer, (was, is)) in timers.enumerate() {
        verify_time(
            report,
            &format!("interval timer {timer}"),
            was,
            is,
            MICROSECONDS,
        );
    }
}

const MICROSECONDS: i64 = 1_000_000;
const NANOSECONDS: i64 = 1_000_000_000;

/// Compares a timer whose parts of a second have this many to the second. It may have gone on since it was put back, for
/// as long as a rollback may take; one that was due within that time may have done so any number of times.
fn verify_time(
    report: &mut Report<'_>,
    what: &str,
    was: &TimerValue,
    is: &TimerValue,
    per_second: i64,
) {
    const LONGEST: f64 = 60.0;
    /// Clocks of processor time are rounded up to a tick, of at most a hundredth of a second.
    const TICK: f64 = 0.02;
    let seconds = |time: &[i64; 2]| time[0] as f64 + time[1] as f64 / per_second as f64;
    report.same(&format!("{what}: interval"), &was[0], &is[0]);
    let (expected, found) = (seconds(&was[1]), seconds(&is[1]));
    let runs = expected > 0.0;
    let fine = if !runs {
        found == 0.0
    } else if expected <= LONGEST {
        found <= expected.max(seconds(&was[0])) + TICK
    } else {
        (expected - LONGEST..=expected + TICK).contains(&found)
    };
    if !fine {
        let words = |left: f64| format!("{left} s left");
        report.differs(what, words(expected), words(found));
    }
}
