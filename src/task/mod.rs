//! Per-thread and per-process state other than memory and descriptors: registers, signals, timers, limits, credentials.
//!
//! In the order of use:
//!
//! | function | when | what |
//! |---|---|---|
//! | [`prepare`] | after every stop, before any batch | makes it safe to run something else on a thread: restartable sequences are aborted, calls that only the stop has ended start again |
//! | [`ask`], [`Asked::record`] | checkpoint | live state to records |
//! | [`Recorded::read`] | rollback | a view of the records, in place |
//! | [`Lost`], [`Questions`], [`check_from_outside`], [`check`] | rollback, before anything is touched | observes the live state; which processes are to be made again; refuses what can't be undone |
//! | [`kill_born`] | rollback | ends processes and threads born since, and has them reaped |
//! | [`make`], [`clear`], [`settle_in`], [`join_groups`], [`end`] | rollback | make processes again |
//! | [`revive`] | rollback | makes threads again that have ended |
//! | [`loosen`] | rollback, before memory and descriptors | what would be in the way of those: limits, rseq areas |
//! | [`restore`] | rollback, after memory and descriptors | puts back what differs |
//! | [`verify`] | after a rollback | compares live and recorded state by other means |
//! | [`wait_on`] | last of all | has threads wait in their calls for the time that was left |
//!
//! State that only the thread itself can be asked for is read by one batch per thread ([`probe`]); a batch that changes
//! something is run only where something differs, so that a thread that did nothing special since the checkpoint costs
//! one batch and a few ptrace requests.
//!
//! # What is not exact
//!
//! - What was left to wait of a sleep, a poll or a futex wait is known to the kernel alone, and is read by BPF. Where that can't
//!   be had they start again with their whole time, but for sleeps that have what is left written over what they asked for. An
//!   `epoll_wait` with a time limit does so at every stop, where the kernel would have ended it with `EINTR`.
//! - A POSIX timer signal that was pending at the checkpoint is queued again as a plain signal, with the overrun count
//!   that it had when it was queued.
//! - Processor time (`times(2)`, `ITIMER_PROF`'s clock) goes on; timers on such clocks get back their remaining time.

mod ask;
mod born;
mod capture;
mod check;
mod interrupted;
mod layout;
mod lost;
mod pending;
mod posix_timers;
mod prepare;
pub mod probe;
mod recorded;
mod remake;
mod restore;
mod revive;
mod rights;
mod room;
mod settings;
mod standing;
mod steps;
mod time_left;
mod transplant;
mod verify;

pub use ask::{Asked, ask};
pub use born::kill_born;
pub use capture::identify;
pub use check::{Changed, Observed, check, check_from_outside};
pub use layout::{
    Action, Identity, ProcessRecord, ProcessState, ThreadRecord, ThreadState, TimersRecord,
};
pub use lost::{Lost, numbers, shadow_obstacle};
pub use posix_timers::PosixTimer;
pub use prepare::prepare;
pub use probe::{Leader, Questions};
pub use recorded::{Recorded, RecordedProcess, RecordedThread, Renamed};
pub use remake::{clear, end, join_groups, make, settle_anew, settle_in};
pub use restore::{loosen, restore};
pub use revive::revive;
pub use rights::{has_rights_of, keeps_rights, may_set_program};
pub use room::check_room;
pub use settings::Settings;
pub use standing::Standing;
pub use time_left::{prepare_time_left, wait_on};
pub use transplant::{check_transplant, transplant};
pub use verify::verify;

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::freeze;
use crate::outcome::Refusal;
use crate::record;

/// What can go wrong with the state of processes and threads.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be done, and nothing was touched.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Stopping, or running a batch, failed.
    #[error(transparent)]
    Freeze(freeze::Error),
    /// The context does not take or does not hold a record.
    #[error(transparent)]
    Record(#[from] record::Error),
    /// A call made in the target failed.
    #[error("{what} in thread {tid}: {errno}")]
    Call {
        /// The thread that made it.
        tid: Pid,
        /// The call.
        what: &'static str,
        /// Its error.
        errno: Errno,
    },
    /// A request of ours to the kernel failed.
    #[error("{what} of {tid}: {error}")]
    System {
        /// The request.
        what: &'static str,
        /// The process or thread.
        tid: Pid,
        /// Its error.
        error: std::io::Error,
    },
}

impl From<freeze::Error> for Error {
    fn from(error: freeze::Error) -> Self {
        match error {
            freeze::Error::Refused(refusal) => Self::Refused(refusal),
            error => Self::Freeze(error),
        }
    }
}

/// Result of this room.
pub type Result<T> = std::result::Result<T, Error>;

/// Names the request of ours that failed, and whom it was about.
trait About<T> {
    fn about(self, tid: Pid, what: &'static str) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> About<T> for std::result::Result<T, E> {
    fn about(self, tid: Pid, what: &'static str) -> Result<T> {
        self.map_err(|error| Error::System {
            what,
            tid,
            error: error.into(),
        })
    }
}

#[cfg(test)]
mod tests;
