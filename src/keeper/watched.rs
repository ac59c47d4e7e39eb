//! The end of a tree's root is told to who listens.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::unistd::Pid;
use parking_lot::Mutex;

use crate::keeper::Identity;
use crate::keeper::protocol::Failure;
use crate::kernel::pidfd;

/// The root of the tree, whose end is to be told.
pub(super) struct Watched {
    /// Readable once it has exited.
    exit: Epoll,
    root: Mutex<Option<(Identity, OwnedFd)>>,
}

impl Watched {
    pub(super) fn new() -> nix::Result<Self> {
        Ok(Self {
            exit: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            root: Mutex::new(None),
        })
    }

    /// Watches another process.
    pub(super) fn watch(&self, root: Identity) -> Result<(), Failure> {
        let failed = |errno: Errno| {
            failure(format!(
                "cannot hold process {}: {}",
                root.pid,
                errno.desc()
            ))
        };
        let pidfd = pidfd::open(Pid::from_raw(root.pid)).map_err(failed)?;
        // Only now is the PID certain not to be given to another.
        match root.is_alive() {
            Ok(true) => {}
            Ok(false) => return Err(failure(format!("process {} has exited", root.pid))),
            Err(error) => return Err(failure(error.to_string())),
        }
        // Told once: it stays readable.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT;
        let added = self.exit.add(&pidfd, EpollEvent::new(flags, 0));
        added.map_err(failed)?;
        *self.root.lock() = Some((root, pidfd));
        Ok(())
    }

    /// Whether it is this one that is watched.
    pub(super) fn is(&self, root: Identity) -> bool {
        let watched = self.root.lock();
        watched
            .as_ref()
            .is_some_and(|(watched, _)| *watched == root)
    }

    pub(super) fn has_exited(&self) -> nix::Result<bool> {
        let mut events = [EpollEvent::empty()];
        Ok(self.exit.wait(&mut events, EpollTimeout::ZERO)? > 0)
    }

    /// Whether the process that is watched lives.
    pub(super) fn is_alive(&self) -> bool {
        let watched = self.root.lock();
        watched
            .as_ref()
            .is_some_and(|(root, _)| root.is_alive().unwrap_or(false))
    }

    /// Readable once it has exited.
    pub(super) fn exit(&self) -> BorrowedFd<'_> {
        self.exit.0.as_fd()
    }
}

fn failure(message: String) -> Failure {
    Failure::Error { message }
}
