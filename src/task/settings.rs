//! Settings of a process that only files of `/proc` tell and take, and those that only [`Stat`] tells.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::Pid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::freeze::{Batch, Stopped};
use crate::kernel::procfs::{self, Bounds, Stat};
use crate::kernel::program_map::{PR_SET_MM_MAP, ProgramMap};

use super::{About, Error, Result};

/// What is put back by other means than the process's own calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Settings {
    /// `oom_score_adj`.
    pub oom_score: i64,
    /// `coredump_filter`.
    pub core_filter: u64,
    /// Where the kernel shows its program, arguments and environment to be.
    pub bounds: Bounds,
}

impl Settings {
    /// That of a zombie.
    pub(super) fn nothing() -> Self {
        zerocopy::FromZeros::new_zeroed()
    }

    /// Reads those of a stopped process, whose `stat` is given.
    pub(super) fn read(stopped: &Stopped<'_>, pid: Pid, stat: &Stat) -> Result<Self> {
        let held = &stopped.member(pid)?.settings;
        let score = word(held.oom_score.as_ref()).about(pid, "oom_score_adj")?;
        let filter = word(held.core_filter.as_ref()).about(pid, "coredump_filter")?;
        Ok(Self {
            oom_score: score.parse().unwrap_or(0),
            core_filter: u64::from_str_radix(&filter, 16).unwrap_or(0),
            bounds: stat.bounds(),
        })
    }

    /// Makes those of a process as these, where they differ from the live ones.
    pub(super) fn restore(&self, stopped: &mut Stopped<'_>, pid: Pid, live: &Self) -> Result<()> {
        let held = &stopped.member(pid)?.settings;
        if self.oom_score != live.oom_score {
            let text = self.oom_score.to_string();
            write(held.oom_score.as_ref(), &text).about(pid, "setting oom_score_adj")?;
        }
        if self.core_filter != live.core_filter {
            let text = self.core_filter.to_string();
            write(held.core_filter.as_ref(), &text).about(pid, "setting coredump_filter")?;
        }
        if self.bounds != live.bounds {
            restore_bounds(stopped, pid, &self.bounds)?;
        }
        Ok(())
    }

    /// Whether the score can be put back: lowering it below what the process may choose itself takes a privilege. Tried,
    /// since nothing tells of that bound, and undone.
    pub(super) fn check_score(&self, stopped: &Stopped<'_>, pid: Pid, live: &Self) -> Result<bool> {
        if self.oom_score >= live.oom_score {
            return Ok(true);
        }
        let file = stopped.member(pid)?.settings.oom_score.as_ref();
        if write(file, &self.oom_score.to_string()).is_err() {
            return Ok(false);
        }
        write(file, &live.oom_score.to_string()).about(pid, "setting oom_score_adj")?;
        Ok(true)
    }
}

/// Lines that tell the login user and the control groups of a process; they are compared, not put back.
pub(super) fn membership(stopped: &Stopped<'_>, pid: Pid) -> Result<String> {
    let held = &stopped.member(pid)?.settings;
    let mut lines = String::new();
    if let Some(file) = &held.login_user {
        let login = word(Some(file)).about(pid, "loginuid")?;
        lines = format!("{LOGIN_USER}{login}\n");
    }
    if let Some(file) = &held.cgroups {
        let text = procfs::text_held(file).about(pid, "cgroup")?;
        lines.extend(text.lines().map(|line| format!("{CGROUP}{line}\n")));
    }
    Ok(lines)
}

/// How the line of the login user begins.
pub(super) const LOGIN_USER: &str = "login user ";
/// How the lines of control groups begin.
pub(super) const CGROUP: &str = "cgroup ";

/// The one word in a held file; empty without a file.
fn word(file: Option<&File>) -> std::io::Result<String> {
    let mut text = [0; 32];
    let len = match file {
        Some(file) => file.read_at(&mut text, 0)?,
        None => 0,
    };
    Ok(String::from_utf8_lossy(&text[..len]).trim().into())
}

fn write(file: Option<&File>, text: &str) -> std::io::Result<()> {
    match file {
        Some(file) => file.write_all_at(text.as_bytes(), 0),
        None => Ok(()),
    }
}

/// Sets all of them at once (`PR_SET_MM_MAP`, Linux 3.18), as only that needs no privilege. It sets the program break too.
fn restore_bounds(stopped: &mut Stopped<'_>, pid: Pid, bounds: &Bounds) -> Result<()> {
    let call = |what| {
        move |errno: Errno| Error::Call {
            tid: pid,
            what,
            errno,
        }
    };
    let mut batch = Batch::new();
    let brk = batch.call(libc::SYS_brk, &[0.into()]);
    let brk = stopped.run(pid, &batch)?.result(brk);
    let map = ProgramMap::of(bounds, brk.map_err(call("brk"))?);
    let mut batch = Batch::new();
    let arguments = [
        libc::PR_SET_MM.into(),
        PR_SET_MM_MAP.into(),
        batch.input(map.as_bytes()),
        size_of::<ProgramMap>().into(),
        0.into(),
    ];
    let set = batch.call(libc::SYS_prctl, &arguments);
    let done = stopped.run(pid, &batch)?;
    done.result(set).map(drop).map_err(call("prctl PR_SET_MM"))
}
