//! Descriptions of things in a file system: regular files, directories, memfds, plain devices, terminals, `O_PATH`.
//!
//! Content is not recorded here. What was closed is opened again through a pin, which leads to it also if it was renamed or
//! deleted since; devices and terminals by their path, if that still leads to the same inode, or through another descriptor.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use serde::{Deserialize, Serialize};

use super::Error;
use super::live::Live;
use super::model::{Common, Complaint};
use super::state::State as AnyState;

/// What sort of file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Form {
    /// A regular file, directory or `O_PATH` descriptor.
    Plain,
    /// memfd_create(2); its content belongs to the shared memory.
    Memfd,
    /// A device without state of its own: null, zero, full, random, urandom.
    Device,
    /// A terminal; of a pseudo-terminal the slave.
    Terminal,
    /// The master of a pseudo-terminal, which can't be opened again.
    Master,
    /// A process (pidfd_open(2)), by its host PID.
    Process(i32),
    /// Something that is kept as long as it is open, but can't be opened again: a namespace.
    Kept,
}

/// A file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Its sort.
    pub form: Form,
    /// Its path as the process sees it, or what `/proc` shows in place of one.
    pub path: String,
    /// It has no path any more; the keeper holds an `O_PATH` pin on it.
    pub pinned: bool,
    /// `F_GET_SEALS` of a memfd.
    pub seals: i32,
}

const MEM_MAJOR: u64 = 1;
const TTY_MAJOR: u64 = 4;
const TTY_ALTERNATIVES_MAJOR: u64 = 5;
const PTMX_MINOR: u64 = 2;
const PTS_MAJORS: std::ops::RangeInclusive<u64> = 136..=143;
/// Filesystem type of message queues (statfs(2)).
const MQUEUE_MAGIC: i64 = 0x1980_0202;

fn device(live: &Live<'_>) -> Result<Form, Error> {
    let (major, minor) = (
        nix::sys::stat::major(live.common.rdev),
        nix::sys::stat::minor(live.common.rdev),
    );
    match (major, minor) {
        (MEM_MAJOR, 3 | 5 | 7 | 8 | 9) => Ok(Form::Device),
        (TTY_ALTERNATIVES_MAJOR, PTMX_MINOR) => Ok(Form::Master),
        (TTY_MAJOR | TTY_ALTERNATIVES_MAJOR, _) => Ok(Form::Terminal),
        (major, _) if PTS_MAJORS.contains(&major) => Ok(Form::Terminal),
        _ => Err(live
            .refuse(
                &format!("device {}", live.link()?),
                "the state of this device can't be recorded; close it before a checkpoint",
            )
            .into()),
    }
}

fn form(live: &Live<'_>) -> Result<Form, Error> {
    let link = live.link()?;
    if live.common.flags & libc::O_PATH != 0 {
        return Ok(Form::Plain);
    }
    if link == "anon_inode:[pidfd]" || link.starts_with("pidfd:") {
        return Ok(Form::Process(live.fdinfo()?.number("Pid")?));
    }
    match live.common.file_type() {
        libc::S_IFCHR => device(live),
        libc::S_IFREG if link.starts_with("/memfd:") => Ok(Form::Memfd),
        libc::S_IFREG | libc::S_IFDIR if link.starts_with('/') => {
            let at =
                nix::sys::statfs::statfs(live.path().as_str()).map_err(live.failed("statfs"))?;
            if at.filesystem_type().0 == MQUEUE_MAGIC {
                return Err(live
                    .refuse(
                        &format!("message queue {link}"),
                        "POSIX message queues are not supported; close it before a checkpoint",
                    )
                    .into());
            }
            Ok(Form::Plain)
        }
        libc::S_IFREG if link.contains(":[") && !link.starts_with("anon_inode:") => Ok(Form::Kept),
        _ => {
            let name = match link.strip_prefix("anon_inode:") {
                Some(name) => name.trim_matches(['[', ']']),
                None => link,
            };
            let name = match name {
                "io_uring" => "io_uring ring",
                "perf_event" => "perf event",
                other => other,
            };
            Err(live
                .refuse(
                    name,
                    "objects of this kind can't be recorded; close it, or keep the program from using it",
                )
                .into())
        }
    }
}

/// Whether this kind records the description; the rest are others' or nobody's.
pub fn capture(live: &Live<'_>) -> Result<State, Error> {
    let form = form(live)?;
    let path = live.link()?.to_owned();
    let seals = if form == Form::Memfd { seals(live)? } else { 0 };
    let pinned = match form {
        Form::Memfd => true,
        Form::Plain => match path.strip_suffix(" (deleted)") {
            None => false,
            Some(_) => locate(live.holder.pid, &path, &live.common).is_none(),
        },
        Form::Device | Form::Terminal | Form::Master | Form::Process(_) | Form::Kept => false,
    };
    Ok(State {
        form,
        path,
        pinned,
        seals,
    })
}

fn seals(live: &Live<'_>) -> Result<i32, Error> {
    match fcntl(live.duplicate()?.as_raw_fd(), FcntlArg::F_GET_SEALS) {
        Ok(seals) => Ok(seals),
        Err(Errno::EINVAL) => Ok(SealFlag::F_SEAL_SEAL.bits()),
        Err(errno) => Err(live.failed("F_GET_SEALS")(errno)),
    }
}

/// Whether nothing else leads to it.
pub fn must_be_pinned(state: &AnyState) -> bool {
    matches!(state, AnyState::File(file) if file.pinned)
}

/// Whether it can be opened again through a pin: a regular file, a directory, a FIFO.
pub fn may_be_pinned(state: &AnyState, common: &Common) -> bool {
    match state {
        AnyState::File(file) => {
            file.form == Form::Plain && matches!(common.file_type(), libc::S_IFREG | libc::S_IFDIR)
        }
        AnyState::Pipe(pipe) => pipe.fifo.is_some(),
        _ => false,
    }
}

/// Opens an `O_PATH` pin: it keeps the inode, and no more, as long as the checkpoint lives.
pub fn pin(live: &Live<'_>) -> Result<OwnedFd, Error> {
    open_path(&live.path()).map_err(live.failed("open O_PATH"))
}

/// Opens what a path leads to, and not for reading or writing.
pub(super) fn open_path(path: &str) -> Result<OwnedFd, Errno> {
    open_flags(path, libc::O_PATH)
}

fn open_flags(path: &str, flags: i32) -> Result<OwnedFd, Errno> {
    let access = flags & libc::O_ACCMODE;
    OpenOptions::new()
        .read(access != libc::O_WRONLY)
        .write(access != libc::O_RDONLY)
        .custom_flags(flags | libc::O_CLOEXEC)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
}

/// An error of opening a path again.
fn at(path: &str) -> impl Fn(Errno) -> Error {
    move |errno| {
        let leads_to = std::fs::read_link(path).unwrap_or_default();
        Error::Text {
            path: format!("{path} ({})", leads_to.display()),
            problem: format!("open: {errno}"),
        }
    }
}

fn is_same(file: &File, common: &Common) -> bool {
    file.metadata().is_ok_and(|at| {
        at.dev() == common.dev
            && at.ino() == common.ino
            && at.mode() & libc::S_IFMT == common.file_type()
            && at.rdev() == common.rdev
    })
}

/// An `O_PATH` descriptor of the inode, if the path leads to it as this process sees it, or as we see it (the path that
/// `/proc` shows of a file is relative to the reader's root if it lies below that).
pub fn locate(pid: i32, path: &str, common: &Common) -> Option<OwnedFd> {
    if !path.starts_with('/') {
        return None;
    }
    [format!("/proc/{pid}/root{path}"), path.to_owned()]
        .into_iter()
        .find_map(|candidate| {
            let file = File::from(open_flags(&candidate, libc::O_PATH | libc::O_NOFOLLOW).ok()?);
            is_same(&file, common).then(|| file.into())
        })
}

/// Opens anew what an `O_PATH` descriptor (ours) or a descriptor of the tree refers to, at `path` in `/proc`.
pub fn reopen(path: &str, common: &Common) -> Result<OwnedFd, Error> {
    if common.flags & libc::O_PATH != 0 {
        return open_flags(path, libc::O_PATH).map_err(at(path));
    }
    // Only a name makes them mean something; O_TMPFILE has O_DIRECTORY in it.
    let not = libc::O_CREAT
        | libc::O_EXCL
        | libc::O_TRUNC
        | libc::O_NOFOLLOW
        | libc::O_ASYNC
        | libc::O_TMPFILE;
    open_flags(
        path,
        (common.flags & !not) | libc::O_NOCTTY | libc::O_NONBLOCK,
    )
    .map_err(at(path))
}

impl State {
    /// What differs in `now` that can't be changed back: object and remedy.
    pub fn check(&self, now: &Self) -> Result<(), Complaint> {
        if self.seals == now.seals {
            return Ok(());
        }
        let what = format!("{} was sealed since the checkpoint", self.path);
        Err((
            what,
            "seals can't be removed; seal it before the checkpoint".into(),
        ))
    }

    /// Whether it can be opened again by other means than a descriptor in the tree or its path: object and remedy.
    pub fn complain_gone(&self) -> Complaint {
        let remedy = match self.form {
            Form::Process(_) => "the process it means has ended since the checkpoint",
            Form::Kept | Form::Terminal | Form::Master => {
                "it was closed since the checkpoint and can't be opened again"
            }
            Form::Plain | Form::Memfd | Form::Device => {
                "it was closed since the checkpoint, and its path does not lead to it any more"
            }
        };
        (self.path.clone(), remedy.into())
    }

    /// Whether the path may be opened again to get another description of the same thing.
    pub fn is_reopenable(&self) -> bool {
        matches!(
            self.form,
            Form::Plain | Form::Memfd | Form::Device | Form::Terminal
        )
    }
}
