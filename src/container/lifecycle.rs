//! `pause`, `resume`, `kill`, `delete`, `ps`.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;
use std::os::fd::{AsFd, OwnedFd};

use libcontainer::container::ContainerStatus;

use super::create::{load, save, stand_in};
use super::locate::{self, Located, Status, locate};
use super::{Error, again, cgroups, children, config, overlay};
use crate::kernel::pidfd;

/// How long processes that were sent `SIGKILL` may take to be gone: a large address space takes its time.
const DEATH: Duration = Duration::from_secs(10);

/// Freezes the container's processes.
pub(crate) fn pause(root: &Path, id: &str) -> Result<(), Error> {
    let located = locate(root, id)?;
    if located.status != Status::Running {
        return Err(located.wrong_status("only a running container can be paused"));
    }
    let mut container = load(id, &located.directory)?;
    container
        .pause()
        .map_err(Error::runtime(format!("pausing container {id:?}")))
}

/// Lets the processes of a paused container run on.
pub(crate) fn resume(root: &Path, id: &str) -> Result<(), Error> {
    let located = locate(root, id)?;
    if located.status != Status::Paused {
        return Err(located.wrong_status("only a paused container can be resumed"));
    }
    let mut container = load(id, &located.directory)?;
    container
        .resume()
        .map_err(Error::runtime(format!("resuming container {id:?}")))
}

/// Sends a signal to the container's init, or to all its processes. The number is the kernel's; there are more than
/// have names (real-time signals). As with runc, `all` is no error for a container that has stopped.
pub(crate) fn kill(root: &Path, id: &str, signal: i32, all: bool) -> Result<(), Error> {
    let located = locate(root, id)?;
    let init = match located.init {
        Some(init) if located.status != Status::Creating => init,
        _ if all => return signal_all(&located, signal),
        _ => return Err(located.wrong_status("container not running")),
    };
    if all {
        signal_all(&located, signal)?;
    } else {
        send(&open_init(&located, init)?, init, signal)?;
    }
    // A process in a frozen cgroup of version 1 does not even die.
    if signal == libc::SIGKILL && located.status == Status::Paused {
        resume(root, id)?;
    }
    Ok(())
}

/// Opens the init, making sure that it is still the one that was located.
fn open_init(located: &Located, init: Pid) -> Result<OwnedFd, Error> {
    let stopped = || Error::WrongStatus {
        id: located.id.clone(),
        status: Status::Stopped,
        wanted: "container not running",
    };
    let opened = pidfd::open(init).map_err(|_| stopped())?;
    // A PID reused between looking and opening shows when looking again.
    let root = located.directory.parent().unwrap_or(&located.directory);
    match locate(root, &located.id)?.init {
        Some(again) if again == init => Ok(opened),
        _ => Err(stopped()),
    }
}

fn send(pidfd: &OwnedFd, pid: Pid, signal: i32) -> Result<(), Error> {
    match pidfd::send_signal(pidfd.as_fd(), signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(Error::kernel(format!(
            "sending signal {signal} to process {pid}"
        ))(error)),
    }
}

fn signal_all(located: &Located, signal: i32) -> Result<(), Error> {
    for pid in processes(located)? {
        match pidfd::open(pid) {
            Ok(opened) => send(&opened, pid, signal)?,
            Err(Errno::ESRCH) => (),
            Err(error) => return Err(Error::kernel(format!("opening process {pid}"))(error)),
        }
    }
    Ok(())
}

/// The container's processes, by their cgroups.
pub(crate) fn processes(located: &Located) -> Result<BTreeSet<Pid>, Error> {
    cgroups::processes(&located.cgroups()?)
}

/// Deletes a container: its cgroups and its state. With `force` one that runs is killed first, and one that is not
/// there is no error.
pub(crate) fn delete(root: &Path, id: &str, force: bool) -> Result<(), Error> {
    locate::check_id(id)?;
    let _lock = again::lock(root, id)?;
    again::recover(root, id)?;
    let located = match locate(root, id) {
        Err(Error::Unknown { .. }) if force => return remove_what_is_beside(root, id, None),
        other => other?,
    };
    match located.status {
        Status::Stopped | Status::Created => (),
        _ if force => (),
        _ => return Err(located.wrong_status("stop it first, or use --force")),
    }
    end_processes(&located)?;
    let mut container = load(id, &located.directory)?;
    // libcontainer would judge by the PID alone, which may be another process's by now.
    container.state.pid = None;
    container.set_status(ContainerStatus::Stopped);
    save(&container)?;
    container
        .delete(false)
        .map_err(Error::runtime(format!("deleting container {id:?}")))?;
    cgroups::remove(&located.cgroups()?)?;
    remove_what_is_beside(root, id, located.overlay.as_deref())
}

/// Removes what a container has, or a `create` that was killed has left, beside the directory of its state.
fn remove_what_is_beside(root: &Path, id: &str, overlay: Option<&Path>) -> Result<(), Error> {
    config::remove_directory(&stand_in(root, id))?;
    overlay::remove(root, id, overlay)
}

/// Kills everything in the container and waits until it is gone.
pub(super) fn end_processes(located: &Located) -> Result<(), Error> {
    let deadline = Instant::now() + DEATH;
    if let Some(init) = located.init {
        // Opened first: what it means stays the same process.
        if let Ok(opened) = open_init(located, init) {
            send(&opened, init, libc::SIGKILL)?;
            thaw(located)?;
            wait_for_exit(&opened, deadline).map_err(Error::kernel(format!(
                "waiting for the end of process {init}"
            )))?;
        }
    }
    // Without a PID namespace of its own, the others outlive the init.
    loop {
        children::reap();
        let left = processes(located)?;
        let Some(&first) = left.iter().next() else {
            return Ok(());
        };
        signal_all(located, libc::SIGKILL)?;
        thaw(located)?;
        match pidfd::open(first) {
            Ok(opened) => wait_for_exit(&opened, deadline).map_err(Error::kernel(format!(
                "waiting for the end of process {first}"
            )))?,
            Err(Errno::ESRCH) => (),
            Err(error) => return Err(Error::kernel(format!("opening process {first}"))(error)),
        }
        // A zombie stays listed until its parent has reaped it, which is not for us to do.
        if left
            .iter()
            .all(|pid| locate::alive_since(pid.as_raw()).is_none())
        {
            return Ok(());
        }
    }
}

/// Thaws a paused container; a killed process in a frozen cgroup of version 1 does not die.
fn thaw(located: &Located) -> Result<(), Error> {
    if located.status != Status::Paused {
        return Ok(());
    }
    for cgroup in located.cgroups()? {
        for (file, thawed) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
            let path = cgroup.directory.join(file);
            if path.exists() {
                std::fs::write(&path, thawed).map_err(Error::io("writing", path))?;
            }
        }
    }
    Ok(())
}

/// Waits until the process has exited; `ETIMEDOUT` if it has not by then.
fn wait_for_exit(process: &OwnedFd, deadline: Instant) -> Result<(), Errno> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(
            &mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)],
            timeout,
        ) {
            Ok(0) if left.is_zero() => return Err(Errno::ETIMEDOUT),
            Ok(0) | Err(Errno::EINTR) => (),
            Ok(_) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}
