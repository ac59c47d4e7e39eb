//! What of the files a tree of processes has open or mapped.

use std::path::PathBuf;

/// A file that is open or mapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// Device of the inode, as stat(2) tells it.
    pub device: u64,
    /// Its number.
    pub ino: u64,
    /// A link in `/proc` that leads to it.
    pub link: PathBuf,
    /// As `fd 7` or `its mapping of /a/b`.
    pub what: String,
    /// As `pid 12 (redis-server)`.
    pub holder: String,
    /// It is mapped, and stores to the mapping reach the file.
    pub mapped: bool,
}
