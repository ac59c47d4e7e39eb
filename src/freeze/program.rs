//! Having a stopped process execute a program, before whose first instruction it stops again.

use nix::unistd::Pid;
use zerocopy::IntoBytes;

use crate::kernel::ptrace::{self, Event, Options};

use super::bootstrap::leave_call;
use super::inject::wait;
use super::stopped::Stopped;
use super::thread::Thread;
use super::{Batch, Context, Error, Result};

impl Stopped<'_> {
    /// Has a process with a window, and with a single thread, execute the program that it has open as `descriptor`, without
    /// arguments (execveat(2)). It has another address space then, and no window. If the tracer dies it is killed.
    pub fn execute_program(&mut self, pid: Pid, descriptor: i32) -> Result<()> {
        let mut batch = Batch::new();
        let empty = batch.filled(b"\0");
        let arguments = batch.filled([0u64, 0].as_bytes());
        let environment = batch.input(0u64.as_bytes());
        batch.point(&arguments, 0, &empty);
        batch.call(
            libc::SYS_execveat,
            &[
                descriptor.into(),
                empty.arg(),
                arguments.arg(),
                environment,
                libc::AT_EMPTY_PATH.into(),
            ],
        );
        ptrace::set_options(pid, Options::UNTIL_EXECUTED)
            .context(|| format!("ptrace options of {pid}"))?;
        self.start(pid, &batch)?;
        loop {
            match wait(pid)? {
                Event::Other(libc::PTRACE_EVENT_EXEC) => break,
                Event::Exited(_) => return Err(Error::Gone(pid)),
                Event::Interrupted => {
                    ptrace::resume(pid, 0).context(|| format!("resume {pid}"))?;
                }
                // Back from the call, which has failed.
                event => {
                    return Err(Error::Unexpected {
                        tid: pid,
                        event: format!("{event:?} where it executes a program"),
                    });
                }
            }
        }
        let process = self.processes.get_mut(&pid).ok_or(Error::Gone(pid))?;
        process.threads = vec![Thread::born(pid)];
        // The window has gone with the address space.
        self.open_member(pid)?;
        // What the call returns is yet to be put into its registers.
        leave_call(pid)?;
        ptrace::set_options(pid, Options::HOLD_OR_KILL)
            .context(|| format!("ptrace options of {pid}"))
    }
}
