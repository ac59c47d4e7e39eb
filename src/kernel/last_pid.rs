//! Which number the next task of a PID namespace gets: `/proc/sys/kernel/ns_last_pid` (pid_namespaces(7), Linux 3.3,
//! `CONFIG_CHECKPOINT_RESTORE`). It is a request, not a promise: whoever forks first has it.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

const PATH: &str = "/proc/sys/kernel/ns_last_pid";

/// Has the next task that is made in our own PID namespace get the number `next`, if that is free.
pub fn set_next(next: i32) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(PATH)?;
    write(&file, &text_of(next))
}

/// The same in another PID namespace, a `/proc/PID/ns/pid` held open, below ours.
///
/// The file means the namespace of who writes to it, so a process is made there for a moment.
pub fn set_next_in(namespace: impl AsFd, next: i32) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(PATH)?;
    let text = text_of(next);
    let namespace = namespace.as_fd();
    // The namespace of children is a thread's own, so a thread is made for it too.
    std::thread::scope(|scope| {
        let in_there = scope.spawn(|| -> io::Result<()> {
            setns(namespace, CloneFlags::CLONE_NEWPID)?;
            // SAFETY: the child makes two system calls that are safe after fork in a threaded program, on memory and a
            // descriptor that were ready before, and ends without running anything of ours.
            let child = Errno::result(unsafe { libc::fork() })?;
            if child == 0 {
                let written =
                    // SAFETY: `text` outlives the call.
                    unsafe { libc::write(file.as_raw_fd(), text.as_ptr().cast(), text.len()) };
                // SAFETY: ends this process at once.
                unsafe { libc::_exit(i32::from(written != text.len() as isize)) };
            }
            match waitpid(Pid::from_raw(child), None)? {
                WaitStatus::Exited(_, 0) => Ok(()),
                _ => Err(io::ErrorKind::PermissionDenied.into()),
            }
        });
        in_there
            .join()
            .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
    })
}

fn text_of(next: i32) -> String {
    next.saturating_sub(1).to_string()
}

fn write(mut file: &File, text: &str) -> io::Result<()> {
    io::Write::write_all(&mut file, text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_namespace_of_the_writer_is_meant() {
        let ours = File::open("/proc/self/ns/pid").unwrap();
        // Ours is not below ours, but the kernel lets a thread stay where it is.
        if let Err(error) = set_next_in(&ours, 300) {
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        }
    }
}
