//! The payloads of what an image holds besides the context.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::record::ObjectId;

/// The most pages that one record holds.
pub const MOST_PAGES: u32 = 256;

/// What precedes the contents in the payload of a `Pages` record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct PagesHeader {
    /// [`Encoding`] as its number.
    pub encoding: u32,
    /// How many pages, of 4096 bytes each.
    pub pages: u32,
}

/// How contents of pages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u32)]
pub enum Encoding {
    /// As they are.
    #[default]
    Plain = 0,
    /// As one Zstandard frame (RFC 8878).
    Zstd = 1,
}

impl Encoding {
    /// The encoding of this number.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::Plain),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// Where the contents of neighbouring pages are: an entry of a `PageIndex` record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Run {
    /// Address of the first page; of a file its offset.
    pub address: u64,
    /// Sequence number of the `Pages` record, which may be another object's: identical pages are written once.
    pub record: u64,
    /// Number of the first page among those of the record.
    pub first: u32,
    /// How many.
    pub pages: u32,
}

/// Payload of a `Program` record, in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Where the program is, as the link `exe` in `/proc` tells it.
    pub path: PathBuf,
    /// Device and inode of it, as stat(2) tells them.
    pub device: u64,
    /// See `device`.
    pub inode: u64,
    /// The files behind the mappings.
    pub files: Vec<MappedFile>,
}

/// A file that was mapped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedFile {
    /// Device and inode, as the VMA list tells them.
    pub device: u64,
    /// See `device`.
    pub inode: u64,
    /// Its path, as the VMA list tells it, without the mark of what is deleted.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// When its content was last changed, in nanoseconds since 1970.
    pub modified_ns: i64,
    /// It has no name: a `NamelessFile` record of the same device and inode has its content, or it is shared memory.
    pub nameless: bool,
}

/// Payload of a `NamelessFile` record, in JSON. Its content are pages of the same object, by offset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamelessFile {
    /// Device and inode: of an open file as stat(2) tells them, of one that was only mapped as the VMA list does.
    pub device: u64,
    /// See `device`.
    pub inode: u64,
    /// The path it had.
    pub path: PathBuf,
    /// The open file descriptions of it, as the context numbers them.
    pub descriptions: Vec<ObjectId>,
    /// Type and permissions (`st_mode`).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// When its content was last changed, in nanoseconds since 1970.
    pub modified_ns: i64,
    /// Whether the content is that of the time of the checkpoint; else it is of when the image was written.
    pub of_checkpoint: bool,
}

/// Payload of a `Checkpoint` record, in JSON: the last but the trailer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Name of the checkpoint.
    pub name: String,
    /// When the tree was stopped for it, in nanoseconds since 1970.
    pub taken_ns: u64,
    /// Number of processes.
    pub processes: usize,
    /// Number of threads.
    pub threads: usize,
    /// Pages that were populated.
    pub resident_pages: u64,
    /// How many `Pages` records precede this one.
    pub page_records: u64,
    /// How many nameless files.
    pub nameless_files: u64,
    /// Mount points of the areas of files that are included.
    pub files: Vec<PathBuf>,
    /// Mount points of what is not included, and why.
    pub left_out: Vec<(PathBuf, String)>,
}
