//! Shadows: stopped children that keep a copy-on-write copy of an address space.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::unistd::Pid;

use crate::freeze::{Error, InCopy, Stopped};
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
    /// Whether a process made by it would live in the time namespace that the one it was made of lives in: a fork moves to
    /// that which was meant for children (time_namespaces(7)).
    pub keeps_time: bool,
    /// Its death was seen and collected: from then on the PID may be another process's.
    is_dead: AtomicBool,
}

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
            is_dead: AtomicBool::new(false),
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
        if self.is_dead.load(Ordering::Relaxed) {
            return false;
        }
        let has_died = matches!(ptrace::poll(self.pid), Ok(Some(Event::Exited(_))) | Err(_));
        self.is_dead.store(has_died, Ordering::Relaxed);
        !has_died
    }

    /// Reads ranges of the address space as they were, one after the other, into `buffer`.
    pub fn read(&self, spans: &[Span], buffer: &mut [u8]) -> std::io::Result<()> {
        read(self.pid, &self.memory, spans, buffer)
    }

    /// Kills it and collects its exit. Its parent still has to reap it.
    pub fn kill(&self) {
        if !self.is_alive() {
            return;
        }
        kill(self.pid);
        self.is_dead.store(true, Ordering::Relaxed);
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
    while !matches!(ptrace::wait(pid), Ok(Event::Exited(_)) | Err(_)) {}
}

const CLOSE_RANGE_UNSHARE: u64 = 1 << 1;
