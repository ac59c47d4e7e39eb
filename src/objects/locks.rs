//! File locks: flock(2), POSIX locks and open file description locks (fcntl(2)); and leases, which the kernel keeps with them.
//!
//! Descriptors tell in their fdinfo which locks are held through them. `/proc/locks`, which tells of everybody's, can take
//! milliseconds, and is read only where a lock has to be taken that others might have now.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
// nix's `Flock` unlocks when it is dropped; these locks are others'.
#[allow(deprecated)]
use nix::fcntl::flock;
use nix::fcntl::{FcntlArg, FlockArg, fcntl};
use serde::{Deserialize, Serialize};

use super::Error;
use super::fdinfo::Fdinfo;
use super::model::{Common, Complaint, Inode, ObjectId, Place};
use crate::freeze::{Batch, StepId};
use crate::kernel::anonymous;

/// Whose a lock is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Owner {
    /// flock(2): the description's.
    Flock(ObjectId),
    /// `F_OFD_SETLK`: the description's.
    Description(ObjectId),
    /// `F_SETLEASE`: the description's; not a lock, but somebody to be told when others open the file.
    Lease(ObjectId),
    /// `F_SETLK`: the process's, by host PID, through a number of its table.
    Process(Place),
    /// Somebody's outside the tree.
    Foreign,
}

/// A lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Lock {
    /// Whose it is.
    pub owner: Owner,
    /// The locked file.
    pub inode: Inode,
    /// Exclusive.
    pub write: bool,
    /// First byte.
    pub start: u64,
    /// Last byte; `u64::MAX`: to the end of the file.
    pub end: u64,
}

impl Lock {
    fn conflicts(&self, other: &Self) -> bool {
        let sort = |lock: &Self| matches!(lock.owner, Owner::Flock(_));
        let is_lease = |lock: &Self| matches!(lock.owner, Owner::Lease(_));
        !is_lease(self)
            && !is_lease(other)
            && self.inode == other.inode
            && (self.write || other.write)
            && (self.start <= other.end && other.start <= self.end)
            && (other.owner == Owner::Foreign || sort(self) == sort(other))
    }

    fn flock(&self, unlock: bool) -> libc::flock {
        let kind = match (unlock, self.write) {
            (true, _) => libc::F_UNLCK,
            (_, true) => libc::F_WRLCK,
            (_, false) => libc::F_RDLCK,
        };
        let len = if self.end == u64::MAX {
            0
        } else {
            self.end - self.start + 1
        };
        libc::flock {
            l_type: kind as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: self.start as i64,
            l_len: len as i64,
            l_pid: 0,
        }
    }
}

/// A line of `/proc/locks` or of fdinfo, without its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Line<'a> {
    sort: &'a str,
    pid: i32,
    device: u64,
    ino: u64,
    write: bool,
    start: u64,
    end: u64,
}

impl Line<'_> {
    /// Whether descriptors with these flags are for such a lock (fcntl(2)).
    fn can_be_taken_through(&self, flags: i32) -> bool {
        let mode = if self.write {
            libc::O_RDONLY
        } else {
            libc::O_WRONLY
        };
        flags & libc::O_ACCMODE != mode
    }

    fn lock(&self, inode: Inode, owner: Owner) -> Lock {
        Lock {
            owner,
            inode,
            write: self.write,
            start: self.start,
            end: self.end,
        }
    }
}

/// Reads `1: POSIX  ADVISORY  WRITE 359 00:13:11691 5 14`; `None` for a waiting one (`->`) or a delegation.
fn parse(line: &str) -> Option<Line<'_>> {
    let mut words = line.split_whitespace().skip(1);
    let sort = words
        .next()
        .filter(|sort| ["FLOCK", "POSIX", "OFDLCK", "LEASE"].contains(sort))?;
    let write = match words.nth(1)? {
        "WRITE" => true,
        "READ" => false,
        _ => return None,
    };
    let pid = words.next()?.parse().ok()?;
    let mut file = words.next()?.split(':');
    let major = u64::from_str_radix(file.next()?, 16).ok()?;
    let minor = u64::from_str_radix(file.next()?, 16).ok()?;
    let ino = file.next()?.parse().ok()?;
    let start = words.next()?.parse().ok()?;
    let end = match words.next()? {
        "EOF" => u64::MAX,
        number => number.parse().ok()?,
    };
    Some(Line {
        sort,
        pid,
        device: (major << 20) | minor,
        ino,
        write,
        start,
        end,
    })
}

/// Whether its locks are looked at: those of regular files and directories. flock(2) takes any descriptor, but nobody locks
/// pipes or sockets, and asking each of them would cost every rollback.
fn can_be_locked(common: &Common) -> bool {
    matches!(common.file_type(), libc::S_IFREG | libc::S_IFDIR) && common.flags & libc::O_PATH == 0
}

/// The locks of a tree. `files` are its open numbers whose descriptions are recorded or to be recorded, each with the
/// processes that have it.
///
/// # Errors
/// If a text of `/proc` can't be read.
pub fn held<'t>(
    files: impl Iterator<Item = (ObjectId, Common, Place, &'t [i32])>,
) -> Result<Vec<Lock>, Error> {
    /// From so many on it is worth asking which files have locks at all.
    const MANY: usize = 500;
    let files: Vec<_> = files
        .filter(|(_, common, ..)| can_be_locked(common))
        .collect();
    let locked = match files.len() {
        ..=MANY => None,
        _ => Some(with_lines(|lines| -> BTreeSet<_> {
            lines.map(|line| (line.device, line.ino)).collect()
        })?),
    };
    let mut found = BTreeSet::new();
    let mut of_processes = BTreeSet::new();
    for (id, common, place, holders) in files {
        let inode = common.inode();
        if locked
            .as_ref()
            .is_some_and(|locked| !locked.contains(&key(inode)))
        {
            continue;
        }
        let info = Fdinfo::read(place.pid, place.fd)?;
        for line in info.lines("lock").filter_map(parse) {
            let owner = match line.sort {
                "FLOCK" => Owner::Flock(id),
                "OFDLCK" => Owner::Description(id),
                "LEASE" => Owner::Lease(id),
                // Others that share the description have locks of their own, which are shown here too; and one of theirs
                // is shown with each description, or each that leads to the file.
                _ if holders.contains(&line.pid)
                    && line.can_be_taken_through(common.flags)
                    && of_processes.insert((place.pid, inode, line.start, line.end)) =>
                {
                    Owner::Process(place)
                }
                _ => continue,
            };
            found.insert(line.lock(inode, owner));
        }
    }
    Ok(found.into_iter().collect())
}

/// Locks that others have on the files that `wanted` are about. `now` are those of the tree, `pids` its processes, those too
/// that are about to end.
///
/// # Errors
/// If `/proc/locks` can't be read.
pub fn others(wanted: &[Lock], now: &[Lock], pids: &BTreeSet<i32>) -> Result<Vec<Lock>, Error> {
    let inodes: BTreeMap<(u64, u64), Inode> = wanted
        .iter()
        .map(|lock| (key(lock.inode), lock.inode))
        .collect();
    let is_ours = |found: &Lock| {
        now.iter().any(|lock| {
            !matches!(lock.owner, Owner::Process(_))
                && Lock {
                    owner: Owner::Foreign,
                    ..*lock
                } == *found
        })
    };
    with_lines(|lines| {
        lines
            .filter(|line| line.sort != "LEASE" && !pids.contains(&line.pid))
            .filter_map(|line| {
                let inode = *inodes.get(&(line.device, line.ino))?;
                Some(line.lock(inode, Owner::Foreign))
                    .filter(|lock| line.sort == "POSIX" || !is_ours(lock))
            })
            .collect()
    })
}

/// A file as `/proc/locks` names it.
fn key((device, ino): Inode) -> (u64, u64) {
    (super::epoll::kernel_device(device), ino)
}

/// Reads all locks of the machine. That waits for all processors, milliseconds.
fn with_lines<T>(read: impl FnOnce(&mut dyn Iterator<Item = Line<'_>>) -> T) -> Result<T, Error> {
    let path = "/proc/locks";
    let text = std::fs::read_to_string(path).map_err(|error| Error::Text {
        path: path.into(),
        problem: error.to_string(),
    })?;
    Ok(read(&mut text.lines().filter_map(parse)))
}

/// What must be done to the locks of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Change {
    /// Locks to drop.
    pub drop: Vec<Lock>,
    /// Locks to take, again if need be.
    pub take: Vec<Lock>,
}

/// Plans the locks. `tables_change`: numbers are closed, which may drop POSIX locks that are to stay.
pub fn plan(recorded: &[Lock], now: &[Lock], tables_change: bool) -> Change {
    let mut change = Change::default();
    change
        .drop
        .extend(now.iter().filter(|lock| !recorded.contains(lock)));
    change.take.extend(recorded.iter().filter(|lock| {
        let may_go = tables_change && matches!(lock.owner, Owner::Process(_));
        may_go || !now.contains(lock)
    }));
    if !change.drop.is_empty() {
        // Dropping part of a range, or a mode that replaced another, takes more with it.
        change.take = recorded.to_vec();
    }
    change
}

/// Whether the locks that others have leave room for those to be taken.
///
/// # Errors
/// If not: what is in the way.
pub fn check(change: &Change, others: &[Lock]) -> Result<(), Complaint> {
    for lock in &change.take {
        if let Some(other) = others.iter().find(|other| lock.conflicts(other)) {
            let sort = if other.write { "locked" } else { "read-locked" };
            let remedy = format!(
                "the file with inode {} is {sort} by another process now",
                other.inode.1
            );
            return Err(("file lock".into(), remedy));
        }
    }
    Ok(())
}

/// Takes or drops a lock that belongs to a description, through a duplicate of it.
#[allow(deprecated)]
pub fn apply(duplicate: impl AsFd, lock: &Lock, unlock: bool) -> Result<(), Error> {
    let fd = duplicate.as_fd().as_raw_fd();
    let own = |call| move |errno: Errno| Error::Own { call, errno };
    match lock.owner {
        Owner::Flock(_) => {
            let how = match (unlock, lock.write) {
                (true, _) => FlockArg::UnlockNonblock,
                (_, true) => FlockArg::LockExclusiveNonblock,
                (_, false) => FlockArg::LockSharedNonblock,
            };
            flock(fd, how).map_err(own("flock"))
        }
        Owner::Description(_) => fcntl(fd, FcntlArg::F_OFD_SETLK(&lock.flock(unlock)))
            .map(drop)
            .map_err(own("F_OFD_SETLK")),
        Owner::Lease(_) => {
            let kind = match (unlock, lock.write) {
                (true, _) => libc::F_UNLCK,
                (_, true) => libc::F_WRLCK,
                (_, false) => libc::F_RDLCK,
            };
            match anonymous::set_lease(duplicate, kind) {
                // One to be dropped may have been broken meanwhile.
                Err(Errno::EAGAIN) if unlock => Ok(()),
                other => other.map_err(own("F_SETLEASE")),
            }
        }
        Owner::Process(_) | Owner::Foreign => Ok(()),
    }
}

/// Adds the step that takes or drops a lock of a process, to be run in it.
pub fn apply_in_process(batch: &mut Batch, fd: i32, lock: &Lock, unlock: bool) -> StepId {
    let flock = lock.flock(unlock);
    let mut bytes = Vec::with_capacity(32);
    bytes.extend_from_slice(&flock.l_type.to_ne_bytes());
    bytes.extend_from_slice(&flock.l_whence.to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&flock.l_start.to_ne_bytes());
    bytes.extend_from_slice(&flock.l_len.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    let argument = batch.input(&bytes);
    batch.call(
        libc::SYS_fcntl,
        &[fd.into(), libc::F_SETLK.into(), argument],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_sort() {
        let line = parse("1: POSIX  ADVISORY  WRITE 359 fe:01:11691 5 14").unwrap();
        assert_eq!((line.sort, line.pid, line.ino), ("POSIX", 359, 11691));
        assert_eq!((line.device, line.start, line.end), (0xfe0_0001, 5, 14));
        let line = parse("2: FLOCK  ADVISORY  READ 12 00:13:7 0 EOF").unwrap();
        assert!(!line.write);
        assert_eq!(line.end, u64::MAX);
        assert_eq!(parse("2: -> FLOCK  ADVISORY  READ 12 00:13:7 0 EOF"), None);
        let line = parse("3: LEASE  ACTIVE    WRITE 12 00:13:7 0 EOF").unwrap();
        assert_eq!((line.sort, line.write), ("LEASE", true));
    }

    #[test]
    fn only_differences_are_planned() {
        let id = ObjectId::from_raw(9).unwrap();
        let lock = Lock {
            owner: Owner::Flock(id),
            inode: (1, 2),
            write: true,
            start: 0,
            end: u64::MAX,
        };
        let process = Lock {
            owner: Owner::Process(Place { pid: 1, fd: 3 }),
            ..lock
        };
        let other = Lock {
            owner: Owner::Foreign,
            ..lock
        };
        assert_eq!(plan(&[lock], &[lock], false), Change::default());
        assert_eq!(plan(&[lock], &[], false).take, [lock]);
        assert_eq!(plan(&[], &[lock], false).drop, [lock]);
        assert_eq!(plan(&[process], &[process], true).take, [process]);
        assert!(check(&plan(&[lock], &[], false), &[other]).is_err());
        assert!(check(&plan(&[lock], &[lock], false), &[other]).is_ok());
    }
}
