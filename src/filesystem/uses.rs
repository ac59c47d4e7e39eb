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
    /// How it is used.
    pub how: How,
}

/// How a file is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// By a descriptor that can be opened again.
    Open,
    /// By a mapping, through which stores reach the file.
    Mapped,
    /// In a way that ties to the inode: a FIFO's end, a directory to live in.
    Tied,
}
