//! Processes and threads that have ended, made again under their numbers.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::Pid;
use zerocopy::{Immutable, IntoBytes};

use crate::kernel::{last_pid, procfs};

use super::kill::await_end;
use super::stopped::Stopped;
use super::thread::Thread;
use super::{Batch, Context, Error, Result};

/// What threads share (clone(2)).
const THREAD: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;

/// No process has so great a number (`PID_MAX_LIMIT` in `linux/threads.h`): to ask for it in our namespace is to ask for none.
pub const LEAST_NO_PID: i32 = 1 << 22;

/// How long others may get the number first: where many fork all the time hundreds of attempts may fail, and without it the
/// tree is lost.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long one that has it is left alone.
const SOON: Duration = Duration::from_millis(1);

/// `struct clone_args` of Linux 5.7 (clone(2)).
#[repr(C)]
#[derive(Default, IntoBytes, Immutable)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Who makes a process or thread.
#[derive(Debug, Clone, Copy)]
enum Maker {
    /// The leader of a process of the tree.
    Leader(Pid),
    /// A shadow, which is to give its child its own parent (`CLONE_PARENT`).
    Shadow(Pid),
}

impl Maker {
    fn pid(self) -> Pid {
        match self {
            Self::Leader(pid) | Self::Shadow(pid) => pid,
        }
    }
}

/// A process or thread to be made.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    /// `CLONE_*` (clone(2)).
    flags: i32,
    exit_signal: i32,
    /// Its number in our namespace, if that can be had.
    number: Pid,
    /// Its number in its own.
    inside: i32,
}

impl Stopped<'_> {
    /// Makes a thread with the TID `inside` in its own PID namespace, and in ours with `tid` if that is the same one or can
    /// be had, in any case with none of `avoid`; returns which it has. It is stopped, before its first instruction, and has
    /// the credentials, filters and namespaces of the process's leader; registers and signal mask are to be set.
    pub fn make_thread(
        &mut self,
        pid: Pid,
        tid: Pid,
        inside: i32,
        avoid: &BTreeSet<Pid>,
    ) -> Result<Pid> {
        let wanted = Wanted {
            flags: THREAD,
            exit_signal: 0,
            number: tid,
            inside,
        };
        let tid = self.clone_numbered(Maker::Leader(pid), wanted, avoid)?;
        let process = self.processes.get_mut(&pid).ok_or(Error::Gone(pid))?;
        process.add_thread(Thread::born(tid));
        Ok(tid)
    }

    /// Makes a process, a child of `parent` and a copy of it as fork(2) makes it, with numbers as
    /// [`Stopped::make_thread`] has them. It is stopped before its first instruction, and of the tree; it has no window.
    pub fn make_process(
        &mut self,
        parent: Pid,
        pid: Pid,
        inside: i32,
        exit_signal: i32,
        avoid: &BTreeSet<Pid>,
    ) -> Result<Pid> {
        let wanted = Wanted {
            flags: 0,
            exit_signal,
            number: pid,
            inside,
        };
        let born = self.clone_numbered(Maker::Leader(parent), wanted, avoid)?;
        self.take_in(born, parent)?;
        Ok(born)
    }

    /// As [`Stopped::make_process`], of a process that has no parent in the tree: a copy of its shadow, and a child of
    /// whoever has adopted that.
    pub fn make_from_shadow(
        &mut self,
        shadow: Pid,
        pid: Pid,
        inside: i32,
        avoid: &BTreeSet<Pid>,
    ) -> Result<Pid> {
        let wanted = Wanted {
            flags: libc::CLONE_PARENT,
            // That of the shadow, which who has adopted it expects.
            exit_signal: 0,
            number: pid,
            inside,
        };
        let born = self.clone_numbered(Maker::Shadow(shadow), wanted, avoid)?;
        let parent = procfs::Stat::read(born).context(|| format!("read /proc/{born}/stat"))?;
        self.take_in(born, parent.parent())?;
        self.know(born);
        if pid == self.tree.root {
            self.tree.root = born;
        }
        Ok(born)
    }

    /// Makes a process just made one of the tree.
    fn take_in(&mut self, born: Pid, parent: Pid) -> Result<()> {
        self.note_process(born, parent)
            .add_thread(Thread::born(born));
        self.open_member(born)
    }

    /// Has `by` make what is wanted.
    fn clone_numbered(&mut self, by: Maker, wanted: Wanted, avoid: &BTreeSet<Pid>) -> Result<Pid> {
        let maker = by.pid();
        let text = std::fs::read_to_string(procfs::path(maker, "status"))
            .context(|| format!("read /proc/{maker}/status"))?;
        let levels = procfs::namespace_pids(&text).len();
        let (inside, outside) = (wanted.inside, wanted.number.as_raw());
        let deadline = Instant::now() + PATIENCE;
        let both = [inside, outside];
        let choices: &[&[i32]] = match levels {
            2 if outside < LEAST_NO_PID => &[&both, &both[..1]],
            _ => &[&both[..1]],
        };
        for ids in choices.iter().cycle() {
            match self.clone_with_ids(by, wanted, ids)? {
                Ok(made) if ids.len() == levels || !avoid.contains(&made) => return Ok(made),
                Ok(made) => self.undo(by, wanted, made)?,
                // One that is ending has it for a while longer than it is to be seen; others fork too, and most of what
                // they make ends soon.
                Err(Errno::EEXIST) if Instant::now() < deadline => {
                    if ids.len() == 1 {
                        std::thread::sleep(SOON);
                    }
                }
                Err(Errno::EPERM | Errno::ENOSYS | Errno::EINVAL | Errno::E2BIG) => break,
                Err(errno) => return Err(failed(maker, "clone3", errno)),
            }
        }
        // It takes a privilege that processes of containers do not have. So the number is asked for from outside.
        let namespace = match levels {
            1 => None,
            _ => Some(
                File::open(procfs::path(maker, "ns/pid"))
                    .context(|| format!("open /proc/{maker}/ns/pid"))?,
            ),
        };
        while Instant::now() < deadline {
            let ask = || {
                match &namespace {
                    Some(namespace) => last_pid::set_next_in(namespace.as_fd(), inside),
                    None => last_pid::set_next(inside),
                }
                .context(|| format!("ask for number {inside} in the namespace of {maker}"))
            };
            let born = self
                .clone_with_next_id(by, wanted, ask)?
                .map_err(|errno| failed(maker, "clone", errno))?;
            let is_ours = levels == 1;
            if id_inside(born)? == inside && (is_ours || !avoid.contains(&born)) {
                return Ok(born);
            }
            self.undo(by, wanted, born)?;
        }
        Err(failed(
            maker,
            "clone: the number was taken again and again",
            Errno::EEXIST,
        ))
    }

    /// The same under the number that comes next, once that was asked for.
    fn clone_with_next_id(
        &mut self,
        by: Maker,
        wanted: Wanted,
        ask: impl FnOnce() -> Result<()>,
    ) -> Result<std::result::Result<Pid, Errno>> {
        let flags = wanted.flags | wanted.exit_signal;
        let maker = match by {
            Maker::Leader(maker) => maker,
            Maker::Shadow(shadow) => {
                let call = (libc::SYS_clone, [flags as u64, 0, 0]);
                let made = Self::call_in_shadow(shadow, |_| (call, Vec::new()), ask)?;
                return child(shadow, made);
            }
        };
        ask()?;
        let mut batch = Batch::new();
        let zero = 0.into();
        let clone = batch.call(libc::SYS_clone, &[flags.into(), zero, zero, zero, zero]);
        let outputs = self.run(maker, &batch)?;
        let made = outputs.born.first().copied();
        child(maker, (outputs.result(clone), made))
    }

    /// The same with numbers that the maker chooses (`set_tid` of clone3(2), Linux 5.5), or says why not.
    fn clone_with_ids(
        &mut self,
        by: Maker,
        wanted: Wanted,
        ids: &[i32],
    ) -> Result<std::result::Result<Pid, Errno>> {
        let size = size_of::<CloneArguments>();
        let arguments = CloneArguments {
            flags: wanted.flags as u64,
            exit_signal: wanted.exit_signal as u64,
            set_tid_size: ids.len() as u64,
            ..CloneArguments::default()
        };
        let maker = match by {
            Maker::Leader(maker) => maker,
            Maker::Shadow(shadow) => {
                let call = |at| {
                    let arguments = CloneArguments {
                        set_tid: at + size as u64,
                        ..arguments
                    };
                    let data = [arguments.as_bytes(), ids.as_bytes()].concat();
                    ((libc::SYS_clone3, [at, size as u64, 0]), data)
                };
                let made = Self::call_in_shadow(shadow, call, || Ok(()))?;
                return child(shadow, made);
            }
        };
        let mut batch = Batch::new();
        let set_tid = batch.filled(ids.as_bytes());
        let arguments = batch.filled(arguments.as_bytes());
        let offset = std::mem::offset_of!(CloneArguments, set_tid);
        batch.point(&arguments, offset, &set_tid);
        let clone = batch.call(libc::SYS_clone3, &[arguments.arg(), size.into()]);
        let outputs = self.run(maker, &batch)?;
        let made = outputs.born.first().copied();
        child(maker, (outputs.result(clone), made))
    }

    /// Ends what has got the wrong number.
    fn undo(&mut self, by: Maker, wanted: Wanted, born: Pid) -> Result<()> {
        let maker = by.pid();
        if wanted.flags & libc::CLONE_THREAD != 0 {
            let process = self.processes.get_mut(&maker).ok_or(Error::Gone(maker))?;
            process.add_thread(Thread::born(born));
            return self.end_thread(maker, born);
        }
        let inside = id_inside(born)?;
        nix::sys::signal::kill(born, nix::sys::signal::SIGKILL)
            .context(|| format!("kill {born}"))?;
        await_end(born)?;
        if let Maker::Shadow(_) = by {
            // Who has adopted the shadow reaps it.
            return Ok(());
        }
        let mut batch = Batch::new();
        let zero = 0.into();
        let options = libc::__WALL.into();
        batch.call(libc::SYS_wait4, &[inside.into(), zero, options, zero]);
        // One whose parent ignores SIGCHLD is gone already.
        self.run(maker, &batch).map(drop)
    }
}

/// What a call that makes a child has returned, and the child.
fn child(
    maker: Pid,
    (result, born): (std::result::Result<u64, Errno>, Option<Pid>),
) -> Result<std::result::Result<Pid, Errno>> {
    match (result, born) {
        (Ok(_), Some(born)) => Ok(Ok(born)),
        (Ok(_), None) => Err(Error::Gone(maker)),
        (Err(errno), _) => Ok(Err(errno)),
    }
}

/// The number of a process or thread in its own namespace.
fn id_inside(tid: Pid) -> Result<i32> {
    let path = procfs::path(tid, "status");
    let status = std::fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
    procfs::pid_inside(&status).ok_or(Error::Gone(tid))
}

fn failed(pid: Pid, what: &'static str, errno: Errno) -> Error {
    Error::Call { pid, what, errno }
}
