//! Makes descriptions again that are gone, in the keeper, and learns their new identity.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::Pid;

use super::capture::Capture;
use super::model::{Description, Inode, ObjectId, Place, Recorded, Source};
use super::plan::Plan;
use super::state::State;
use super::{Error, epoll, file, locks, pipe};
use crate::kernel::pidfd;
use crate::kernel::socket::{SO_COOKIE, u64_option};

fn own(call: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Own { call, errno }
}

/// `/proc/PID/fd/N` of a place.
pub(super) fn in_proc(place: &Place) -> String {
    format!("/proc/{}/fd/{}", place.pid, place.fd)
}

/// Opens a file again that was closed.
pub(super) fn open_file(
    capture: &Capture,
    id: ObjectId,
    description: &Description,
    state: &file::State,
    source: &Source,
) -> Result<OwnedFd, Error> {
    let common = &description.common;
    let gone = || own("open")(Errno::ENOENT);
    let through =
        |fd: BorrowedFd<'_>| file::reopen(&format!("/proc/self/fd/{}", fd.as_raw_fd()), common);
    match (source, state.form) {
        (Source::New, file::Form::Process(pid)) => {
            pidfd::open(Pid::from_raw(pid)).map_err(own("pidfd_open"))
        }
        (Source::Pin, _) => through(capture.pins.get(&id).ok_or_else(gone)?.as_fd()),
        (Source::Path(pid), _) => {
            let at = file::locate(*pid, &state.path, common).ok_or_else(gone)?;
            if common.flags & libc::O_PATH != 0 {
                Ok(at)
            } else {
                through(at.as_fd())
            }
        }
        (Source::Inode(place), _) => file::reopen(&in_proc(place), common),
        (Source::New | Source::Nowhere(_), _) => Err(gone()),
    }
}

/// Makes an end of a pipe: of one that is still open somewhere, or of a new one, made with the first of its ends.
pub(super) fn make_pipe_end(
    capture: &Capture,
    id: ObjectId,
    description: &Description,
    source: &Source,
    made: &mut BTreeMap<Inode, (OwnedFd, OwnedFd)>,
) -> Result<OwnedFd, Error> {
    let common = &description.common;
    let access = common.flags & libc::O_ACCMODE;
    let State::Pipe(state) = &description.state else {
        return Err(own("open")(Errno::EINVAL));
    };
    match source {
        Source::Inode(place) => pipe::open_through(*place, common.inode(), access),
        Source::Path(pid) => {
            let path = state.fifo.as_deref().unwrap_or_default();
            let at = file::locate(*pid, path, common).ok_or_else(|| own("open")(Errno::ENOENT))?;
            pipe::open(&format!("/proc/self/fd/{}", at.as_raw_fd()), access)
        }
        Source::Pin => {
            let pin = capture
                .pins
                .get(&id)
                .ok_or_else(|| own("open")(Errno::ENOENT))?;
            pipe::open(&format!("/proc/self/fd/{}", pin.as_raw_fd()), access)
        }
        Source::New | Source::Nowhere(_) => {
            let inode = common.inode();
            let ends = match made.entry(inode) {
                Entry::Occupied(ends) => ends.into_mut(),
                Entry::Vacant(slot) => {
                    let recorded = capture.recorded.pipes.get(&inode);
                    let recorded = recorded.ok_or_else(|| own("pipe2")(Errno::ENOENT))?;
                    slot.insert(pipe::make(recorded)?)
                }
            };
            let any = ends.0.as_raw_fd();
            pipe::open(&format!("/proc/self/fd/{any}"), access)
        }
    }
}

/// Learns the identity of what was made anew.
pub(super) fn adopt(
    recorded: &mut Recorded,
    made: &BTreeMap<ObjectId, OwnedFd>,
    plan: &Plan,
) -> Result<(), Error> {
    let mut moved: BTreeMap<Inode, Inode> = BTreeMap::new();
    let mut sockets = BTreeMap::new();
    for (id, _) in &plan.make {
        let (Some(fd), Some(description)) = (made.get(id), recorded.descriptions.get_mut(id))
        else {
            continue;
        };
        let at = nix::sys::stat::fstat(fd.as_raw_fd()).map_err(own("fstat"))?;
        let (then, now) = (description.common.inode(), (at.st_dev, at.st_ino));
        if then == now {
            continue;
        }
        (description.common.dev, description.common.ino) = now;
        if let State::Socket(_) = &description.state {
            let cookie = u64_option(fd.as_fd(), libc::SOL_SOCKET, SO_COOKIE);
            sockets.insert(*id, (cookie.map_err(own("SO_COOKIE"))?, now.1));
        }
        moved.insert(then, now);
        for watcher in recorded.descriptions.values_mut() {
            let State::Epoll(state) = &mut watcher.state else {
                continue;
            };
            for entry in state
                .entries
                .iter_mut()
                .filter(|entry| entry.watches == Some(*id))
            {
                entry.inode = (epoll::kernel_device(now.0), now.1);
            }
        }
    }
    let mut states = BTreeMap::new();
    for (id, description) in &mut recorded.descriptions {
        if let State::Socket(state) = &mut description.state {
            states.insert(*id, state);
        }
    }
    plan.sockets.adopt(&mut states, &sockets);
    for (then, now) in moved {
        if let Some(mut pipe) = recorded.pipes.remove(&then) {
            pipe.inode = now;
            recorded.pipes.insert(now, pipe);
        }
    }
    for lock in &mut recorded.locks {
        if let locks::Owner::Flock(id) | locks::Owner::Description(id) | locks::Owner::Lease(id) =
            lock.owner
            && let Some(description) = recorded.descriptions.get(&id)
        {
            lock.inode = description.common.inode();
        }
    }
    Ok(())
}
