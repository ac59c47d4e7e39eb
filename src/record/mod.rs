//! The context: an owned buffer chain of framed headers, and the object table.
//!
//! A checkpoint keeps memory pages copy-on-write and everything else as *records* (the 2008 design calls them
//! headers) in a [`Context`]: space is reserved, filled in and committed; what is committed never moves and is read
//! in place.
//!
//! ```
//! use snapback::record::{Context, Interned, Kind, ObjectKey};
//! use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};
//!
//! #[derive(Debug, PartialEq, FromBytes, IntoBytes, KnownLayout, Immutable)]
//! #[repr(C)]
//! struct Counter {
//!     value: u64,
//! }
//!
//! # fn main() -> snapback::record::Result<()> {
//! let mut context = Context::buffering()?;
//! let eventfd = match context.intern(ObjectKey::new(Kind::Eventfd, 14, 4711)) {
//!     Interned::New(id) => {
//!         context.put(Kind::Eventfd, id, &Counter { value: 3 }, b"")?;
//!         id
//!     }
//!     Interned::Known(id) => id,
//! };
//! let table = context.new_object();
//! let slots = [context.refer(eventfd)?];
//! context.put_list(Kind::FileTable, table, &slots)?;
//! context.finish()?;
//!
//! let record = context.find(Kind::Eventfd, eventfd).expect("it was committed");
//! assert_eq!(record.fixed::<Counter>()?.0, &Counter { value: 3 });
//! # Ok(())
//! # }
//! ```

mod chain;
mod check;
mod context;
mod decode;
mod error;
mod frame;
mod frames;
mod fuzzing;
mod index;
mod kind;
mod object;
mod put;
mod read_ahead;
mod stats;
mod view;

#[cfg(test)]
mod context_tests;
#[cfg(test)]
mod corpus_tests;
#[cfg(test)]
mod decode_tests;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod read_ahead_tests;

pub use chain::CHUNK_LEN;
pub use context::{Context, Reservation};
pub use decode::read_header;
pub use error::{Error, Result};
pub use frame::{ALIGNMENT, FORMAT_VERSION, ImageHeader, MAGIC, MAX_PAYLOAD, Position};
pub use frames::{Frame, Frames};
pub use fuzzing::fuzz_one;
pub(crate) use fuzzing::with_right_checksums;
pub use kind::Kind;
pub use object::{Interned, ObjectId, ObjectKey};
pub use read_ahead::{ReadAhead, read_ahead};
pub use stats::{KindStats, Stats};
pub use view::{Record, RecordRef};
