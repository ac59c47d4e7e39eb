//! Staying with a process of a container until it ends: its signals, its terminal, its exit status.

use std::os::fd::AsFd;

use anyhow::Context;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::Status;
use super::terminal::Terminal;
use crate::container::children;
use crate::container::create::Child;
use crate::kernel::{disposition, pidfd};

/// Signals wait here, from before the container is created until it is attended to, so that none is lost between and
/// none ends us half-way.
#[derive(Debug)]
pub(super) struct Signals {
    waiting: SignalFd,
    /// The mask we were started with, for the program.
    pub(super) before: SigSet,
}

impl Signals {
    /// Blocks all signals but those that a fault of our own raises.
    pub(super) fn hold() -> anyhow::Result<Signals> {
        let mut held = SigSet::all();
        for fault in [
            Signal::SIGSEGV,
            Signal::SIGBUS,
            Signal::SIGILL,
            Signal::SIGFPE,
            Signal::SIGTRAP,
            Signal::SIGSYS,
        ] {
            held.remove(fault);
        }
        let before = SigSet::thread_get_mask().context("reading the signal mask")?;
        // A caller that ignores it would make the kernel throw the program's exit status away.
        disposition::set_default(Signal::SIGCHLD).context("resetting SIGCHLD")?;
        held.thread_block().context("blocking signals")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let waiting = SignalFd::with_flags(&held, flags).context("creating a signalfd")?;
        Ok(Signals { waiting, before })
    }

    /// The signal that asked us to stop meanwhile, if one did.
    pub(super) fn interruption(&self) -> anyhow::Result<Option<Signal>> {
        while let Some(info) = self.waiting.read_signal().context("reading the signalfd")? {
            match Signal::try_from(info.ssi_signo.cast_signed()) {
                Ok(signal @ (Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP)) => {
                    return Ok(Some(signal));
                }
                _ => continue,
            }
        }
        Ok(None)
    }

    /// Sends on what has come in.
    fn forward(&self, child: &Child, terminal: Option<&Terminal>) -> anyhow::Result<()> {
        while let Some(info) = self.waiting.read_signal().context("reading the signalfd")? {
            let signal = info.ssi_signo.cast_signed();
            match (signal, terminal) {
                // Ours alone: about our children and our own output.
                (libc::SIGCHLD | libc::SIGPIPE, _) => (),
                (libc::SIGWINCH, Some(terminal)) => terminal.resize(),
                _ => match pidfd::send_signal(child.pidfd.as_fd(), signal) {
                    Ok(()) | Err(Errno::ESRCH) => (),
                    Err(error) => {
                        return Err(error).with_context(|| format!("forwarding signal {signal}"));
                    }
                },
            }
        }
        Ok(())
    }
}

/// Waits for the end of a process, forwarding signals and its terminal's input and output meanwhile; returns its exit
/// status. The end is seen by the process's descriptor: also one that came before we looked.
pub(super) fn attend(
    child: &Child,
    signals: &Signals,
    mut terminal: Option<Terminal>,
) -> anyhow::Result<Status> {
    loop {
        let mut watched = vec![
            PollFd::new(child.pidfd.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.waiting.as_fd(), PollFlags::POLLIN),
        ];
        if let Some(terminal) = &terminal {
            watched.extend(terminal.watched());
        }
        match poll(&mut watched, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => (),
            Err(error) => return Err(error).context("waiting for the program"),
        }
        let ended = watched[0].any().unwrap_or(false);
        let ready: Vec<_> = watched[2..]
            .iter()
            .map(|fd| fd.revents().unwrap_or(PollFlags::empty()))
            .collect();
        signals.forward(child, terminal.as_ref())?;
        if let Some(terminal) = &mut terminal {
            terminal.transfer(&ready)?;
        }
        if ended {
            if let Some(terminal) = &mut terminal {
                terminal.finish()?;
            }
            return reap(child);
        }
    }
}

fn reap(child: &Child) -> anyhow::Result<Status> {
    loop {
        let waited = waitpid(child.pid, Some(WaitPidFlag::__WALL));
        match waited {
            Ok(WaitStatus::Exited(_, code)) => {
                children::reap();
                return Ok(Status::Program(code as u8));
            }
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                children::reap();
                return Ok(Status::Program(128 + signal as u8));
            }
            Ok(_) | Err(Errno::EINTR) => (),
            Err(error) => return Err(error).context("reading the program's exit status"),
        }
    }
}
