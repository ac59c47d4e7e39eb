//! File locks: flock(2), POSIX locks and open file description locks (fcntl(2)); and leases, which the kernel keeps with them.
//!
//! `/proc/locks` lists all of the machine in one read; only the descriptors of files that have one are looked at closer.

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

/// Whether any of these files is locked through one of these descriptors, which is far cheaper to ask than `/proc/locks`
/// (that waits for all processors, milliseconds). Of each file its common part and where it is.
///
/// # Errors
/// If a text of `/proc` can't be read.
pub fn any_held(files: impl Iterator<Item = (Common, Place)>) -> Result<bool, Error> {
    /// From so many on `/proc/locks` is no dearer.
    const MANY: usize = 500;
    let places: Vec<Place> = files
        .filter(|(common, _)| can_be_locked(common))
        .map(|(_, place)| place)
        .collect();
    if places.len() > MANY {
        return Ok(true);
    }
    for place in places {
        if Fdinfo::read(place.pid, place.fd)?.has("lock") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The locks on the files of a tree: its own and those of others on the same files. `descriptions` are those it has, with
/// the recorded (or to be recorded) id of each; locks of those without go when they are closed and count as neither.
pub fn find(
    descriptions: &[(Option<ObjectId>, Common, Place)],
    holders: &BTreeSet<i32>,
    slots: &[(Place, ObjectId)],
) -> Result<(Vec<Lock>, Vec<Lock>), Error> {
    let path = "/proc/locks";
    let text = std::fs::read_to_string(path).map_err(|error| Error::Text {
        path: path.into(),
        problem: error.to_string(),
    })?;
    let lines: Vec<Line<'_>> = text.lines().filter_map(parse).collect();
    let mut own = BTreeSet::new();
    let mut foreign = BTreeSet::new();
    if lines.is_empty() {
        return Ok((Vec::new(), Vec::new()));
    }
    let locked: BTreeSet<(u64, u64)> = lines.iter().map(|line| (line.device, line.ino)).collect();
    let key = |common: &Common| (super::epoll::kernel_device(common.dev), common.ino);
    let mut inodes: BTreeMap<(u64, u64), Inode> = BTreeMap::new();
    for (id, common, place) in descriptions {
        if !locked.contains(&key(common)) || !can_be_locked(common) {
            continue;
        }
        let inode = (common.dev, common.ino);
        inodes.insert(key(common), inode);
        let info = Fdinfo::read(place.pid, place.fd)?;
        for line in info.lines("lock").filter_map(parse) {
            let owner = match (line.sort, id) {
                ("FLOCK", Some(id)) => Owner::Flock(*id),
                ("OFDLCK", Some(id)) => Owner::Description(*id),
                ("LEASE", Some(id)) => Owner::Lease(*id),
                ("FLOCK" | "OFDLCK", None) => Owner::Foreign,
                _ => continue,
            };
            own.insert(Lock {
                owner,
                inode,
                write: line.write,
                start: line.start,
                end: line.end,
            });
        }
    }
    for line in &lines {
        let Some(&inode) = inodes.get(&(line.device, line.ino)) else {
            continue;
        };
        let lock = |owner| Lock {
            owner,
            inode,
            write: line.write,
            start: line.start,
            end: line.end,
        };
        match line.sort {
            "POSIX" if holders.contains(&line.pid) => {
                let place = slots.iter().find(|(place, id)| {
                    place.pid == line.pid
                        && descriptions.iter().any(|(other, common, _)| {
                            *other == Some(*id) && (common.dev, common.ino) == inode
                        })
                });
                own.extend(place.map(|(place, _)| lock(Owner::Process(*place))));
            }
            "LEASE" => {}
            "POSIX" => {
                foreign.insert(lock(Owner::Foreign));
            }
            _ => {
                let is_own = own.iter().any(|other| {
                    let same = (other.inode, other.write, other.start, other.end);
                    !matches!(other.owner, Owner::Process(_))
                        && same == (inode, line.write, line.start, line.end)
                });
                // One that a process born since took goes with that process.
                if !is_own && !holders.contains(&line.pid) {
                    foreign.insert(lock(Owner::Foreign));
                }
            }
        }
    }
    own.retain(|lock| lock.owner != Owner::Foreign);
    Ok((own.into_iter().collect(), foreign.into_iter().collect()))
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
pub fn plan(
    recorded: &[Lock],
    now: &[Lock],
    foreign: &[Lock],
    tables_change: bool,
) -> Result<Change, Complaint> {
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
    for lock in &change.take {
        if let Some(other) = foreign.iter().find(|other| lock.conflicts(other)) {
            let sort = if other.write { "locked" } else { "read-locked" };
            let remedy = format!(
                "the file with inode {} is {sort} by another process now",
                other.inode.1
            );
            return Err(("file lock".into(), remedy));
        }
    }
    Ok(change)
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
        assert_eq!(plan(&[lock], &[lock], &[], false), Ok(Change::default()));
        assert_eq!(plan(&[lock], &[], &[], false).unwrap().take, [lock]);
        assert_eq!(plan(&[], &[lock], &[], false).unwrap().drop, [lock]);
        assert_eq!(
            plan(&[process], &[process], &[], true).unwrap().take,
            [process]
        );
        assert!(plan(&[lock], &[], &[other], false).is_err());
    }
}
