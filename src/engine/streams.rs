//! The standard streams of a container's init, for the one that takes its place.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::kernel::procfs;

/// Standard input, output and error as they were at the last checkpoint; none of one that was closed.
#[derive(Debug, Default)]
pub(super) struct Streams([Option<Pinned>; 3]);

/// A stream that is held by an `O_PATH` descriptor, which its reader or writer does not notice.
#[derive(Debug)]
struct Pinned {
    pin: File,
    flags: i32,
}

/// How another process can open a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    /// A path in `/proc`, good as long as the one who says so lives.
    pub path: PathBuf,
    /// Flags of open(2) as it was opened.
    pub flags: i32,
}

impl Streams {
    /// Those of a process.
    pub(super) fn of(pid: Pid) -> Self {
        Self([0, 1, 2].map(|number| Pinned::of(pid, number)))
    }

    /// How they can be opened.
    pub(super) fn paths(&self) -> [Option<Stream>; 3] {
        self.0.each_ref().map(|pinned| {
            let pinned = pinned.as_ref()?;
            let (pid, number) = (std::process::id(), pinned.pin.as_raw_fd());
            Some(Stream {
                path: format!("/proc/{pid}/fd/{number}").into(),
                flags: pinned.flags,
            })
        })
    }
}

impl Pinned {
    fn of(pid: Pid, number: i32) -> Option<Self> {
        let mut path = OpenOptions::new();
        path.read(true).custom_flags(libc::O_PATH);
        let pin = path.open(procfs::path(pid, &format!("fd/{number}"))).ok()?;
        let text = fs::read_to_string(procfs::path(pid, &format!("fdinfo/{number}"))).ok()?;
        let flags = procfs::status_line(&text, "flags")?;
        let flags = i32::from_str_radix(flags.trim(), 8).ok()?;
        Some(Self { pin, flags })
    }
}
