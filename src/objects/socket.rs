//! Sockets of any family: what they have in common, and the choice of the family's file.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::Error;
use super::execute::{Effects, Reach};
use super::live::Live;
use super::model::ObjectId;
use crate::outcome::Refusal;

/// A recorded socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// `SO_COOKIE`: names this socket and no other until the next boot.
    pub cookie: u64,
}

/// What must be done to a socket that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {}

/// Records a socket.
pub fn capture(live: &Live<'_>) -> Result<State, Error> {
    Err(live
        .refuse(
            "socket",
            "sockets of this kind are not supported; close it first",
        )
        .into())
}

impl State {
    /// The socket's state now. The caller has found the same cookie.
    pub fn observe(&self, _live: &Live<'_>) -> Result<Self, Error> {
        Ok(self.clone())
    }

    /// What must change to make `now` equal to `self`.
    pub fn difference(&self, _now: &Self) -> Result<Option<Change>, Refusal> {
        Ok(None)
    }

    /// Whether [`make`] can make it again, and if not what it is and what to do: object and remedy of a refusal.
    pub fn replaceable(&self) -> Result<(), (String, String)> {
        Err((
            "socket".into(),
            "it was closed since the checkpoint and can't be made again".into(),
        ))
    }

    /// What differs between the record and the live socket, in words.
    pub fn verify(&self, _live: &Live<'_>) -> Result<Vec<String>, Error> {
        Ok(Vec::new())
    }
}

/// Makes the sockets that are gone, all at once so that pairs can be made together: one description each, in order.
pub fn make(
    missing: &[(ObjectId, &State)],
    _reach: &Reach<'_>,
    _effects: &mut Effects,
) -> Result<Vec<OwnedFd>, Error> {
    debug_assert!(missing.is_empty(), "none is replaceable");
    Ok(Vec::new())
}

impl Change {
    /// Makes the change on the live socket.
    pub fn apply(
        &self,
        _id: ObjectId,
        _reach: &Reach<'_>,
        _effects: &mut Effects,
    ) -> Result<(), Error> {
        match *self {}
    }
}
