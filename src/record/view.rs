//! A committed record, read in place.

use serde::Deserialize;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::{Error, Kind, ObjectId, Result};

/// Names a committed record of one context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RecordRef {
    pub(super) context: u32,
    pub(super) index: u32,
}

/// A committed record. The payload lies in the buffer chain, aligned to 8 bytes, and is not copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    pub(super) kind: Kind,
    pub(super) version: u16,
    pub(super) id: ObjectId,
    pub(super) sequence: u64,
    pub(super) payload: &'a [u8],
}

impl<'a> Record<'a> {
    /// What the record describes.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The version of the payload: at most [`Kind::version`].
    #[must_use]
    pub const fn version(&self) -> u16 {
        self.version
    }

    /// The object it belongs to.
    #[must_use]
    pub const fn id(&self) -> ObjectId {
        self.id
    }

    /// Its number in the image, from 0.
    #[must_use]
    pub const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The payload, in place.
    #[must_use]
    pub const fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// The payload as a fixed part and what follows it, in place.
    ///
    /// # Errors
    ///
    /// [`Error::Payload`] if it is too short, or `T` wants more alignment than 8.
    pub fn fixed<T: FromBytes + KnownLayout + Immutable>(&self) -> Result<(&'a T, &'a [u8])> {
        T::ref_from_prefix(self.payload)
            .map_err(|error| self.bad(wanted::<T>(error, self.payload.len())))
    }

    /// The payload as a list, in place.
    ///
    /// # Errors
    ///
    /// [`Error::Payload`] if its length is not a multiple of `T`'s, or `T` wants more alignment than 8.
    pub fn list<T: FromBytes + KnownLayout + Immutable>(&self) -> Result<&'a [T]> {
        self.tail_list(self.payload)
    }

    /// The payload as a fixed part and a list that fills the rest, in place.
    ///
    /// # Errors
    ///
    /// As [`Record::fixed`] and [`Record::list`].
    pub fn fixed_list<T, U>(&self) -> Result<(&'a T, &'a [U])>
    where
        T: FromBytes + KnownLayout + Immutable,
        U: FromBytes + KnownLayout + Immutable,
    {
        let (fixed, tail) = self.fixed()?;
        Ok((fixed, self.tail_list(tail)?))
    }

    /// The payload decoded from JSON.
    ///
    /// # Errors
    ///
    /// [`Error::Payload`] if it is not JSON of this shape.
    pub fn json<T: Deserialize<'a>>(&self) -> Result<T> {
        serde_json::from_slice(self.payload).map_err(|error| self.bad(error.to_string()))
    }

    fn tail_list<T: FromBytes + KnownLayout + Immutable>(&self, tail: &'a [u8]) -> Result<&'a [T]> {
        <[T]>::ref_from_bytes(tail).map_err(|error| self.bad(wanted::<T>(error, tail.len())))
    }

    fn bad(&self, problem: String) -> Error {
        Error::Payload {
            kind: self.kind,
            id: self.id,
            problem,
        }
    }
}

fn wanted<T>(error: impl std::fmt::Debug, len: usize) -> String {
    let size = size_of::<T>();
    let aligned = align_of::<T>() <= super::ALIGNMENT;
    if aligned {
        format!("{len} bytes do not hold a layout of {size} bytes")
    } else {
        format!(
            "the layout wants more alignment than {}: {error:?}",
            super::ALIGNMENT
        )
    }
}
