//! Object ids and the table that gives each shared object exactly one.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use super::{Error, Kind, Result};

/// The id of an object within one context. Never zero, so that 0 in a payload can mean "none".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ObjectId(NonZeroU64);

impl ObjectId {
    /// The image itself: the object of records that describe the whole, as [`Kind::Tree`] does.
    pub const IMAGE: ObjectId = ObjectId(NonZeroU64::MIN);

    /// The id that a payload holds as a number; `None` for 0.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Option<ObjectId> {
        match NonZeroU64::new(raw) {
            Some(raw) => Some(ObjectId(raw)),
            None => None,
        }
    }

    /// The number to store in a payload.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0.get()
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What makes two sightings of a kernel object the same object: the kind it is recorded as and two numbers of the
/// caller's choice, as device and inode, or a group number found by `kcmp(2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// The kind of the object's record.
    pub kind: Kind,
    /// First half of the identity.
    pub major: u64,
    /// Second half of the identity.
    pub minor: u64,
}

impl ObjectKey {
    /// The key `(kind, major, minor)`.
    #[must_use]
    pub const fn new(kind: Kind, major: u64, minor: u64) -> ObjectKey {
        ObjectKey { kind, major, minor }
    }
}

/// What interning a key found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interned {
    /// First sight: the caller now writes the object's record.
    New(ObjectId),
    /// Seen before; its record is written, or being written by a caller further up.
    Known(ObjectId),
}

impl Interned {
    /// The id in either case.
    #[must_use]
    pub const fn id(self) -> ObjectId {
        match self {
            Interned::New(id) | Interned::Known(id) => id,
        }
    }

    /// Whether the caller has to write the object's record.
    #[must_use]
    pub const fn is_new(self) -> bool {
        matches!(self, Interned::New(_))
    }
}

/// Ids given out, and which of them have a record already.
#[derive(Debug)]
pub(super) struct ObjectTable {
    by_key: HashMap<ObjectKey, ObjectId>,
    /// Indexed by id; 0 is never an object.
    objects: Vec<Known>,
    /// The ids are given out by another table: all are known here.
    of_another: bool,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    key: Option<ObjectKey>,
    written: bool,
}

impl ObjectTable {
    pub(super) fn new() -> ObjectTable {
        let nobody = Known {
            key: None,
            written: true,
        };
        ObjectTable {
            by_key: HashMap::new(),
            objects: vec![nobody, nobody],
            of_another: false,
        }
    }

    /// A table of which the ids are another's.
    pub(super) fn of_another() -> ObjectTable {
        ObjectTable {
            of_another: true,
            ..ObjectTable::new()
        }
    }

    /// A new id for an object that nobody else can meet.
    pub(super) fn fresh(&mut self) -> ObjectId {
        self.push(None)
    }

    pub(super) fn intern(&mut self, key: ObjectKey) -> Interned {
        if let Some(&id) = self.by_key.get(&key) {
            return Interned::Known(id);
        }
        let id = self.push(Some(key));
        self.by_key.insert(key, id);
        Interned::New(id)
    }

    pub(super) fn lookup(&self, key: ObjectKey) -> Option<ObjectId> {
        self.by_key.get(&key).copied()
    }

    fn push(&mut self, key: Option<ObjectKey>) -> ObjectId {
        let raw = self.objects.len() as u64;
        self.objects.push(Known {
            key,
            written: false,
        });
        // The table starts with two entries, so the index is never 0.
        ObjectId(NonZeroU64::new(raw).unwrap_or(NonZeroU64::MIN))
    }

    /// Makes an id one that was given out, as another table has; ids up to it that were not are never.
    pub(super) fn adopt(&mut self, id: ObjectId) {
        let index = usize::try_from(id.raw()).unwrap_or(usize::MAX);
        let unused = Known {
            key: None,
            written: true,
        };
        while self.objects.len() <= index {
            self.objects.push(unused);
        }
        self.objects[index].written = false;
    }

    /// Fails unless `id` was given out by this table.
    pub(super) fn check_known(&self, id: ObjectId) -> Result<()> {
        if self.of_another || self.index(id).is_some() {
            Ok(())
        } else {
            Err(Error::UnknownObject { id })
        }
    }

    /// Fails unless a record of `id` was committed.
    pub(super) fn check_written(&self, id: ObjectId) -> Result<()> {
        match self.index(id) {
            None if self.of_another => Ok(()),
            None => Err(Error::UnknownObject { id }),
            Some(index) if self.objects[index].written => Ok(()),
            Some(index) => Err(self.unwritten(index)),
        }
    }

    pub(super) fn mark_written(&mut self, id: ObjectId) {
        if let Some(index) = self.index(id) {
            self.objects[index].written = true;
        }
    }

    /// Fails if an id was given out whose record never came.
    pub(super) fn check_complete(&self) -> Result<()> {
        match self.objects.iter().position(|known| !known.written) {
            Some(index) => Err(self.unwritten(index)),
            None => Ok(()),
        }
    }

    fn unwritten(&self, index: usize) -> Error {
        let kind = self.objects[index].key.map(|key| key.kind);
        Error::Unwritten {
            object: index as u64,
            what: kind.map_or("object", Kind::name),
        }
    }

    fn index(&self, id: ObjectId) -> Option<usize> {
        usize::try_from(id.raw())
            .ok()
            .filter(|&index| index < self.objects.len())
    }
}
