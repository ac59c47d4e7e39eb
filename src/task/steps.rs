//! Batches all of whose steps have to work.

use nix::unistd::Pid;

use crate::freeze::{Arg, Batch, StepId, Stopped};

use super::{Error, Result};

/// Flags of rseq(2).
pub(super) const RSEQ_REGISTER: i32 = 0;
/// See [`RSEQ_REGISTER`].
pub(super) const RSEQ_UNREGISTER: i32 = 1;

/// A batch all of whose steps have to work, each with its name.
pub(super) struct Steps {
    tid: Pid,
    /// The batch, to which what the steps need can be added.
    pub(super) batch: Batch,
    /// The steps and their names.
    pub(super) named: Vec<(StepId, &'static str)>,
}

impl Steps {
    /// No steps yet, for this thread.
    pub(super) fn new(tid: Pid) -> Self {
        Self {
            tid,
            batch: Batch::new(),
            named: Vec::new(),
        }
    }

    /// Adds a call.
    pub(super) fn call(&mut self, what: &'static str, number: libc::c_long, arguments: &[Arg]) {
        let step = self.batch.call(number, arguments);
        self.named.push((step, what));
    }

    /// Adds a prctl(2) with one argument.
    pub(super) fn prctl(&mut self, what: &'static str, option: i32, value: Arg) {
        let zero = 0.into();
        self.call(
            what,
            libc::SYS_prctl,
            &[option.into(), value, zero, zero, zero],
        );
    }

    /// Adds a call of rseq(2).
    pub(super) fn rseq(&mut self, address: u64, size: u32, flags: i32, signature: u32) {
        self.call(
            "rseq",
            libc::SYS_rseq,
            &[address.into(), size.into(), flags.into(), signature.into()],
        );
    }

    /// Runs it, if there is anything to do, in its thread of process `pid`.
    pub(super) fn run(self, stopped: &mut Stopped<'_>, pid: Pid) -> Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let done = stopped.run_on(pid, self.tid, &self.batch)?;
        for (step, what) in self.named {
            done.result(step).map_err(|errno| Error::Call {
                tid: self.tid,
                what,
                errno,
            })?;
        }
        Ok(())
    }
}
