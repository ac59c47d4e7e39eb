//! Threads of a stopped process that have ended, made again under their numbers.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::Pid;
use zerocopy::{Immutable, IntoBytes};

use crate::kernel::{last_pid, procfs};

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

/// How long others may get the number first.
const PATIENCE: Duration = Duration::from_secs(2);

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

impl Stopped<'_> {
    /// Makes a thread with the TID `inside` in its own PID namespace, and in ours with `tid` if that is the same one or can
    /// be had; returns which it has. It is stopped, before its first instruction, and has the credentials, filters and
    /// namespaces of the process's leader; registers and signal mask are to be set.
    pub fn make_thread(&mut self, pid: Pid, tid: Pid, inside: i32) -> Result<Pid> {
        let text = procfs::text_held(&self.member(pid)?.status)
            .context(|| format!("read /proc/{pid}/status"))?;
        let levels = procfs::namespace_pids(&text).len();
        let ids = match levels {
            1 => vec![inside],
            2 => vec![inside, tid.as_raw()],
            _ => Vec::new(),
        };
        let deadline = Instant::now() + PATIENCE;
        if !ids.is_empty() {
            let mut made = self.clone_with_ids(pid, &ids);
            // Somebody outside was quicker since it was seen to be free; most tasks that come so fast go so fast.
            while is_taken(&made) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
                made = self.clone_with_ids(pid, &ids);
            }
            if let Some(made) = made? {
                return Ok(made);
            }
        }
        // It takes a privilege that processes of containers do not have. So the number is asked for from outside.
        let namespace = match levels {
            1 => None,
            _ => Some(
                procfs::open_below(&self.member(pid)?.namespaces, "pid")
                    .context(|| format!("open /proc/{pid}/ns/pid"))?,
            ),
        };
        while Instant::now() < deadline {
            match &namespace {
                Some(namespace) => last_pid::set_next_in(namespace.as_fd(), inside),
                None => last_pid::set_next(inside),
            }
            .context(|| format!("ask for TID {inside} in the namespace of {pid}"))?;
            let mut batch = Batch::new();
            let zero = 0.into();
            let clone = batch.call(libc::SYS_clone, &[THREAD.into(), zero, zero, zero, zero]);
            let outputs = self.run(pid, &batch)?;
            outputs
                .result(clone)
                .map_err(|errno| failed(pid, "clone", errno))?;
            let [born] = outputs.born[..] else {
                return Err(Error::Gone(pid));
            };
            self.adopt(pid, born)?;
            if self.id_inside(pid, born)? == inside {
                return Ok(born);
            }
            self.end_thread(pid, born)?;
        }
        Err(failed(
            pid,
            "clone: the number of the thread was taken again and again",
            Errno::EEXIST,
        ))
    }

    /// The same with numbers that the process chooses (`set_tid` of clone3(2), Linux 5.5), if the kernel lets it.
    fn clone_with_ids(&mut self, pid: Pid, ids: &[i32]) -> Result<Option<Pid>> {
        let mut batch = Batch::new();
        let set_tid = batch.filled(ids.as_bytes());
        let arguments = batch.filled(
            CloneArguments {
                flags: THREAD as u64,
                set_tid_size: ids.len() as u64,
                ..CloneArguments::default()
            }
            .as_bytes(),
        );
        let offset = std::mem::offset_of!(CloneArguments, set_tid);
        batch.point(&arguments, offset, &set_tid);
        let clone = batch.call(
            libc::SYS_clone3,
            &[arguments.arg(), size_of::<CloneArguments>().into()],
        );
        let outputs = self.run(pid, &batch)?;
        match outputs.result(clone) {
            Ok(_) => {
                let [born] = outputs.born[..] else {
                    return Err(Error::Gone(pid));
                };
                self.adopt(pid, born)?;
                Ok(Some(born))
            }
            Err(Errno::EPERM | Errno::ENOSYS | Errno::EINVAL | Errno::E2BIG) => Ok(None),
            // Ours is taken; it does not matter to the program.
            Err(Errno::EEXIST) if ids.len() > 1 => Ok(None),
            Err(errno) => Err(failed(pid, "clone3", errno)),
        }
    }

    /// Takes a thread that a batch has made, and that is stopped, into the stopped tree.
    fn adopt(&mut self, pid: Pid, tid: Pid) -> Result<()> {
        let process = self.processes.get_mut(&pid).ok_or(Error::Gone(pid))?;
        process.add_thread(Thread::born(tid));
        Ok(())
    }

    /// A thread's TID in its own namespace.
    fn id_inside(&self, pid: Pid, tid: Pid) -> Result<i32> {
        let path = format!("/proc/{pid}/task/{tid}/status");
        let status = std::fs::read_to_string(&path).context(|| format!("read {path}"))?;
        let ids = procfs::namespace_pids(&status);
        ids.last().copied().ok_or(Error::Gone(tid))
    }
}

/// Whether another task has the number.
fn is_taken(made: &Result<Option<Pid>>) -> bool {
    let taken =
        |error: &Error| matches!(error, Error::Call { errno, .. } if *errno == Errno::EEXIST);
    made.as_ref().is_err_and(taken)
}

fn failed(pid: Pid, what: &'static str, errno: Errno) -> Error {
    Error::Call { pid, what, errno }
}
