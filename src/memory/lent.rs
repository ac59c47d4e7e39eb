//! Pages that another keeper's shadow has, and lends to who makes a second container of its checkpoint.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::unistd::Pid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::kernel::{pidfd, procfs};

use super::ranges::{Ranges, Span};
use super::shadow;

/// Payload of a `Lender` record; a list of [`Span`], the pages that are in the shadow, follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct LenderHeader {
    /// PID of the shadow in the machine's PID namespace.
    pub pid: u64,
    /// When it was started, in clock ticks since boot: with the PID this names it.
    pub start_time: u64,
}

/// A shadow of another keeper's, of which pages are read. What is read after it has died is an error, also if another process
/// has got its PID.
#[derive(Debug)]
pub struct Lent {
    pid: Pid,
    pidfd: OwnedFd,
    memory: File,
    ranges: Ranges,
}

impl Lent {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// It has died.
    pub fn open(header: LenderHeader, ranges: Ranges) -> io::Result<Self> {
        let pid = i32::try_from(header.pid).ok().filter(|pid| *pid > 0);
        let pid = Pid::from_raw(pid.ok_or(io::ErrorKind::InvalidData)?);
        let lent = Self {
            pid,
            pidfd: pidfd::open(pid)?,
            memory: File::open(procfs::path(pid, "mem"))?,
            ranges,
        };
        if procfs::Stat::read(pid)?.start_time() != header.start_time {
            return Err(nix::errno::Errno::ESRCH.into());
        }
        // So the descriptor, the file and the time were of one process.
        lent.check()?;
        Ok(lent)
    }

    /// The pages that it lends.
    pub fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    /// Reads a range of them.
    ///
    /// # Errors
    ///
    /// It has died.
    pub fn read(&self, span: Span, buffer: &mut [u8]) -> io::Result<()> {
        shadow::read(self.pid, &self.memory, &[span], buffer)?;
        self.check()
    }

    /// Fails if it was not the shadow that answered.
    fn check(&self) -> io::Result<()> {
        Ok(pidfd::send_signal(self.pidfd.as_fd(), 0)?)
    }
}
