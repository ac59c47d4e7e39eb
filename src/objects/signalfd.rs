//! signalfd(2).

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::Error;
use super::live::Live;
use crate::kernel::anonymous;

/// The signals a signalfd accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Bit `n - 1` for signal `n`.
    pub mask: u64,
}

/// Records or observes a signalfd.
pub fn capture(live: &Live<'_>) -> Result<State, Error> {
    Ok(State {
        mask: live.fdinfo()?.hexadecimal("sigmask")?,
    })
}

impl State {
    /// Makes one like it. What it reads from is the process that reads, so it may be made anywhere.
    pub fn make(&self) -> Result<OwnedFd, Error> {
        anonymous::signalfd(self.mask).map_err(|errno| Error::Own {
            call: "signalfd4",
            errno,
        })
    }

    /// Gives a live one this mask.
    pub fn apply(&self, duplicate: OwnedFd) -> Result<(), Error> {
        anonymous::set_signalfd(&duplicate, self.mask).map_err(|errno| Error::Own {
            call: "signalfd4",
            errno,
        })
    }
}
