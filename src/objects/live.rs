//! A descriptor of a stopped process, as the kinds see it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::unistd::Pid;

use super::Error;
use super::fdinfo::Fdinfo;
use super::model::{Common, Place};
use crate::kernel::pidfd;
use crate::outcome::Refusal;

/// A process of a stopped tree.
#[derive(Debug)]
pub struct Holder {
    /// Host PID of its leader.
    pub pid: i32,
    /// Its name (`comm`).
    pub name: String,
    pidfd: OnceLock<OwnedFd>,
}

impl Holder {
    /// A process; nothing is opened before it is needed.
    pub fn new(pid: i32, name: &str) -> Self {
        Self {
            pid,
            name: name.to_owned(),
            pidfd: OnceLock::new(),
        }
    }

    fn pidfd(&self) -> Result<BorrowedFd<'_>, Error> {
        if let Some(pidfd) = self.pidfd.get() {
            return Ok(pidfd.as_fd());
        }
        let pidfd = pidfd::open(Pid::from_raw(self.pid)).map_err(|errno| Error::Own {
            call: "pidfd_open",
            errno,
        })?;
        Ok(self.pidfd.get_or_init(|| pidfd).as_fd())
    }

    /// As refusals name it: `pid 12 (redis-server)`.
    pub fn describe(&self) -> String {
        describe(self.pid, &self.name)
    }

    /// A duplicate of one of its descriptors: the same description, close-on-exec. Drop it before the tree runs.
    pub fn duplicate(&self, fd: i32) -> Result<OwnedFd, Error> {
        pidfd::get_fd(self.pidfd()?, fd).map_err(|errno| Error::Descriptor {
            what: format!("fd {fd}"),
            pid: self.pid,
            call: "pidfd_getfd",
            errno,
        })
    }
}

/// A process as refusals name it: `pid 12 (redis-server)`.
pub fn describe(pid: i32, name: &str) -> String {
    format!("pid {pid} ({name})")
}

/// What costs next to nothing to ask inside the target, of sockets and pipes; `None` where it was not asked or there is
/// no such thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Glance {
    /// `SO_COOKIE`.
    pub cookie: Option<u64>,
    /// `F_GETPIPE_SZ`, bytes.
    pub capacity: Option<usize>,
    /// `FIONREAD`: bytes in a pipe.
    pub unread: Option<usize>,
}

/// One live description, through one of its descriptors.
#[derive(Debug)]
pub struct Live<'a> {
    /// A process that has it.
    pub holder: &'a Holder,
    /// Its number there.
    pub fd: i32,
    /// What all kinds have.
    pub common: Common,
    /// What was asked of it because a socket or pipe was recorded there.
    pub glance: Glance,
    link: OnceLock<String>,
    fdinfo: OnceLock<Fdinfo>,
}

impl<'a> Live<'a> {
    /// The description at this number.
    pub fn new(holder: &'a Holder, fd: i32, common: Common, glance: Glance) -> Self {
        Self {
            holder,
            fd,
            common,
            glance,
            link: OnceLock::new(),
            fdinfo: OnceLock::new(),
        }
    }

    /// Process and number.
    pub fn place(&self) -> Place {
        Place {
            pid: self.holder.pid,
            fd: self.fd,
        }
    }

    /// A duplicate: the same description. Drop it before the tree runs.
    pub fn duplicate(&self) -> Result<OwnedFd, Error> {
        self.holder.duplicate(self.fd)
    }

    /// `/proc/PID/fd/N`.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", self.holder.pid, self.fd)
    }

    /// What `/proc/PID/fd/N` points to, read once: a path, `pipe:[5]`, `anon_inode:[eventpoll]` …
    pub fn link(&self) -> Result<&str, Error> {
        if let Some(link) = self.link.get() {
            return Ok(link);
        }
        let path = self.path();
        let link = std::fs::read_link(&path).map_err(|error| Error::Text {
            path: path.clone(),
            problem: error.to_string(),
        })?;
        let link = link
            .into_os_string()
            .into_string()
            .map_err(|_| Error::Text {
                path,
                problem: "not UTF-8".into(),
            })?;
        Ok(self.link.get_or_init(|| link))
    }

    /// `/proc/PID/fdinfo/N`, read once.
    pub fn fdinfo(&self) -> Result<&Fdinfo, Error> {
        if let Some(info) = self.fdinfo.get() {
            return Ok(info);
        }
        let info = Fdinfo::read(self.holder.pid, self.fd)?;
        Ok(self.fdinfo.get_or_init(|| info))
    }

    /// A refusal about it: `what` as `io_uring ring`, then what the user can do.
    pub fn refuse(&self, what: &str, remedy: &str) -> Refusal {
        Refusal {
            object: format!("fd {}: {what}", self.fd),
            holder: self.holder.describe(),
            remedy: remedy.to_owned(),
        }
    }

    /// An error of a call on it.
    pub fn failed(&self, call: &'static str) -> impl Fn(Errno) -> Error {
        let (what, pid) = (format!("fd {}", self.fd), self.holder.pid);
        move |errno| Error::Descriptor {
            what: what.clone(),
            pid,
            call,
            errno,
        }
    }
}
