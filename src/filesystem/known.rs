//! What is known of live inodes, so that what has not changed need not be read again.
//!
//! The kernel sets an inode's time of change (`ctime`) with everything it does to it, and nobody else can. So one that has the
//! time it had when it was read last is as it was, with these exceptions: stores to a page that was mapped shared and written
//! to before; all stores to mappings, on file systems that do not look at them (tmpfs); a write that was going on while it was
//! read; changes within one tick of the clock, before Linux 6.13, and on file systems that still work so. The journal tells of
//! all of them, unless a file stays mapped or open: such a one is *exposed*, and compared.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use super::meta::{Meta, Stat, Time};
use super::tree::{Content, Node};

/// An inode that was read.
#[derive(Debug, Clone)]
struct Known {
    meta: Arc<Meta>,
    content: Content,
    read: Read,
}

/// How an inode was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// The tree was stopped.
    Stopped,
    /// It ran: a write might have been half done, of which the journal tells afterwards.
    Running,
    /// It was mapped, or open where times tell nothing of stores to mappings: it may change unseen.
    Exposed,
}

/// The inodes of one area.
#[derive(Debug, Default)]
pub struct Inodes {
    known: HashMap<u64, Known>,
    /// Those of them that may change unseen.
    exposed: HashSet<u64>,
    trust: Trust,
}

/// What times prove on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Trust {
    /// Nothing: content is compared.
    #[default]
    Nothing,
    /// Everything but content: stores to shared mappings change no times (tmpfs).
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
            exposed: HashSet::new(),
            trust,
        }
    }

    /// What is known of an inode that looks so: all but content, and content. `unchanged`: the journal says that nothing has
    /// happened to it.
    pub fn find(&self, stat: &Stat, unchanged: bool) -> (Option<Arc<Meta>>, Content) {
        let looks_the_same = |known: &&Known| {
            let of = |stat: &Stat| -> (Time, Time, u64, u32, u32) {
                (stat.ctime, stat.mtime, stat.size, stat.mode, stat.links)
            };
            self.trust != Trust::Nothing && of(&known.meta.stat) == of(stat)
        };
        let Some(known) = self.known.get(&stat.ino).filter(looks_the_same) else {
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
        let proven = match (self.trust, known.read) {
            (Trust::All, Read::Stopped) => true,
            (Trust::All | Trust::Metadata, Read::Stopped | Read::Running) => unchanged,
            _ => false,
        };
        let content = match proven {
            true => known.content.clone(),
            false => Content::Unknown,
        };
        (Some(meta), content)
    }

    /// Whether an inode that looks so is known to be what was recorded. `unchanged` as for [`Self::find`].
    pub fn is_as(&self, stat: &Stat, unchanged: bool, recorded: &Node) -> bool {
        let (Some(meta), content) = self.find(stat, unchanged) else {
            return false;
        };
        let was = &recorded.meta;
        meta.is_same_sort(was)
            && meta.has_same_rights(was)
            && meta.stat.mtime == was.stat.mtime
            && (!stat.is_file() || content == recorded.content)
    }

    /// What the content was when it was read last, though it may not be any more.
    pub fn last(&self, ino: u64) -> Content {
        self.known
            .get(&ino)
            .map_or(Content::Unknown, |known| known.content.clone())
    }

    /// Learns of an inode.
    pub fn learn(&mut self, meta: Arc<Meta>, content: Content, read: Read) {
        let known = Known {
            meta,
            content,
            read,
        };
        let number = known.meta.stat.ino;
        match read {
            Read::Exposed => self.exposed.insert(number),
            Read::Stopped | Read::Running => self.exposed.remove(&number),
        };
        self.known.insert(number, known);
    }

    /// Inodes that may change unseen.
    pub fn exposed(&self) -> &HashSet<u64> {
        &self.exposed
    }

    /// How many are known, some of which may have ended.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Forgets all but these.
    pub fn keep_only(&mut self, numbers: &HashSet<u64>) {
        self.known.retain(|number, _| numbers.contains(number));
        self.exposed.retain(|number| numbers.contains(number));
    }

    /// Forgets content that nothing else refers to, so that its space is free.
    pub fn forget_unused(&mut self) {
        // An inode that was made again has the content of the one that was deleted, which may be known still.
        let mut ours: HashMap<_, usize> = HashMap::new();
        for known in self.known.values() {
            if let Content::Kept(kept) = &known.content {
                *ours.entry(Arc::as_ptr(kept)).or_default() += 1;
            }
        }
        for known in self.known.values_mut() {
            if let Content::Kept(kept) = &known.content
                && let Some(count) = ours.get_mut(&Arc::as_ptr(kept))
                && Arc::strong_count(kept) == *count
            {
                *count -= 1;
                known.content = Content::Unknown;
            }
        }
    }

    /// Notes that an inode may change unseen.
    pub fn expose(&mut self, ino: u64) {
        if let Some(known) = self.known.get_mut(&ino) {
            known.read = Read::Exposed;
            self.exposed.insert(ino);
        }
    }

    /// The journal has lost something: what it would have vouched for may have changed unseen.
    pub fn doubt(&mut self) {
        for (number, known) in &mut self.known {
            if known.read == Read::Running {
                known.read = Read::Exposed;
                self.exposed.insert(*number);
            }
        }
    }

    /// What times prove here.
    pub fn trust(&self) -> Trust {
        self.trust
    }
}
