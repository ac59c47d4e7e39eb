//! Signal dispositions of the calling process: signal(2), sigaction(2).
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction, signal};

/// Gives a signal its default action again. Rust's start-up ignores `SIGPIPE`, and an ignored signal stays ignored
/// through execve(2): without this a program started from here would see `EPIPE` where it expects to be ended.
pub fn set_default(which: Signal) -> Result<(), Errno> {
    // SAFETY: installs no handler, so no code can run in a signal context.
    unsafe { signal(which, SigHandler::SigDfl) }.map(drop)
}

/// Asks for `SIGCHLD` only when a child or tracee has died, not at each of its stops (`SA_NOCLDSTOP`, which holds for
/// the stops of tracees too).
pub fn tell_deaths_only() -> Result<(), Errno> {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::SA_NOCLDSTOP, SigSet::empty());
    // SAFETY: installs no handler, so no code can run in a signal context.
    unsafe { sigaction(Signal::SIGCHLD, &action) }.map(drop)
}

/// Asks for `SIGCHLD` also when a child or tracee stops.
pub fn tell_stops_too() -> Result<(), Errno> {
    set_default(Signal::SIGCHLD)
}
