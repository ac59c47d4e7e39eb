//! What is recorded of file tables and open file descriptions, and what is found of them later.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::state::State;

/// Names a recorded description or table within a context.
pub type ObjectId = u64;

/// Where a descriptor is: a process (host PID of its leader) and a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Place {
    /// Host PID.
    pub pid: i32,
    /// Descriptor number.
    pub fd: i32,
}

/// What fcntl(2), lseek(2) and fstat(2) tell of any description.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Common {
    /// `F_GETFL`: access mode and status flags.
    pub flags: i32,
    /// File position; -1 if the kind has none.
    pub offset: i64,
    /// `st_dev`.
    pub dev: u64,
    /// `st_ino`.
    pub ino: u64,
    /// `st_mode`: type and permissions.
    pub mode: u32,
    /// `st_rdev` of a device.
    pub rdev: u64,
}

impl Common {
    /// The part of `st_mode` that says what type of file it is (`S_IF*`; 0 for anonymous inodes).
    pub fn file_type(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    /// The flags that are fixed when a description is made: access mode, `O_PATH`, `O_DIRECTORY` and the like are not
    /// changed by `F_SETFL`.
    pub fn fixed_flags(&self) -> i32 {
        self.flags & (libc::O_ACCMODE | libc::O_PATH)
    }

    /// The flags that `F_SETFL` changes (fcntl(2)).
    pub fn settable_flags(&self) -> i32 {
        self.flags & SETTABLE_FLAGS
    }
}

/// The flags that `F_SETFL` changes (fcntl(2)).
pub const SETTABLE_FLAGS: i32 =
    libc::O_APPEND | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME | libc::O_NONBLOCK;

/// A recorded open file description.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// What all kinds have.
    pub common: Common,
    /// Who gets `SIGIO` (`F_GETOWN_EX`, `F_GETSIG`); `None` if nobody does.
    pub owner: Option<Owner>,
    /// What its kind adds.
    pub state: State,
}

/// Who gets the signal of an `O_ASYNC` description (fcntl(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`.
    pub kind: i32,
    /// Its ID as the owner's process sees it.
    pub id: i32,
    /// `F_GETSIG`: 0 for `SIGIO`.
    pub signal: i32,
}

/// A number of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot<D> {
    /// Descriptor number.
    pub fd: i32,
    /// `FD_CLOEXEC`.
    pub close_on_exec: bool,
    /// The description behind it: an [`ObjectId`] if recorded, an index into [`Observed::descriptions`] if live.
    pub description: D,
}

/// A file table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table<D> {
    /// Host PIDs of the processes that share it; never empty.
    pub holders: Vec<i32>,
    /// Its numbers, ascending.
    pub slots: Vec<Slot<D>>,
}

impl<D: Copy> Table<D> {
    /// The process through which the table is looked at and changed.
    pub fn pid(&self) -> i32 {
        self.holders[0]
    }

    /// What is at a number.
    pub fn at(&self, fd: i32) -> Option<&Slot<D>> {
        self.slots
            .binary_search_by_key(&fd, |slot| slot.fd)
            .ok()
            .map(|index| &self.slots[index])
    }
}

/// All that a checkpoint holds of descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Recorded {
    /// The file tables.
    pub tables: Vec<Table<ObjectId>>,
    /// The descriptions. Of those with the same inode, a smaller id means less in the order of
    /// [`kcmp::files`](crate::kernel::kcmp::files) at the time of the capture.
    pub descriptions: BTreeMap<ObjectId, Description>,
    /// Names of the processes, for refusals.
    pub names: BTreeMap<i32, String>,
}

/// A description found in the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveDescription {
    /// One of its places.
    pub place: Place,
    /// What all kinds have.
    pub common: Common,
    /// The recorded description it is.
    pub is: Option<ObjectId>,
    /// What its kind adds; `None` for one that was not recorded.
    pub state: Option<State>,
    /// Who gets `SIGIO`.
    pub owner: Option<Owner>,
}

/// What was found in a tree, to be compared with [`Recorded`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observed {
    /// The file tables, in the order of [`Recorded::tables`].
    pub tables: Vec<Table<usize>>,
    /// The descriptions behind their numbers.
    pub descriptions: Vec<LiveDescription>,
}
