//! What a checkpoint holds of files.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use super::area::{Area, LeftOut};
use super::content::{Source, put_back};
use super::execute::{set_rights, set_times};
use super::index::Index;
use super::meta::{Identity, Meta, Stat};
use super::store::Kept;
use super::tree::{Content, Tree};

/// The files of a checkpoint.
#[derive(Debug, Default)]
pub struct Image {
    /// Those of each area.
    pub areas: Vec<AreaImage>,
    /// What does not go back.
    pub left_out: Vec<LeftOut>,
}

/// The files of one area.
#[derive(Debug)]
pub struct AreaImage {
    /// Which it is.
    pub area: Area,
    /// All files; of an overlay those that are in the upper layer, and what is deleted there.
    pub tree: Tree,
    /// Files without a name that were open.
    pub nameless: Vec<Nameless>,
    /// When it was equal to the live files last, as [`super::touched::Touched`] counts. `None`: that tells nothing of it.
    pub moment: Option<u64>,
    /// Made when it is needed.
    index: OnceCell<Index>,
}

impl AreaImage {
    /// The files of an area.
    pub fn new(area: Area, tree: Tree, nameless: Vec<Nameless>) -> Self {
        Self {
            area,
            tree,
            nameless,
            moment: None,
            index: OnceCell::new(),
        }
    }

    /// What is where.
    pub fn index(&self) -> &Index {
        self.index.get_or_init(|| Index::of(&self.tree))
    }

    /// Learns what names inodes that were made again: before and now.
    pub fn renumber(&mut self, changed: &HashMap<Identity, Stat>) {
        if changed.is_empty() {
            return;
        }
        for node in &mut self.tree.nodes {
            if let Some(new) = changed.get(&node.meta.stat.identity()) {
                let mut meta = Meta::clone(&node.meta);
                meta.stat = meta.stat.named_as(new);
                node.meta = Arc::new(meta);
                self.index.take();
            }
        }
    }
}

/// A file without a name that somebody has open.
#[derive(Debug)]
pub struct Nameless {
    /// Keeps the inode: an `O_PATH` descriptor.
    pub pin: OwnedFd,
    /// What is known of it.
    pub meta: Arc<Meta>,
    /// What was in it.
    pub content: Arc<Kept>,
    /// As `fd 7 of pid 12 (redis-server)`.
    pub holder: String,
}

impl Nameless {
    /// A link that leads to it.
    pub fn link(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.pin.as_raw_fd()))
    }

    /// Puts it back; returns the bytes written.
    pub fn put_back(&self) -> io::Result<u64> {
        let live = OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.link())?;
        let bytes = put_back(&live, Source::Kept(&self.content))?;
        let (itself, none) = (self.pin.as_fd(), OsStr::new(""));
        set_rights(itself, none, &self.meta)?;
        set_times(itself, none, &self.meta)?;
        Ok(bytes)
    }
}

impl Image {
    /// Bytes of content that it refers to, with others or alone.
    pub fn bytes(&self) -> u64 {
        let contents = self.areas.iter().flat_map(|area| {
            let named = area.tree.nodes.iter();
            let named = named.filter_map(|node| match &node.content {
                Content::Kept(kept) => Some(kept.bytes()),
                _ => None,
            });
            named.chain(area.nameless.iter().map(|file| file.content.bytes()))
        });
        contents.sum()
    }

    /// Whether an inode had no name any more.
    pub fn has_nameless(&self, (device, ino): (u64, u64)) -> bool {
        let files = self.areas.iter().flat_map(|area| &area.nameless);
        let mut inodes = files.map(|file| file.meta.stat.shown);
        inodes.any(|inode| inode == (device, ino))
    }

    /// How many files and directories.
    pub fn files(&self) -> usize {
        let areas = self.areas.iter();
        areas
            .map(|area| area.tree.nodes.len() + area.nameless.len())
            .sum()
    }
}
