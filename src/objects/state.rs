//! What each kind of description adds to what all have: one enum that dispatches to the files of the kinds.

use serde::{Deserialize, Serialize};

use super::Error;
use super::live::Live;
use super::socket;
use crate::outcome::Refusal;

/// The state of a description beyond [`Common`](super::model::Common).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// A socket of any family.
    Socket(socket::State),
}

/// What must be done to a description that is there so that it is as recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// To a socket.
    Socket(socket::Change),
}

impl State {
    /// Records a description, or refuses it by name.
    pub fn capture(live: &Live<'_>) -> Result<Self, Error> {
        match live.common.file_type() {
            libc::S_IFSOCK => socket::capture(live).map(Self::Socket),
            _ => Err(live
                .refuse(live.link()?, "not known to this version")
                .into()),
        }
    }

    /// The state now of the description that was recorded as `self`.
    pub fn observe(&self, live: &Live<'_>) -> Result<Self, Error> {
        match self {
            Self::Socket(recorded) => recorded.observe(live).map(Self::Socket),
        }
    }

    /// What must change to make `now` equal to `self`; `None` if nothing must.
    pub fn difference(&self, now: &Self) -> Result<Option<Change>, Refusal> {
        match (self, now) {
            (Self::Socket(recorded), Self::Socket(now)) => {
                Ok(recorded.difference(now)?.map(Change::Socket))
            }
        }
    }

    /// What differs, in words, after a rollback. Looks by other means than [`State::observe`].
    pub fn verify(&self, live: &Live<'_>) -> Result<Vec<String>, Error> {
        match self {
            Self::Socket(recorded) => recorded.verify(live),
        }
    }
}
