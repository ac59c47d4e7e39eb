//! Committing a record in one call.

use serde::Serialize;
use zerocopy::{Immutable, IntoBytes};

use super::{Context, Error, Kind, ObjectId, RecordRef, Reservation, Result};

impl Context {
    /// Commits a record whose payload is `parts`, one after the other.
    ///
    /// # Errors
    ///
    /// As [`Context::reserve`] and [`Context::commit`].
    pub fn append(&mut self, kind: Kind, id: ObjectId, parts: &[&[u8]]) -> Result<RecordRef> {
        let len = parts.iter().map(|part| part.len()).sum();
        let reservation = self.reserve(kind, id, len)?;
        self.fill_and_commit(reservation, parts)
    }

    /// Commits a record of a fixed part and what follows it, to be read by [`Record::fixed`](super::Record::fixed).
    ///
    /// # Errors
    ///
    /// As [`Context::append`].
    pub fn put<T>(&mut self, kind: Kind, id: ObjectId, fixed: &T, tail: &[u8]) -> Result<RecordRef>
    where
        T: IntoBytes + Immutable,
    {
        self.append(kind, id, &[fixed.as_bytes(), tail])
    }

    /// Commits a record that is a list, to be read by [`Record::list`](super::Record::list).
    ///
    /// # Errors
    ///
    /// As [`Context::append`].
    pub fn put_list<T: IntoBytes + Immutable>(
        &mut self,
        kind: Kind,
        id: ObjectId,
        list: &[T],
    ) -> Result<RecordRef> {
        self.append(kind, id, &[list.as_bytes()])
    }

    /// Commits a record in JSON, to be read by [`Record::json`](super::Record::json): for what is rare and of many shapes.
    ///
    /// # Errors
    ///
    /// As [`Context::append`], and [`Error::Encode`].
    pub fn put_json<T: Serialize>(
        &mut self,
        kind: Kind,
        id: ObjectId,
        value: &T,
    ) -> Result<RecordRef> {
        let json = serde_json::to_vec(value).map_err(|source| Error::Encode { kind, source })?;
        self.append(kind, id, &[&json])
    }

    /// As `append`, for framing kinds too.
    pub(super) fn write(&mut self, kind: Kind, id: ObjectId, parts: &[&[u8]]) -> Result<RecordRef> {
        let len = parts.iter().map(|part| part.len()).sum();
        let reservation = self.set_aside(kind, id, len)?;
        self.fill_and_commit(reservation, parts)
    }

    fn fill_and_commit(&mut self, reservation: Reservation, parts: &[&[u8]]) -> Result<RecordRef> {
        let mut rest = self.payload(&reservation);
        for part in parts {
            let (here, after) = rest.split_at_mut(part.len());
            here.copy_from_slice(part);
            rest = after;
        }
        self.commit(reservation)
    }
}
