//! inotify(7). What happened to the watched files since a checkpoint has not happened after a rollback: unread events
//! are dropped. Events that were unread at the checkpoint can't be put back, so those refuse it.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::Error;
use super::epoll::kernel_device;
use super::fdinfo::Fdinfo;
use super::live::Live;
use super::model::Complaint;
use crate::kernel::anonymous;

/// What an instance watches.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct State {
    /// Its watches, by number.
    pub watches: Vec<Watch>,
    /// Bytes of unread events.
    pub unread: usize,
    /// Of an observed state: recorded watches that are gone and whose file can't be found any more.
    pub lost: Vec<i32>,
}

/// A watch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// Its number.
    pub wd: i32,
    /// Device (as in the kernel) and inode number of the watched file.
    pub inode: (u64, u64),
    /// Events and flags (`IN_*`).
    pub mask: u32,
    /// The file's handle, type first; `None` if the file system has none to give.
    pub handle: Option<(i32, Vec<u8>)>,
}

/// What must be done to an instance.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Change {
    /// Numbers of watches to remove.
    pub remove: Vec<i32>,
    /// Watches whose mask is to be set.
    pub set: Vec<Watch>,
}

/// Watch numbers are given out one after the other; to get a certain one, those before it are used up. More than this
/// many is refused.
const MOST_NUMBERS: i32 = 100_000;
const SETTABLE: u32 = libc::IN_ALL_EVENTS | libc::IN_EXCL_UNLINK | libc::IN_ONESHOT;

fn parse(info: &Fdinfo) -> Result<Vec<Watch>, Error> {
    let mut watches = Vec::new();
    for line in info.lines_of("inotify") {
        let handle = match info.word(line, "f_handle") {
            Ok(text) => {
                let kind = info.word_number(line, "fhandle-type", 16)? as i32;
                let digits = |at| {
                    text.get(at..at + 2)
                        .and_then(|two| u8::from_str_radix(two, 16).ok())
                };
                Some((kind, (0..text.len()).step_by(2).map_while(digits).collect()))
            }
            Err(_) => None,
        };
        watches.push(Watch {
            wd: info.word_number(line, "wd", 16)? as i32,
            inode: (
                info.word_number(line, "sdev", 16)?,
                info.word_number(line, "ino", 16)?,
            ),
            mask: info.word_number(line, "mask", 16)? as u32,
            handle,
        });
    }
    watches.sort_by_key(|watch| watch.wd);
    Ok(watches)
}

/// What an instance watches now, and how much is unread.
pub fn read(live: &Live<'_>) -> Result<State, Error> {
    let unread = anonymous::readable_bytes(live.duplicate()?).map_err(live.failed("FIONREAD"))?;
    Ok(State {
        watches: parse(live.fdinfo()?)?,
        unread,
        lost: Vec::new(),
    })
}

/// Records an instance.
pub fn capture(live: &Live<'_>) -> Result<State, Error> {
    let state = read(live)?;
    if state.unread > 0 {
        return Err(live
            .refuse(
                "inotify instance with unread events",
                "they could not be put back; try again when the program has read them",
            )
            .into());
    }
    Ok(state)
}

impl State {
    /// The state now, and whether watches that are gone could be set again.
    pub fn observe(&self, live: &Live<'_>) -> Result<Self, Error> {
        let mut now = read(live)?;
        now.lost = self
            .watches
            .iter()
            .filter(|watch| now.watches.iter().all(|other| other.wd != watch.wd))
            .filter(|watch| find(live.holder.pid, watch).is_err())
            .map(|watch| watch.wd)
            .collect();
        Ok(now)
    }

    /// What must change in `now`; `Ok(None)` if the instance must be replaced by a new one.
    pub fn difference(&self, now: &Self) -> Result<Option<Option<Change>>, Complaint> {
        if let Some(wd) = now.lost.first() {
            let object = format!("inotify watch {wd}");
            return Err((
                object,
                "the watched file is gone and can't be watched again".into(),
            ));
        }
        let mut change = Change::default();
        for recorded in &self.watches {
            match now.watches.iter().find(|watch| watch.wd == recorded.wd) {
                Some(watch) if watch.inode == recorded.inode => {
                    if watch.mask != recorded.mask {
                        change.set.push(recorded.clone());
                    }
                }
                _ => return self.replaceable().map(|()| None),
            }
        }
        let is_new = |watch: &&Watch| self.watches.iter().all(|other| other.wd != watch.wd);
        change
            .remove
            .extend(now.watches.iter().filter(is_new).map(|watch| watch.wd));
        Ok(Some(
            (change != Change::default() || now.unread > 0).then_some(change),
        ))
    }

    /// Whether another instance with the same watch numbers can be made.
    pub fn replaceable(&self) -> Result<(), Complaint> {
        match self
            .watches
            .iter()
            .find(|watch| watch.wd > MOST_NUMBERS || watch.handle.is_none())
        {
            None => Ok(()),
            Some(watch) => {
                let object = format!("inotify watch {}", watch.wd);
                Err((
                    object,
                    "it was removed since the checkpoint and can't be set again".into(),
                ))
            }
        }
    }

    /// Makes an instance with the same watches under the same numbers; files are found through the mounts of `pid`.
    pub fn make(&self, pid: i32) -> Result<OwnedFd, Error> {
        let fd = anonymous::inotify(true).map_err(own("inotify_init1"))?;
        let mut next = 1;
        for watch in &self.watches {
            while next < watch.wd {
                // Uses up a number.
                let wd = anonymous::add_watch(&fd, c"/proc/self/fd", libc::IN_DELETE_SELF)
                    .map_err(own("inotify_add_watch"))?;
                anonymous::remove_watch(&fd, wd).map_err(own("inotify_rm_watch"))?;
                next = wd + 1;
            }
            if set(&fd, pid, watch)? != watch.wd {
                return Err(own("inotify_add_watch")(Errno::EEXIST));
            }
            next = watch.wd + 1;
        }
        drain(&fd)?;
        Ok(fd)
    }
}

fn own(call: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Own { call, errno }
}

/// Opens a watched file with `O_PATH`, by its handle, through a mount of its file system.
fn find(pid: i32, watch: &Watch) -> Result<OwnedFd, Error> {
    let Some((kind, handle)) = &watch.handle else {
        return Err(own("open_by_handle_at")(Errno::EOPNOTSUPP));
    };
    let path = format!("/proc/{pid}/mountinfo");
    let mounts = std::fs::read_to_string(&path).map_err(|error| Error::Text {
        path,
        problem: error.to_string(),
    })?;
    let mut result = Err(own("open_by_handle_at")(Errno::ESTALE));
    for line in mounts.lines() {
        let mut words = line.split(' ').skip(2);
        let device = words.next().and_then(|word| word.split_once(':'));
        let Some((major, minor)) = device else {
            continue;
        };
        let device = (major.parse::<u64>().ok()).zip(minor.parse::<u64>().ok());
        let Some((major, minor)) = device else {
            continue;
        };
        if (major << 20) | minor != watch.inode.0 {
            continue;
        }
        let Some(point) = words.nth(1) else { continue };
        let Ok(mount) = File::open(format!("/proc/{pid}/root{}", unescape(point))) else {
            continue;
        };
        match anonymous::open_by_handle(&mount, *kind, handle) {
            Ok(fd) => return Ok(fd),
            Err(errno) => result = Err(own("open_by_handle_at")(errno)),
        }
    }
    result
}

/// A path as proc_pid_mountinfo(5) writes it: blanks and backslashes are octal escapes.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

fn set(inotify: impl AsFd, pid: i32, watch: &Watch) -> Result<i32, Error> {
    let file = find(pid, watch)?;
    if let Ok(at) = nix::sys::stat::fstat(file.as_raw_fd())
        && (kernel_device(at.st_dev), at.st_ino) != watch.inode
    {
        return Err(own("open_by_handle_at")(Errno::ESTALE));
    }
    let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_err(|_| own("inotify_add_watch")(Errno::EINVAL))?;
    anonymous::add_watch(inotify, &path, watch.mask & SETTABLE).map_err(own("inotify_add_watch"))
}

/// Drops the unread events.
fn drain(inotify: impl AsFd) -> Result<(), Error> {
    let mut file =
        File::from(inotify.as_fd().try_clone_to_owned().map_err(|error| {
            own("dup")(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
        })?);
    loop {
        let unread = anonymous::readable_bytes(&file).map_err(own("FIONREAD"))?;
        if unread == 0 {
            return Ok(());
        }
        let mut events = vec![0; unread];
        file.read(&mut events).map_err(|error| {
            own("read")(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
        })?;
    }
}

impl Change {
    /// Makes the change on a live instance and drops its unread events.
    pub fn apply(&self, inotify: OwnedFd, pid: i32) -> Result<(), Error> {
        for wd in &self.remove {
            match anonymous::remove_watch(&inotify, *wd) {
                // Its file was deleted meanwhile.
                Ok(()) | Err(Errno::EINVAL) => {}
                Err(errno) => return Err(own("inotify_rm_watch")(errno)),
            }
        }
        for watch in &self.set {
            set(&inotify, pid, watch)?;
        }
        drain(&inotify)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now(fd: &OwnedFd) -> Vec<Watch> {
        parse(&Fdinfo::read(std::process::id() as i32, fd.as_raw_fd()).unwrap()).unwrap()
    }

    #[test]
    fn an_instance_is_made_again_with_its_numbers() {
        let pid = std::process::id() as i32;
        let directory = tempfile::tempdir().unwrap();
        let path = CString::new(directory.path().to_str().unwrap()).unwrap();
        let first = anonymous::inotify(true).unwrap();
        for _ in 0..4 {
            let wd = anonymous::add_watch(&first, &path, libc::IN_CREATE).unwrap();
            anonymous::remove_watch(&first, wd).unwrap();
        }
        assert_eq!(anonymous::add_watch(&first, &path, libc::IN_CREATE), Ok(5));
        let recorded = State {
            watches: now(&first),
            ..State::default()
        };
        if find(pid, &recorded.watches[0]).is_err() {
            println!("SKIP no file handles on the file system of {path:?}");
            assert!(std::env::var_os("SNAPBACK_STRICT").is_none());
            return;
        }
        let second = recorded.make(pid).unwrap();
        assert_eq!(now(&second), recorded.watches);
        assert_eq!(anonymous::readable_bytes(&second), Ok(0));

        std::fs::write(directory.path().join("new"), "").unwrap();
        assert_eq!(anonymous::add_watch(&second, &path, libc::IN_DELETE), Ok(5));
        assert_eq!(anonymous::add_watch(&second, c"/", libc::IN_DELETE), Ok(6));
        let unread = anonymous::readable_bytes(&second).unwrap();
        let state = State {
            watches: now(&second),
            unread,
            lost: Vec::new(),
        };
        let change = recorded.difference(&state).unwrap().unwrap().unwrap();
        change.apply(second.try_clone().unwrap(), pid).unwrap();
        assert_eq!(now(&second), recorded.watches);
        assert_eq!(anonymous::readable_bytes(&second), Ok(0));
    }
}
