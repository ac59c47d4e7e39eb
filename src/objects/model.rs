//! What is recorded of file tables and open file descriptions, and what is found of them later.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::epoll_watch::Watched;
use super::live::describe;
use super::locks::Lock;
use super::mounts::Namespace;
use super::pipe::Pipe;
use super::socket;
use super::state::State;
use super::sysv::Sysv;
use super::terminal::{self, Terminal};
use crate::outcome::Refusal;

/// What stands in the way of something, for a [`Refusal`] whose holder is added later: the object
/// and the remedy.
pub type Complaint = (String, String);

pub use crate::record::ObjectId;

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

    /// Open for reading.
    pub fn can_read(&self) -> bool {
        matches!(self.flags & libc::O_ACCMODE, libc::O_RDONLY | libc::O_RDWR)
    }

    /// Open for writing.
    pub fn can_write(&self) -> bool {
        matches!(self.flags & libc::O_ACCMODE, libc::O_WRONLY | libc::O_RDWR)
    }

    /// Device and inode.
    pub fn inode(&self) -> Inode {
        (self.dev, self.ino)
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
    /// Its ID as the owner's process sees it; 0 is nobody.
    pub id: i32,
    /// `F_GETSIG`: 0 for `SIGIO`.
    pub signal: i32,
}

impl Owner {
    /// What a description has that was never given an owner.
    pub const NOBODY: Self = Self {
        kind: 1,
        id: 0,
        signal: 0,
    };
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
    /// The descriptions. Of those that look the same a smaller id means less in the order of
    /// [`kcmp::files`](crate::kernel::kcmp::files) at the time of the capture; an epoll instance has a greater id than all
    /// it watches.
    pub descriptions: BTreeMap<ObjectId, Description>,
    /// The pipes and FIFOs behind the descriptions of their ends, by device and inode.
    pub pipes: BTreeMap<Inode, Pipe>,
    /// File locks.
    pub locks: Vec<Lock>,
    /// System V semaphores and message queues.
    pub sysv: Sysv,
    /// What is mounted, in each mount namespace but ours.
    pub mounts: Vec<Namespace>,
    /// The terminals behind the descriptions.
    pub terminals: Vec<Terminal>,
    /// Names of the processes, for refusals.
    pub names: BTreeMap<i32, String>,
    /// Files whose offset others outside write at too. It stays where it is; images don't have this.
    pub shared_outside: BTreeSet<ObjectId>,
}

/// `st_dev` and `st_ino`.
pub type Inode = (u64, u64);

impl Recorded {
    /// All places of a description, in the order of tables and numbers.
    pub fn places(&self, id: ObjectId) -> impl Iterator<Item = Place> {
        self.tables.iter().flat_map(move |table| {
            let slots = table
                .slots
                .iter()
                .filter(move |slot| slot.description == id);
            slots.map(|slot| Place {
                pid: table.pid(),
                fd: slot.fd,
            })
        })
    }

    /// The first place of every description.
    pub fn first_places(&self) -> BTreeMap<ObjectId, Place> {
        let mut places = BTreeMap::new();
        for table in &self.tables {
            for slot in &table.slots {
                let place = Place {
                    pid: table.pid(),
                    fd: slot.fd,
                };
                places.entry(slot.description).or_insert(place);
            }
        }
        places
    }

    /// The sockets.
    pub fn sockets(&self) -> BTreeMap<ObjectId, &socket::State> {
        let sockets =
            self.descriptions
                .iter()
                .filter_map(|(id, description)| match &description.state {
                    State::Socket(state) => Some((*id, state)),
                    _ => None,
                });
        sockets.collect()
    }

    /// The memfds.
    pub fn memfds(&self) -> impl Iterator<Item = ObjectId> {
        let is_memfd = |state: &State| matches!(state, State::File(file) if file.form == crate::objects::file::Form::Memfd);
        let found = self
            .descriptions
            .iter()
            .filter(move |(_, description)| is_memfd(&description.state));
        found.map(|(id, _)| *id)
    }

    /// The memfds by device and inode, and their names as `/proc` shows them.
    pub fn memfd_names(&self) -> impl Iterator<Item = (Inode, &str)> {
        self.descriptions.values().filter_map(|description| {
            let State::File(file) = &description.state else {
                return None;
            };
            let is_memfd = file.form == crate::objects::file::Form::Memfd;
            is_memfd.then_some((description.common.inode(), file.path.as_str()))
        })
    }

    /// The inodes of plain files that are open by a name which was deleted.
    pub fn deleted_inodes(&self) -> impl Iterator<Item = Inode> {
        let deleted = |description: &&Description| match &description.state {
            State::File(file) => {
                file.form == crate::objects::file::Form::Plain && file.path.ends_with(" (deleted)")
            }
            _ => false,
        };
        let found = self.descriptions.values().filter(deleted);
        found.map(|description| description.common.inode())
    }

    /// Directories in which unix sockets are bound, or were, as the tree sees them: where one was deleted nothing is left of
    /// making it again but the directory's times.
    pub fn socket_directories(&self) -> Vec<PathBuf> {
        let path = |socket: &socket::State| {
            let path = Path::new(OsStr::from_bytes(socket.local.unix_path()?));
            let parent = path.parent().filter(|_| path.is_absolute());
            parent.map(Path::to_owned)
        };
        let mut found: Vec<PathBuf> = self.sockets().into_values().filter_map(path).collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    /// A refusal about a description, named by its first place.
    pub fn refuse(&self, id: ObjectId, (object, remedy): Complaint) -> Refusal {
        let place = self.places(id).next().unwrap_or(Place { pid: 0, fd: -1 });
        Refusal {
            object: format!("fd {}: {object}", place.fd),
            holder: self.holder(place.pid),
            remedy,
        }
    }

    /// A process as refusals name it.
    pub fn holder(&self, pid: i32) -> String {
        describe(pid, self.names.get(&pid).map_or("?", String::as_str))
    }
}

/// A description found in the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveDescription {
    /// One of its places.
    pub place: Place,
    /// What all kinds have.
    pub common: Common,
    /// Who gets `SIGIO`.
    pub owner: Option<Owner>,
    /// The recorded description it is.
    pub is: Option<ObjectId>,
    /// What its kind adds; `None` for one that was not recorded, or of a kind that adds nothing that could change.
    pub state: Option<State>,
}

impl Observed {
    /// The sockets that are recorded ones.
    pub fn sockets(&self) -> BTreeMap<ObjectId, &socket::State> {
        let sockets = self
            .descriptions
            .iter()
            .filter_map(|live| match &live.state {
                Some(State::Socket(state)) => Some((live.is?, state)),
                _ => None,
            });
        sockets.collect()
    }
}

/// How a description that is gone can be had again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Opened again by its path, which leads to the same inode, as the process with this host PID sees it.
    Path(i32),
    /// Opened again through the keeper's pin.
    Pin,
    /// Opened again through a descriptor on the same inode.
    Inode(Place),
    /// Made anew from its record.
    New,
    /// Not at all.
    Nowhere(Complaint),
}

/// What was found in a tree, to be compared with [`Recorded`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observed {
    /// The file tables, in the order of [`Recorded::tables`].
    pub tables: Vec<Table<usize>>,
    /// `RLIMIT_NOFILE` (soft) of each.
    pub limits: Vec<u64>,
    /// The descriptions behind their numbers.
    pub descriptions: Vec<LiveDescription>,
    /// What the entries of the recorded epoll instances watch, in the order of their states.
    pub watched: BTreeMap<ObjectId, Vec<Watched>>,
    /// Of recorded descriptions that are not among them: how they can be had again.
    pub gone: BTreeMap<ObjectId, Source>,
    /// The recorded internal pipes that are still there: capacity and content.
    pub pipes: BTreeMap<Inode, Pipe>,
    /// File locks of the tree.
    pub locks: Vec<Lock>,
    /// The terminals, in the order of [`Recorded::terminals`].
    pub terminals: Vec<terminal::Now>,
}
