//! Shadows: stopped children that keep a copy-on-write copy of an address space.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::freeze::{Error, Stopped};
use crate::kernel::ptrace::{self, Event, Options};
use crate::kernel::{procfs, remote_memory};

use super::Result;
use super::ranges::Span;

/// A shadow. It is traced by the thread that made it and dies with that thread.
#[derive(Debug)]
pub struct Shadow {
    /// Its PID in our namespace.
    pub pid: Pid,
    memory: File,
    /// `/proc/PID/pagemap` of it.
    pub pagemap: File,
    /// Its death was seen and collected: from then on the PID may be another process's.
    is_dead: AtomicBool,
}

impl Shadow {
    /// Takes over a child fresh from clone(2), seized and stopped. It shares its parent's file table until here.
    pub fn adopt(stopped: &mut Stopped, parent: Pid, pid: Pid) -> Result<Self> {
        let system = |what: &str, error: Errno| Error::System {
            what: format!("{what} of shadow {pid}"),
            error: error.into(),
        };
        ptrace::set_options(pid, Options::SHADOW)
            .map_err(|errno| system("ptrace options", errno))?;
        stopped.tree_mut().add_shadow(pid);
        // It must not hold the parent's pipes and sockets open, nor be hit by signals to the parent's process group.
        stopped.run_in_copy(
            parent,
            pid,
            &[
                (
                    libc::SYS_close_range,
                    [0, u64::from(u32::MAX), CLOSE_RANGE_UNSHARE],
                ),
                (libc::SYS_setsid, [0; 3]),
            ],
        )?;
        let open = |name: &str| {
            File::open(procfs::path(pid, name)).map_err(|error| Error::System {
                what: format!("open /proc/{pid}/{name}"),
                error,
            })
        };
        Ok(Self {
            pid,
            memory: open("mem")?,
            pagemap: open("pagemap")?,
            is_dead: AtomicBool::new(false),
        })
    }

    /// Whether it is still there. Something in the container may have killed it, or the container was ended: its PID
    /// namespace is not gone before the tracer has collected the deaths of all its tracees in there.
    pub fn is_alive(&self) -> bool {
        if self.is_dead.load(Ordering::Relaxed) {
            return false;
        }
        let has_died = matches!(ptrace::poll(self.pid), Ok(Some(Event::Exited(_))) | Err(_));
        self.is_dead.store(has_died, Ordering::Relaxed);
        !has_died
    }

    /// Reads ranges of the address space as they were, one after the other, into `buffer`.
    pub fn read(&self, spans: &[Span], buffer: &mut [u8]) -> std::io::Result<()> {
        let ranges: Vec<_> = spans
            .iter()
            .map(|span| remote_memory::Range {
                start: span.start,
                len: span.len() as usize,
            })
            .collect();
        if remote_memory::read(self.pid, &ranges, buffer).is_ok() {
            return Ok(());
        }
        // Some of it is not readable to the program itself.
        let mut at = 0;
        for range in ranges {
            self.memory
                .read_exact_at(&mut buffer[at..at + range.len], range.start)?;
            at += range.len;
        }
        Ok(())
    }

    /// Kills it and collects its exit. Its parent still has to reap it.
    pub fn kill(&self) {
        if !self.is_alive() {
            return;
        }
        let _ = nix::sys::signal::kill(self.pid, nix::sys::signal::SIGKILL);
        while !matches!(ptrace::wait(self.pid), Ok(Event::Exited(_)) | Err(_)) {}
        self.is_dead.store(true, Ordering::Relaxed);
    }
}

const CLOSE_RANGE_UNSHARE: u64 = 1 << 1;
