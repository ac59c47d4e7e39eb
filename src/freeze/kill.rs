//! Ending processes and threads of a stopped tree.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use crate::kernel::pidfd;
use crate::kernel::ptrace::{self, Event};

use super::stopped::Stopped;
use super::{Batch, Context, Error, Result};

impl Stopped<'_> {
    /// Kills processes and waits until they are gone or zombies of their parents; they are no longer part of the
    /// stopped tree.
    pub fn kill(&mut self, pids: &[Pid]) -> Result<()> {
        for pid in pids {
            match pidfd::send_signal(self.member(*pid)?.pidfd.as_fd(), libc::SIGKILL) {
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(errno) => return Err(errno).context(|| format!("kill {pid}")),
            }
        }
        for pid in pids {
            let Some(mut process) = self.processes.remove(pid) else {
                continue;
            };
            // The leader's end is reported last.
            process.threads.reverse();
            for thread in &process.threads {
                await_end(thread.tid)?;
            }
        }
        Ok(())
    }

    /// Kills a process, if it has not just ended by itself, and keeps it in the stopped tree as the zombie that it is.
    pub fn note_end(&mut self, pid: Pid) -> Result<()> {
        let parent = self.processes.get(&pid).ok_or(Error::Gone(pid))?.parent;
        self.kill(&[pid])?;
        self.note_process(pid, parent);
        Ok(())
    }

    /// Has a thread other than the leader end by itself, as exit(2) does it.
    pub fn end_thread(&mut self, pid: Pid, tid: Pid) -> Result<()> {
        let mut batch = Batch::new();
        batch.call(libc::SYS_exit, &[0.into()]);
        match self.run_on(pid, tid, &batch) {
            Err(Error::Gone(_)) => {}
            Err(error) => return Err(error),
            Ok(_) => {
                return Err(Error::Unexpected {
                    tid,
                    event: "a return from exit".into(),
                });
            }
        }
        if let Some(process) = self.processes.get_mut(&pid) {
            process.threads.retain(|thread| thread.tid != tid);
        }
        Ok(())
    }
}

/// Waits for the end of all tracees, which were killed. False: some have not ended in time.
pub fn collect_all_deaths() -> bool {
    const PATIENCE: Duration = Duration::from_secs(10);
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        match ptrace::poll_any() {
            Ok(Some((_, Event::Exited(_)))) => {}
            Ok(Some((tid, _))) => drop(ptrace::resume(tid, 0)),
            Ok(None) => std::thread::sleep(Duration::from_millis(1)),
            Err(_) => return true,
        }
    }
    false
}

/// Waits for the end of a task that is traced.
pub(super) fn await_end(tid: Pid) -> Result<()> {
    loop {
        match ptrace::wait(tid) {
            Ok(Event::Exited(_)) => return Ok(()),
            Ok(_) => {}
            // Reaped already.
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => return Ok(()),
            Err(error) => return Err(error).context(|| format!("wait for {tid}")),
        }
    }
}
