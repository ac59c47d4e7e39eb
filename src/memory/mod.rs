//! Address spaces: VMA lists, shadows, dirty tracking, page store, shared memory.
//!
//! A checkpoint of an address space is a *shadow*, a stopped child that holds a copy-on-write copy of it, together
//! with the VMA list, the set of populated pages and write tracking armed on them. A rollback undoes the changes to
//! the VMA list, copies back the pages that were written since, drops those that were not there, and arms again.

mod advice;
mod aio;
mod capture;
mod content;
mod execute;
mod flags;
mod fork;
mod history;
mod hot;
mod image;
mod increment;
mod layout;
mod locks;
mod observe;
mod page_map;
mod page_store;
mod plan;
mod ranges;
mod remake;
mod room;
mod segments;
mod shadow;
mod shared;
mod source;
mod space;
mod store;
mod verify;

pub use content::SpaceContent;
pub use flags::prepare_flags;
pub use fork::{Forks, Fresh, start_shadows};
pub use image::{AddressSpaceHeader, SpaceImage};
pub use increment::{Answers, Changes, Inquiry};
pub use layout::Layout;
pub use observe::{Map, Observed, look_at_map};
pub use page_store::PageStore;
pub use plan::{Plan, Recorded, plan};
pub use ranges::{Ranges, Span};
pub use remake::{execute_program, obstacle, same_program};
pub use room::check_room;
pub use segments::{Asked, Created, Segments};
pub use shadow::Shadow;
pub use shared::{SharedContent, SharedImage, SharedObject};
pub use source::{Pages, Source, Stored};
pub use space::{Copied, Space};
pub use verify::verify;

use crate::freeze;
use crate::outcome::Refusal;
use crate::record;

/// Bytes of a page on x86-64.
pub const PAGE: u64 = 4096;

/// The end of user addresses on x86-64 with four-level page tables, and of what programs get without asking for more.
pub(crate) const USER_END: u64 = 0x7fff_ffff_f000;

/// What can go wrong with an address space.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be done, and nothing was touched.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Stopping, injecting or a system call failed.
    #[error(transparent)]
    Freeze(#[from] freeze::Error),
    /// The context could not be written or read.
    #[error(transparent)]
    Record(#[from] record::Error),
}

impl Error {
    /// The refusal in it, if it is one.
    pub fn into_refusal(self) -> std::result::Result<Refusal, Self> {
        match self {
            Self::Refused(refusal) | Self::Freeze(freeze::Error::Refused(refusal)) => Ok(refusal),
            other => Err(other),
        }
    }
}

/// Result of this room.
pub type Result<T> = std::result::Result<T, Error>;
