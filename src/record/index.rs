//! The records of a chain in commit order, and the ways to find them.

use std::collections::HashMap;

use super::chain::{Chain, Place};
use super::frame::FrameHeader;
use super::{Kind, ObjectId, Record};

/// A record that is kept in the chain.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    /// The whole frame.
    pub(super) place: Place,
    pub(super) payload_len: usize,
    pub(super) kind: Kind,
    pub(super) version: u16,
    pub(super) id: ObjectId,
}

/// The kept records in commit order, and which were committed at all.
#[derive(Debug, Default)]
pub(super) struct Index {
    entries: Vec<Entry>,
    by_kind: HashMap<Kind, Vec<u32>>,
    /// Without a number: committed, but not kept.
    by_object: HashMap<(Kind, ObjectId), Option<u32>>,
}

impl Index {
    /// Whether a record of this kind and object was committed, kept or not.
    pub(super) fn holds(&self, kind: Kind, id: ObjectId) -> bool {
        self.by_object.contains_key(&(kind, id))
    }

    /// Adds a record that is kept; returns its number.
    pub(super) fn keep(&mut self, entry: Entry) -> u32 {
        let number = self.entries.len() as u32;
        self.by_kind.entry(entry.kind).or_default().push(number);
        self.by_object.insert((entry.kind, entry.id), Some(number));
        self.entries.push(entry);
        number
    }

    /// Adds a record that is not kept.
    pub(super) fn note(&mut self, kind: Kind, id: ObjectId) {
        self.by_object.insert((kind, id), None);
    }

    pub(super) fn len(&self) -> u32 {
        self.entries.len() as u32
    }

    pub(super) fn places(&self) -> impl Iterator<Item = Place> {
        self.entries.iter().map(|entry| entry.place)
    }

    pub(super) fn of_kind(&self, kind: Kind) -> &[u32] {
        self.by_kind.get(&kind).map_or(&[], Vec::as_slice)
    }

    pub(super) fn find(&self, kind: Kind, id: ObjectId) -> Option<u32> {
        self.by_object.get(&(kind, id)).copied().flatten()
    }

    pub(super) fn view<'a>(&self, chain: &'a Chain, number: u32) -> Record<'a> {
        let Entry {
            place,
            payload_len,
            kind,
            version,
            id,
        } = self.entries[number as usize];
        let payload = &chain.bytes(place)[FrameHeader::LEN..][..payload_len];
        Record {
            kind,
            version,
            id,
            sequence: u64::from(number),
            payload,
        }
    }
}
