//! What of a tree's mounts goes back with it.

use std::path::PathBuf;

use nix::unistd::Pid;
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use crate::kernel::mountinfo::{self, Mount};

/// One mounted file system of the tree whose files go back with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Area {
    /// What it is.
    pub kind: Kind,
    /// Where it is mounted, as the root of the tree sees it; absolute.
    pub mount_point: PathBuf,
    /// The first field of its line in `mountinfo`.
    pub mount_id: u64,
    /// The third: device of its superblock, as `makedev` has it.
    pub device: u64,
    /// The type of the file system, as `mountinfo` names it.
    pub file_system: String,
    /// Mounted read-only, or its superblock is: nothing of it is recorded.
    pub read_only: bool,
}

impl Area {
    /// The device of the superblock of the file system that has its files, if it can be told.
    pub fn superblock(&self) -> Option<u64> {
        let Kind::Overlay { upper, .. } = &self.kind else {
            return Some(self.device);
        };
        let found = statx(CWD, upper, AtFlags::empty(), StatxFlags::MNT_ID).ok()?;
        let ours = mountinfo::read(Pid::this()).ok()?.into_iter();
        let is_it = |mount: &Mount| mount.id == found.stx_mnt_id;
        ours.filter(is_it).map(|mount| mount.device).next()
    }
}

/// What an area is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// An overlay: what lies in its upper directory is recorded. Paths are as the keeper sees them.
    Overlay {
        /// The upper directory.
        upper: PathBuf,
        /// The lower directories, the uppermost first.
        lowers: Vec<PathBuf>,
    },
    /// A tmpfs: all of it is recorded.
    Tmpfs,
    /// A directory of another file system that is mounted in the tree: all of it is recorded.
    Volume {
        /// The directory, as the keeper sees it.
        source: PathBuf,
    },
}

/// A mount whose files do not go back, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// Where it is mounted, as the root of the tree sees it.
    pub mount_point: PathBuf,
    /// Why, as the report says it.
    pub why: String,
}

/// What was found to belong to a tree.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Found {
    /// What goes back.
    pub areas: Vec<Area>,
    /// What does not.
    pub left_out: Vec<LeftOut>,
}

/// Which files are to go back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Whether any are: `false` is `--no-files`.
    pub include: bool,
    /// Bind mounts to be included, by their mount points as the tree sees them.
    pub volumes: Vec<PathBuf>,
    /// The most bytes of content to be kept by all checkpoints of a keeper.
    pub max_bytes: Option<u64>,
    /// Where content is kept that the file system of the files can't keep by reflink; made if it is not there.
    pub store: PathBuf,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            include: true,
            volumes: Vec::new(),
            max_bytes: None,
            store: std::env::temp_dir(),
        }
    }
}
