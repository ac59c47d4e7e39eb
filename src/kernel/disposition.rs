//! Signal dispositions of the calling process: signal(2).
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal, signal};

/// Gives a signal its default action again. Rust's start-up ignores `SIGPIPE`, and an ignored signal stays ignored
/// through execve(2): without this a program started from here would see `EPIPE` where it expects to be ended.
pub fn set_default(which: Signal) -> Result<(), Errno> {
    // SAFETY: installs no handler, so no code can run in a signal context.
    unsafe { signal(which, SigHandler::SigDfl) }.map(drop)
}
