//! Makes the changes of a plan.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use super::Error;
use super::live::Holder;
use super::model::{ObjectId, Place};

/// What carrying out a plan did that users are told of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Effects {
    /// Connections that could not be kept and were reset.
    pub reset_connections: usize,
    /// What was left as it is because it belongs to the outside too, in words.
    pub kept: Vec<String>,
}

/// The live objects, for changes to them.
#[derive(Debug)]
pub struct Reach<'a> {
    pub(super) holders: &'a BTreeMap<i32, Holder>,
    /// Where each recorded description is now.
    pub(super) places: BTreeMap<ObjectId, Place>,
}

impl Reach<'_> {
    /// A place of a recorded description, if it is there (again).
    pub fn place(&self, id: ObjectId) -> Option<Place> {
        self.places.get(&id).copied()
    }

    /// The process of this host PID.
    pub fn holder(&self, pid: i32) -> Option<&Holder> {
        self.holders.get(&pid)
    }

    /// A duplicate of a recorded description that is there. Drop it before the tree runs.
    pub fn duplicate(&self, id: ObjectId) -> Result<OwnedFd, Error> {
        let missing = Error::Own {
            call: "finding a descriptor",
            errno: nix::errno::Errno::EBADF,
        };
        let Some(place) = self.place(id) else {
            return Err(missing);
        };
        match self.holder(place.pid) {
            Some(holder) => holder.duplicate(place.fd),
            None => Err(missing),
        }
    }
}
