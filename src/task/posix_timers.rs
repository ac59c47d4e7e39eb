//! POSIX timers (timer_create(2)): what `/proc/PID/timers` tells of them, and the steps that bring them back.

use std::io;

use nix::errno::Errno;
use nix::unistd::Pid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::freeze::{Batch, StepId, Stopped, refuse};
use crate::kernel::procfs;

use super::layout::TimerValue;
use super::probe::fill;
use super::{About, Error, Result};

/// A POSIX timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct PosixTimer {
    /// Its number.
    pub id: i32,
    /// The clock it was made for.
    pub clock: i32,
    /// `SIGEV_*`.
    pub notify: i32,
    /// The signal it sends.
    pub signal: i32,
    /// The value that goes with the signal.
    pub value: u64,
    /// Whom it notifies, in our PID namespace: a thread with `SIGEV_THREAD_ID`, else the process.
    pub target: i32,
    /// Its overrun count (timer_getoverrun(2)).
    pub overrun: i32,
    /// Interval and time left in seconds and nanoseconds; no time left: it is not armed.
    pub time: TimerValue,
}

impl PosixTimer {
    /// Whether the other is this timer, whatever its time.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let fixed = |timer: &Self| Self {
            overrun: 0,
            time: TimerValue::default(),
            ..*timer
        };
        fixed(self) == fixed(other)
    }

    /// Whether it notifies this thread and no other.
    pub(super) fn notifies(&self, tid: i32) -> bool {
        self.notify & libc::SIGEV_THREAD_ID != 0 && self.target == tid
    }

    /// Whether it runs.
    pub(super) fn is_armed(&self) -> bool {
        self.time[1] != [0, 0]
    }

    /// Whether it counts the processor time of the thread that made it, which is not told.
    pub(super) fn is_of_a_thread(&self) -> bool {
        const PER_THREAD: i32 = 4;
        self.clock == libc::CLOCK_THREAD_CPUTIME_ID
            || (self.clock < 0 && self.clock & PER_THREAD != 0)
    }

    /// The timer in words.
    pub(super) fn describe(&self) -> String {
        format!(
            "clock {}, SIGEV {}, signal {}, value {:#x}, for {}",
            self.clock, self.notify, self.signal, self.value, self.target
        )
    }
}

/// The timers of a process, without their times.
pub(super) fn list(pid: Pid) -> Result<Vec<PosixTimer>> {
    let text = match std::fs::read_to_string(procfs::path(pid, "timers")) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::from(refuse(
                pid,
                "its POSIX timers",
                "this kernel does not list them; use one with CONFIG_CHECKPOINT_RESTORE",
            )));
        }
        Err(error) => return Err(error).about(pid, "timers"),
    };
    parse(&text)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not the format of proc(5)"))
        .about(pid, "timers")
}

/// Their times too, asked for by the process.
pub(super) fn list_with_times(stopped: &mut Stopped<'_>, pid: Pid) -> Result<Vec<PosixTimer>> {
    let mut timers = list(pid)?;
    if timers.is_empty() {
        return Ok(timers);
    }
    let mut batch = Batch::new();
    let asked: Vec<_> = timers
        .iter()
        .map(|timer| {
            let out = batch.output(size_of::<TimerValue>());
            let time = batch.call(libc::SYS_timer_gettime, &[timer.id.into(), out.arg()]);
            let overrun = batch.call(libc::SYS_timer_getoverrun, &[timer.id.into()]);
            (out, time, overrun)
        })
        .collect();
    let done = stopped.run(pid, &batch)?;
    for (timer, (out, time, overrun)) in timers.iter_mut().zip(asked) {
        let call = |what| {
            move |errno| Error::Call {
                tid: pid,
                what,
                errno,
            }
        };
        done.result(time).map_err(call("timer_gettime"))?;
        timer.time = fill(done.bytes(&out));
        timer.overrun = done.result(overrun).map_err(call("timer_getoverrun"))? as i32;
    }
    Ok(timers)
}

fn parse(text: &str) -> Option<Vec<PosixTimer>> {
    let mut lines = text.lines();
    let mut timers = Vec::new();
    while let Some(line) = lines.next() {
        let id = line.strip_prefix("ID: ")?.parse().ok()?;
        let (signal, value) = lines.next()?.strip_prefix("signal: ")?.split_once('/')?;
        let value = value.strip_prefix("0x").unwrap_or(value);
        let (how, target) = lines.next()?.strip_prefix("notify: ")?.split_once('/')?;
        let (kind, target) = target.split_once('.')?;
        let clock = lines.next()?.strip_prefix("ClockID: ")?.parse().ok()?;
        let how = match how {
            "signal" => libc::SIGEV_SIGNAL,
            "none" => libc::SIGEV_NONE,
            "thread" => libc::SIGEV_THREAD,
            _ => return None,
        };
        timers.push(PosixTimer {
            id,
            clock,
            notify: how
                | if kind == "tid" {
                    libc::SIGEV_THREAD_ID
                } else {
                    0
                },
            signal: signal.parse().ok()?,
            value: if value == "(null)" {
                0
            } else {
                u64::from_str_radix(value, 16).ok()?
            },
            target: target.trim().parse().ok()?,
            overrun: 0,
            time: TimerValue::default(),
        });
    }
    Some(timers)
}

/// `PR_TIMER_CREATE_RESTORE_IDS` (Linux 6.15): timer_create(2) takes the number it is to give.
const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
const OFF: i32 = 0;
const ON: i32 = 1;
const GET: i32 = 2;

/// Whether the kernel can make a timer with a given number.
pub(super) fn can_be_made_again(stopped: &mut Stopped<'_>, pid: Pid) -> Result<bool> {
    let mut batch = Batch::new();
    let get = mode(&mut batch, GET);
    match stopped.run(pid, &batch)?.result(get) {
        Ok(_) => Ok(true),
        Err(Errno::EINVAL) => Ok(false),
        Err(errno) => Err(Error::Call {
            tid: pid,
            what: "prctl PR_TIMER_CREATE_RESTORE_IDS",
            errno,
        }),
    }
}

fn mode(batch: &mut Batch, mode: i32) -> StepId {
    let zero = 0.into();
    batch.call(
        libc::SYS_prctl,
        &[
            PR_TIMER_CREATE_RESTORE_IDS.into(),
            mode.into(),
            zero,
            zero,
            zero,
        ],
    )
}

/// Adds the steps that make the live timers the recorded ones, with the time that was left to them.
/// `namespace_tid` gives a recorded thread's id as the process knows it.
pub(super) fn restore(
    batch: &mut Batch,
    live: &[PosixTimer],
    recorded: &[PosixTimer],
    namespace_tid: impl Fn(i32) -> u64,
) -> Vec<(StepId, &'static str)> {
    let mut steps = Vec::new();
    for timer in live {
        if !recorded.iter().any(|wanted| wanted.is_same(timer)) {
            let step = batch.call(libc::SYS_timer_delete, &[timer.id.into()]);
            steps.push((step, "timer_delete"));
        }
    }
    let missing = |timer: &&PosixTimer| !live.iter().any(|there| there.is_same(timer));
    if recorded.iter().any(|timer| missing(&timer)) {
        steps.push((mode(batch, ON), "prctl PR_TIMER_CREATE_RESTORE_IDS"));
        for timer in recorded.iter().filter(missing) {
            let event = batch.input(&event(timer, namespace_tid(timer.target)));
            let id = batch.input(&timer.id.to_ne_bytes());
            let step = batch.call(libc::SYS_timer_create, &[timer.clock.into(), event, id]);
            steps.push((step, "timer_create"));
        }
        steps.push((mode(batch, OFF), "prctl PR_TIMER_CREATE_RESTORE_IDS"));
    }
    for timer in recorded {
        let time = batch.input(timer.time.as_bytes());
        let relative = 0;
        let arguments = [timer.id.into(), relative.into(), time, 0.into()];
        let step = batch.call(libc::SYS_timer_settime, &arguments);
        steps.push((step, "timer_settime"));
    }
    steps
}

/// Its `struct sigevent`.
fn event(timer: &PosixTimer, tid: u64) -> [u8; 64] {
    let mut event = [0; 64];
    event[..8].copy_from_slice(&timer.value.to_ne_bytes());
    event[8..12].copy_from_slice(&timer.signal.to_ne_bytes());
    event[12..16].copy_from_slice(&timer.notify.to_ne_bytes());
    event[16..20].copy_from_slice(&(tid as i32).to_ne_bytes());
    event
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
        ID: 7\nsignal: 0/0000000000000000\nnotify: none/tid.12\nClockID: -6\n";

    #[test]
    fn parses_the_kernels_list() {
        let timers = parse(TEXT).unwrap();
        assert_eq!(timers.len(), 2);
        assert_eq!((timers[0].id, timers[0].signal), (1, 60));
        assert_eq!(timers[0].value, 0x7fff_86e4_52a8);
        assert_eq!((timers[0].notify, timers[0].target), (0, 2634));
        assert_eq!(timers[1].notify, libc::SIGEV_NONE | libc::SIGEV_THREAD_ID);
        assert_eq!(timers[1].clock, -6);
        assert!(parse("").unwrap().is_empty());
        assert!(parse("ID: x\n").is_none());
    }

    #[test]
    fn made_again_only_if_missing() {
        let timers = parse(TEXT).unwrap();
        let mut batch = Batch::new();
        restore(&mut batch, &timers, &timers, |_| 1);
        assert_eq!(batch.len(), timers.len());
        let mut batch = Batch::new();
        restore(&mut batch, &timers[..1], &timers[1..], |_| 1);
        assert_eq!(batch.len(), "delete on create off set".split(' ').count());
    }
}
