//! Checkpoints on disk: written out while the tree runs on, and read back.
//!
//! An image is a directory of two files. `checkpoint.img` is what the checkpoint's context writes out. `memory.img` has the
//! same framing and holds what the context does not: contents of pages, and what else of an address space only its shadow
//! tells. `docs/image-format.md` has the bytes.
//!
//! Writing takes [`Parts`] from the thread that owns the checkpoint and needs it no more after that: shadows and contexts are
//! read from another thread, while that one goes on to roll back.

mod behind;
mod contents;
mod error;
mod fuzzing;
mod inspect;
mod layout;
mod on_disk;
mod open;
mod pages;
mod parts;
mod persist;
mod reading;
mod space;
mod staging;
mod view;
mod write;

#[cfg(test)]
mod damage_tests;
#[cfg(test)]
mod properties;

pub use error::{Error, Result};
pub use fuzzing::fuzz_one;
pub use inspect::{AreaView, FileView, Inspection, KindView, Made};
pub use layout::{Encoding, Info, MOST_PAGES, MappedFile, NamelessFile, PagesHeader, Program, Run};
pub use on_disk::{Durability, OnDisk, Persisting};
pub use open::Opened;
pub use parts::Parts;
pub use persist::{Options, Progress, Summary, Why, in_ram, persist};
pub use reading::StoredPages;
pub use space::StoredSpace;
pub use view::{DescriptorView, ProcessView, SpaceView, VmaView};

/// The file of an image that is what the context writes out.
pub const CONTEXT_FILE: &str = "checkpoint.img";

/// The file of an image that holds memory.
pub const MEMORY_FILE: &str = "memory.img";

/// A file that callers of runc, podman among them, look for before they restore. Nothing is in it.
pub const MARK_FILE: &str = "inventory.img";
