//! What can go wrong with a context or an image.

use std::io;

use super::{Kind, ObjectId, Position};

/// Result of this room.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with a context or an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No memory for the buffer chain.
    #[error(
        "buffer chain: cannot map a chunk of {len} bytes: {source}; free memory or raise the memory limit"
    )]
    Chunk {
        /// Bytes asked for.
        len: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// The sink of a streaming context or of a write-out failed.
    #[error("cannot write the image: {0}")]
    Sink(#[source] io::Error),
    /// An earlier read or write failed half-way: there is no whole image.
    #[error("the image is cut short by an earlier error")]
    Broken,
    /// A payload over [`MAX_PAYLOAD`](super::MAX_PAYLOAD).
    #[error("a {kind} of {len} bytes is too long for one record")]
    TooLong {
        /// Kind of the record.
        kind: Kind,
        /// Bytes asked for.
        len: usize,
    },
    /// A kind that only the context itself writes.
    #[error("a {kind} record is written by the context itself")]
    Framing {
        /// The kind asked for.
        kind: Kind,
    },
    /// The object already has a record of this kind.
    #[error("object {id} already has a {kind} record")]
    Duplicate {
        /// Kind of the record.
        kind: Kind,
        /// The object.
        id: ObjectId,
    },
    /// An id that this context did not give out.
    #[error("object {id} was not given out by this context")]
    UnknownObject {
        /// The object.
        id: ObjectId,
    },
    /// An object is referred to, or the context ends, before the object's record was committed.
    #[error("{what} {object} has no record yet: an object is written before its first user")]
    Unwritten {
        /// The object's id.
        object: u64,
        /// Its kind in words.
        what: &'static str,
    },
    /// A reservation or record reference of another context.
    #[error("the reservation or record belongs to another context")]
    Foreign,
    /// Reservations that ended in neither commit nor cancel.
    #[error("{count} reservations were neither committed nor cancelled")]
    Open {
        /// How many.
        count: usize,
    },
    /// The context is finished and takes no more records.
    #[error("the context is finished")]
    Finished,
    /// The context is not finished, so there is no whole image to write.
    #[error("the context is not finished")]
    Unfinished,
    /// The record was written to the sink and is not kept.
    #[error("a streaming context does not keep its records")]
    NotKept,
    /// A value that does not go into JSON.
    #[error("{kind}: cannot encode as JSON: {source}")]
    Encode {
        /// Kind of the record.
        kind: Kind,
        /// What the encoder said.
        source: serde_json::Error,
    },
    /// A payload that is not what its kind promises.
    #[error("{kind} of object {id}: {problem}")]
    Payload {
        /// Kind of the record.
        kind: Kind,
        /// The object.
        id: ObjectId,
        /// What is wrong.
        problem: String,
    },
    /// The source of an image failed.
    #[error("{at}: cannot read the image: {source}")]
    Source {
        /// Where.
        at: Position,
        /// What the source said.
        source: io::Error,
    },
    /// The thread that reads ahead ended without saying how: the source panicked.
    #[error("reading ahead: the source of the image panicked")]
    ReaderDied,
    /// The input does not begin as an image does.
    #[error("not a snapback image: it begins with {found:02x?}")]
    NotAnImage {
        /// What it begins with.
        found: [u8; 8],
    },
    /// The framing is of a version that this build does not know.
    #[error(
        "image format {version} is not known here (known: {known}); read it with the snapback that wrote it"
    )]
    FutureFormat {
        /// The version found.
        version: u32,
        /// The only one that this build knows.
        known: u32,
    },
    /// The input ends too early.
    #[error("{at}: the image is truncated: {missing} bytes or more are missing")]
    Truncated {
        /// Where.
        at: Position,
        /// Bytes known to be missing.
        missing: u64,
    },
    /// A length that no writer produces.
    #[error("{at}: a payload of {length} bytes is not believable")]
    AbsurdLength {
        /// Where.
        at: Position,
        /// The length found.
        length: u64,
    },
    /// The content does not match its checksum.
    #[error("{at}: corrupt: checksum {found:08x}, but the content has {expected:08x}")]
    Checksum {
        /// Where.
        at: Position,
        /// Checksum of the content.
        expected: u32,
        /// Checksum in the frame.
        found: u32,
    },
    /// A record that is not the next one.
    #[error("{at}: this is record {found}: records were lost, repeated or reordered")]
    Order {
        /// Where.
        at: Position,
        /// The number it carries.
        found: u64,
    },
    /// A kind that this build does not know.
    #[error("{at}: kind {number} is not known here; read it with the snapback that wrote it")]
    UnknownKind {
        /// Where.
        at: Position,
        /// The kind's number.
        number: u16,
    },
    /// A record whose layout is newer than this build.
    #[error("{at}: version {version} is not known here (newest known: {known})")]
    FutureVersion {
        /// Where.
        at: Position,
        /// The version found.
        version: u16,
        /// The newest version that this build knows.
        known: u16,
    },
    /// Intact, but against the rules of the format.
    #[error("{at}: {problem}")]
    Malformed {
        /// Where.
        at: Position,
        /// Which rule.
        problem: &'static str,
    },
}
