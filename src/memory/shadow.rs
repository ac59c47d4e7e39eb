//! Shadows: stopped children that keep a copy-on-write copy of an address space.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::unistd::Pid;

use crate::freeze::{Error, InCopy, Stopped};
use crate::kernel::ptrace::{self, EXITING, Event, Options};
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
    /// Whether a process made by it would live in the time namespace that the one it was made of lives in: a fork moves to
    /// that which was meant for children (time_namespaces(7)).
    pub keeps_time: bool,
    /// How far its end is.
    end: AtomicU8,
}

/// It is there.
const LIVES: u8 = 0;
/// It is about to end and stopped with its memory.
const ENDS: u8 = 1;
/// It was let go after that.
const WAS_LET_GO: u8 = 2;
/// Its death was seen and collected: from then on the PID may be another process's.
const DEAD: u8 = 3;

/// A child fresh from clone(2), seized and stopped, on its way to be a shadow. It shares its parent's file table until that
/// is finished.
#[derive(Debug)]
pub(super) struct Adoption {
    pid: Pid,
    keeps_time: bool,
    calls: InCopy,
}

impl Adoption {
    /// Takes over a child of `parent` whose PID in their namespace is `inside`.
    pub(super) fn start(stopped: &mut Stopped, parent: Pid, pid: Pid, inside: i32) -> Result<Self> {
        stopped.tree_mut().add_shadow(pid, inside);
        ptrace::set_options(pid, Options::SHADOW).map_err(|errno| Error::System {
            what: format!("ptrace options of shadow {pid}"),
            error: errno.into(),
        })?;
        // It must not hold the parent's pipes and sockets open, nor be hit by signals to the parent's process group, nor keep a
        // session's number from its leader, should that be made again. Only a session from outside of the tree it must not
        // leave: nothing else could bring back somebody to it.
        let is_guest = is_guest(stopped, parent);
        let leave = match is_guest {
            true => (libc::SYS_setpgid, [0; 3]),
            false => (libc::SYS_setsid, [0; 3]),
        };
        let calls = stopped.start_in_copy(
            parent,
            pid,
            &[
                (
                    libc::SYS_close_range,
                    [0, u64::from(u32::MAX), CLOSE_RANGE_UNSHARE],
                ),
                leave,
            ],
        )?;
        let time = |pid| std::fs::read_link(procfs::path(pid, "ns/time")).ok();
        let keeps_time = !is_guest || time(parent) == time(pid);
        Ok(Self {
            pid,
            keeps_time,
            calls,
        })
    }

    /// Waits until it is a shadow.
    pub(super) fn finish(self) -> Result<Shadow> {
        let Self {
            pid, keeps_time, ..
        } = self;
        let memory = self.calls.finish()?;
        let pagemap = File::open(procfs::path(pid, "pagemap")).map_err(|error| Error::System {
            what: format!("open /proc/{pid}/pagemap"),
            error,
        })?;
        Ok(Shadow {
            pid,
            memory,
            pagemap,
            keeps_time,
            end: AtomicU8::new(LIVES),
        })
    }
}

/// Whether a process's parent and the leader of its session are not of the tree.
fn is_guest(stopped: &Stopped, pid: Pid) -> bool {
    let has_parent = stopped
        .process(pid)
        .is_none_or(|process| stopped.process(process.parent).is_some());
    !has_parent
        && stopped
            .member(pid)
            .ok()
            .and_then(|member| procfs::Stat::read_held(&member.stat).ok())
            .is_some_and(|stat| stopped.process(stat.session()).is_none())
}

impl Shadow {
    /// Whether it is still there. Something in the container may have killed it, or the container was ended: its PID
    /// namespace is not gone before the tracer has collected the deaths of all its tracees in there.
    pub fn is_alive(&self) -> bool {
        self.look() == LIVES
    }

    /// Whether it is about to end and stopped while it still has its memory: only if [`Shadow::stop_at_end`] was called.
    pub fn is_ending(&self) -> bool {
        self.look() == ENDS
    }

    fn look(&self) -> u8 {
        let mut end = self.end.load(Ordering::Relaxed);
        if end != DEAD {
            end = match ptrace::poll(self.pid) {
                Ok(Some(Event::Exited(_))) | Err(_) => DEAD,
                Ok(Some(Event::Other(EXITING))) => ENDS,
                Ok(_) => end,
            };
            self.end.store(end, Ordering::Relaxed);
        }
        end
    }

    /// Has it stop when it is killed, while it still has its memory. The PID namespace of a container whose init has ended does
    /// not end before it was let go, nor is the container's supervisor told.
    ///
    /// # Errors
    ///
    /// It has died.
    pub fn stop_at_end(&self) -> Result<()> {
        let set = ptrace::set_options(self.pid, Options::SHADOW_OF_CONTAINER);
        Ok(set.map_err(|errno| Error::System {
            what: format!("ptrace options of shadow {}", self.pid),
            error: errno.into(),
        })?)
    }

    /// Undoes [`Shadow::stop_at_end`].
    pub fn end_at_once(&self) {
        self.let_go();
        // It may have died.
        let _ = ptrace::set_options(self.pid, Options::SHADOW);
    }

    /// Lets it end, if it [is about to](Shadow::is_ending).
    pub fn let_go(&self) {
        if self.is_ending() {
            let _ = ptrace::resume(self.pid, 0);
            self.end.store(WAS_LET_GO, Ordering::Relaxed);
        }
    }

    /// Reads ranges of the address space as they were, one after the other, into `buffer`.
    pub fn read(&self, spans: &[Span], buffer: &mut [u8]) -> std::io::Result<()> {
        read(self.pid, &self.memory, spans, buffer)
    }

    /// Kills it and collects its exit. Its parent still has to reap it.
    pub fn kill(&self) {
        if self.look() == DEAD {
            return;
        }
        self.let_go();
        kill(self.pid);
        self.end.store(DEAD, Ordering::Relaxed);
    }
}

/// Reads ranges of the address space of a process that is stopped, of which `memory` is the file.
pub(super) fn read(
    pid: Pid,
    memory: &File,
    spans: &[Span],
    buffer: &mut [u8],
) -> std::io::Result<()> {
    let ranges: Vec<_> = spans
        .iter()
        .map(|span| remote_memory::Range {
            start: span.start,
            len: span.len() as usize,
        })
        .collect();
    if remote_memory::read(pid, &ranges, buffer).is_ok() {
        return Ok(());
    }
    // Some of it is not readable to the program itself.
    let mut at = 0;
    for range in ranges {
        memory.read_exact_at(&mut buffer[at..at + range.len], range.start)?;
        at += range.len;
    }
    Ok(())
}

/// Kills a tracee of ours and collects its exit.
pub(super) fn kill(pid: Pid) {
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL);
    loop {
        match ptrace::wait(pid) {
            Ok(Event::Exited(_)) | Err(_) => return,
            Ok(Event::Other(EXITING)) => drop(ptrace::resume(pid, 0)),
            Ok(_) => {}
        }
    }
}

const CLOSE_RANGE_UNSHARE: u64 = 1 << 1;
