//! A stopped thread: registers and signal mask to run on with.

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::kernel::ptrace::{self, Registers};

use super::{Context, Error, Result};

/// A stopped thread.
#[derive(Debug)]
pub struct Thread {
    /// Its TID in our namespace.
    pub tid: Pid,
    pub(super) state: State,
}

/// What has been read and changed of a stopped thread's registers.
#[derive(Debug, Default)]
pub(super) struct State {
    /// It has reported its stop; before that it can't be let go.
    pub(super) stopped: bool,
    /// The registers to run on with; read when first needed.
    pub(super) registers: Option<Box<Registers>>,
    /// The signal mask to run on with, once it was read.
    pub(super) mask: Option<u64>,
    /// The task's registers are not those of `registers`.
    pub(super) registers_differ: bool,
    /// The task's mask is not `mask`.
    pub(super) mask_differs: bool,
    /// The mask in the task is that of a batch.
    pub(super) signals_blocked: bool,
    /// A signal taken from the task that it still has to get.
    pub(super) owed: Option<i32>,
}

impl Thread {
    /// One that was asked to stop.
    pub(super) fn new(tid: Pid) -> Self {
        Self {
            tid,
            state: State::default(),
        }
    }

    /// One that was made by a batch and is stopped.
    pub(super) fn born(tid: Pid) -> Self {
        let mut thread = Self::new(tid);
        thread.state.stopped = true;
        thread
    }

    /// The registers it will run on with.
    pub fn registers(&mut self) -> Result<&Registers> {
        if self.state.registers.is_none() {
            let registers =
                ptrace::registers(self.tid).context(|| format!("registers of {}", self.tid))?;
            self.state.registers = Some(Box::new(registers));
        }
        self.state.registers.as_deref().ok_or(Error::Gone(self.tid))
    }

    /// Sets the registers it will run on with.
    pub fn set_registers(&mut self, registers: &Registers) {
        self.state.registers = Some(Box::new(*registers));
        self.state.registers_differ = true;
    }

    /// The signal mask it will run on with.
    pub fn signal_mask(&mut self) -> Result<u64> {
        if let Some(mask) = self.state.mask {
            return Ok(mask);
        }
        let mask =
            ptrace::signal_mask(self.tid).context(|| format!("signal mask of {}", self.tid))?;
        self.state.mask = Some(mask);
        Ok(mask)
    }

    /// Sets the signal mask it will run on with.
    pub fn set_signal_mask(&mut self, mask: u64) {
        self.state.mask = Some(mask);
        self.state.mask_differs = true;
    }

    /// Puts registers and mask into the task as they are to be when it runs on.
    pub fn settle(&mut self) -> Result<()> {
        if std::mem::take(&mut self.state.registers_differ)
            && let Some(registers) = &self.state.registers
        {
            ptrace::set_registers(self.tid, registers)
                .context(|| format!("set registers of {}", self.tid))?;
        }
        if std::mem::take(&mut self.state.mask_differs)
            && let Some(mask) = self.state.mask
        {
            self.state.signals_blocked = false;
            ptrace::set_signal_mask(self.tid, mask)
                .context(|| format!("set signal mask of {}", self.tid))?;
        }
        Ok(())
    }

    /// Lets it run on as it is to; returns whether it does. One that was killed while it was stopped is still ours, and its
    /// death is to be collected.
    pub(super) fn release(&mut self) -> Result<bool> {
        let is_gone = |error: &Error| matches!(error, Error::System { error, .. } if error.raw_os_error() == Some(libc::ESRCH));
        match self.settle() {
            Err(error) if is_gone(&error) => return Ok(false),
            settled => settled?,
        }
        match ptrace::detach(self.tid, self.state.owed.take().unwrap_or(0)) {
            Ok(()) => Ok(true),
            Err(Errno::ESRCH) => Ok(false),
            Err(errno) => Err(errno).context(|| format!("detach from {}", self.tid)),
        }
    }
}
