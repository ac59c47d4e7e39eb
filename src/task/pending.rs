//! Signals that wait: their encoding, and the steps that take and queue them.

use crate::freeze::{Arg, Batch, StepId};
use crate::kernel::ptrace::SignalInfo;

/// Signals whose default action is to be ignored: SIGCHLD, SIGCONT, SIGURG, SIGWINCH.
pub(super) const IGNORED_BY_DEFAULT: u64 =
    bit(libc::SIGCHLD) | bit(libc::SIGCONT) | bit(libc::SIGURG) | bit(libc::SIGWINCH);

/// Most signals of one queue that are recorded, and most that one batch takes or queues.
pub(super) const MOST: usize = 1000;

/// The bit of a signal in a mask.
pub(super) const fn bit(signal: i32) -> u64 {
    if signal >= 1 && signal <= 64 {
        1 << (signal - 1)
    } else {
        0
    }
}

/// `si_signo`.
pub(super) fn number(info: &SignalInfo) -> i32 {
    word(info, 0)
}

/// `si_code`.
pub(super) fn code(info: &SignalInfo) -> i32 {
    word(info, 8)
}

/// `si_timerid` of a timer's signal.
pub(super) fn timer(info: &SignalInfo) -> i32 {
    word(info, 16)
}

fn word(info: &SignalInfo, at: usize) -> i32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&info[at..at + 4]);
    i32::from_ne_bytes(bytes)
}

/// The signals of a queue as a mask.
pub(super) fn set(signals: &[SignalInfo]) -> u64 {
    signals
        .iter()
        .map(|info| bit(number(info)))
        .fold(0, |all, bit| all | bit)
}

/// Takes `count` signals of `set` from the thread that runs the batch: its own first, then those of the process.
/// All signals are blocked while a batch runs, so none is delivered instead.
pub(super) fn take(batch: &mut Batch, set: u64, count: usize) {
    if count == 0 {
        return;
    }
    let set = batch.input(&set.to_ne_bytes());
    let at_once = batch.input(&[0; 16]);
    for _ in 0..count {
        batch.call(
            libc::SYS_rt_sigtimedwait,
            &[set, 0.into(), at_once, 8.into()],
        );
    }
}

/// Whom signals are queued for; ids as the process itself knows them.
#[derive(Debug, Clone, Copy)]
pub(super) enum For {
    Process { pid: u64 },
    Thread { pid: u64, tid: u64 },
}

/// Queues signals for the process or thread that runs the batch, `siginfo_t` byte for byte; only it may do that
/// (rt_sigqueueinfo(2)).
pub(super) fn queue(
    batch: &mut Batch,
    whom: For,
    signals: &[SignalInfo],
) -> Vec<(StepId, &'static str)> {
    let add = |info: &SignalInfo| {
        let data = batch.input(info);
        let signal = Arg::from(number(info));
        match whom {
            For::Process { pid } => {
                let arguments = [pid.into(), signal, data];
                let step = batch.call(libc::SYS_rt_sigqueueinfo, &arguments);
                (step, "rt_sigqueueinfo")
            }
            For::Thread { pid, tid } => {
                let arguments = [pid.into(), tid.into(), signal, data];
                let step = batch.call(libc::SYS_rt_tgsigqueueinfo, &arguments);
                (step, "rt_tgsigqueueinfo")
            }
        }
    };
    signals.iter().map(add).collect()
}
