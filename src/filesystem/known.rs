//! What is known of live inodes, so that what has not changed need not be read again.
//!
//! The kernel sets an inode's time of change (`ctime`) with everything it does to it, and nobody else can. So one that has the
//! time it had when it was read last is as it was, with two exceptions: stores to a page that is mapped shared, and changes
//! within one tick of the clock, before Linux 6.13, and on file systems that still work so.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::meta::{Meta, Stat, Time};
use super::tree::Content;

/// An inode that was read.
#[derive(Debug, Clone)]
struct Known {
    meta: Arc<Meta>,
    content: Content,
    /// Its content may change without a change of times.
    mapped: bool,
}

/// The inodes of one area.
#[derive(Debug, Default)]
pub struct Inodes {
    known: HashMap<u64, Known>,
    trust: Trust,
}

/// What times prove on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Trust {
    /// Nothing: content is compared.
    #[default]
    Nothing,
    /// Everything but content: stores to shared mappings change no times (tmpfs, network file systems).
    Metadata,
    /// Everything, but for files that were mapped when they were read.
    All,
}

impl Trust {
    /// Of a file system, by its name in `mountinfo`, or of the one below an overlay.
    pub fn of(file_system: &str) -> Self {
        // Times that are read get a finer clock at the next change on these (`FS_MGTIME`), since 6.13.
        match file_system {
            _ if !fine_times() => Self::Nothing,
            "ext4" | "xfs" | "btrfs" => Self::All,
            "tmpfs" => Self::Metadata,
            _ => Self::Nothing,
        }
    }
}

impl Trust {
    /// Of the file system that a directory is on.
    pub fn of_path(directory: &Path) -> Self {
        let Ok(found) = rustix::fs::statfs(directory) else {
            return Self::Nothing;
        };
        Self::of(match found.f_type {
            libc::EXT4_SUPER_MAGIC => "ext4",
            libc::XFS_SUPER_MAGIC => "xfs",
            libc::BTRFS_SUPER_MAGIC => "btrfs",
            libc::TMPFS_MAGIC => "tmpfs",
            _ => "",
        })
    }
}

/// Whether a change always changes times that have been looked at (Linux 6.13).
fn fine_times() -> bool {
    static FINE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *FINE.get_or_init(|| {
        let release = nix::sys::utsname::uname().map(|name| name.release().to_owned());
        let release = release.unwrap_or_default();
        let mut numbers = release.to_str().unwrap_or_default().split(['.', '-']);
        let mut next = || numbers.next().and_then(|number| number.parse::<u32>().ok());
        (next(), next()) >= (Some(6), Some(13))
    })
}

impl Inodes {
    /// Nothing is known yet.
    pub fn new(trust: Trust) -> Self {
        Self {
            known: HashMap::new(),
            trust,
        }
    }

    /// What is known of an inode that looks so: all but content, and content.
    pub fn find(&self, stat: &Stat) -> (Option<Arc<Meta>>, Content) {
        let unchanged = |known: &&Known| {
            let of = |stat: &Stat| -> (Time, Time, u64, u32, u32) {
                (stat.ctime, stat.mtime, stat.size, stat.mode, stat.links)
            };
            self.trust != Trust::Nothing && of(&known.meta.stat) == of(stat)
        };
        let Some(known) = self.known.get(&stat.ino).filter(unchanged) else {
            return (None, Content::Unknown);
        };
        let meta = if known.meta.stat == *stat {
            Arc::clone(&known.meta)
        } else {
            Arc::new(Meta {
                stat: stat.clone(),
                ..Meta::clone(&known.meta)
            })
        };
        let content = match self.trust {
            Trust::All if !known.mapped => known.content.clone(),
            _ => Content::Unknown,
        };
        (Some(meta), content)
    }

    /// What the content was when it was read last, though it may not be any more.
    pub fn last(&self, ino: u64) -> Content {
        self.known
            .get(&ino)
            .map_or(Content::Unknown, |known| known.content.clone())
    }

    /// Learns of an inode. `mapped`: somebody has it mapped shared.
    pub fn learn(&mut self, meta: Arc<Meta>, content: Content, mapped: bool) {
        let known = Known {
            meta,
            content,
            mapped,
        };
        self.known.insert(known.meta.stat.ino, known);
    }

    /// Bytes of content that they refer to.
    #[cfg(test)]
    pub(super) fn kept_bytes(&self) -> u64 {
        let mut seen = std::collections::HashSet::new();
        let contents = self
            .known
            .values()
            .filter_map(|known| match &known.content {
                Content::Kept(kept) if seen.insert(Arc::as_ptr(kept)) => Some(kept.bytes()),
                _ => None,
            });
        contents.sum()
    }

    /// What times prove here.
    pub fn trust(&self) -> Trust {
        self.trust
    }
}
