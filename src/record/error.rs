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
    /// An earlier write failed half-way: what the sink holds is not an image.
    #[error("the image is cut short by an earlier write error")]
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
}
