//! Threads that wait in a system call with a time limit of our choosing.

use nix::unistd::Pid;

use crate::kernel::ptrace::{self, Event, Registers};
use crate::kernel::runner::goes_on_by_block;

use super::bootstrap::await_call;
use super::inject::{DATA_OFFSET, wait};
use super::stopped::Stopped;
use super::{Context, Error, Result, refuse};

impl Stopped<'_> {
    /// Has a thread that is about to make a system call make it, with the arguments that `call` gives for its registers and
    /// the address of `data`, and stops it there: as if it had waited, and had been interrupted, in a call with its own
    /// arguments. So the kernel goes on with the time limit that it was given.
    ///
    /// If the call does not wait the thread has its result. Needs a window; nothing else may run in the thread afterwards
    /// until it runs on.
    pub fn wait_in_call(
        &mut self,
        (pid, tid): (Pid, Pid),
        data: &[u8],
        call: impl FnOnce(Registers, u64) -> Registers,
    ) -> Result<()> {
        let process = self.processes.get_mut(&pid).ok_or(Error::Gone(pid))?;
        let member = self.tree.members.get_mut(&pid).ok_or(Error::Gone(pid))?;
        let window = member
            .window
            .as_mut()
            .ok_or_else(|| refuse(pid, "the window", "it is missing"))?;
        let thread = process.thread_mut(tid).ok_or(Error::Gone(tid))?;
        let own = *thread.registers()?;
        thread.signal_mask()?;
        window.window.write(DATA_OFFSET, data);
        let call = call(own, window.address_of(DATA_OFFSET));

        thread.state.mask_differs = true;
        thread.state.signals_blocked = false;
        ptrace::set_signal_mask(tid, u64::MAX).context(|| format!("block signals of {tid}"))?;
        thread.state.registers_differ = true;
        ptrace::set_registers(tid, &call).context(|| format!("set registers of {tid}"))?;
        await_call(thread)?;
        // Asked to stop before it can wait, it finds that out when it is about to.
        loop {
            ptrace::resume_to_stop(tid, 0).context(|| format!("resume {tid}"))?;
            match wait(tid)? {
                Event::Interrupted => break,
                Event::Signal(libc::SIGSTOP) => thread.state.owed = Some(libc::SIGSTOP),
                Event::Exited(_) => return Err(Error::Gone(tid)),
                event => {
                    return Err(Error::Unexpected {
                        tid,
                        event: format!("{event:?}"),
                    });
                }
            }
        }
        let now = ptrace::registers(tid).context(|| format!("registers of {tid}"))?;
        let interrupted = Registers {
            rdi: own.rdi,
            rsi: own.rsi,
            rdx: own.rdx,
            r10: own.r10,
            r8: own.r8,
            r9: own.r9,
            ..now
        };
        thread.set_registers(&interrupted);
        if goes_on_by_block(&interrupted) {
            self.tree.calls.enter(tid, &interrupted, call.rax);
        }
        Ok(())
    }
}
