//! Children that a failed start left behind.

use std::fs;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// Kills and reaps every child of this process.
///
/// When a start fails, libcontainer leaves its helper and the half-made process behind: as zombies, which make the
/// tear-down of the container's PID namespace wait for ever if nobody reaps them, or waiting for a message. A process
/// started later may have been handed to us while we look, so look until there is none.
pub(crate) fn abandon() {
    loop {
        for child in children() {
            // It may have exited: then it is reaped below.
            let _ = kill(child, Signal::SIGKILL);
        }
        match waitpid(None, Some(WaitPidFlag::__WALL)) {
            Err(Errno::ECHILD) => return,
            _ => continue,
        }
    }
}

/// Reaps the children that have exited, without waiting for others.
pub(crate) fn reap() {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)) {
        if status.pid().is_none() {
            return;
        }
    }
}

/// The children of this process: those whose fourth field of proc_pid_stat(5) is our PID, as not every kernel has
/// `/proc/PID/task/TID/children`.
fn children() -> Vec<Pid> {
    let me = std::process::id();
    let is_child = |pid: &i32| {
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
            let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
            fields.and_then(|fields| fields.split_ascii_whitespace().nth(1))
                == Some(me.to_string().as_str())
        })
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(is_child).map(Pid::from_raw).collect()
}
