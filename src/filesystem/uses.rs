//! What of the files a tree of processes has open or mapped.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::PathBuf;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::area::Area;
use super::known::Trust;
use super::tree::Node;

/// A file that is open or mapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// Device of the inode, as stat(2) tells it.
    pub device: u64,
    /// Its number.
    pub ino: u64,
    /// The mount it is reached by.
    pub mount_id: u64,
    /// Names it has.
    pub links: u32,
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

impl Use {
    /// One of what a link in `/proc` leads to.
    ///
    /// # Errors
    ///
    /// It leads to nothing that can be looked at.
    pub fn look(link: PathBuf, what: String, holder: String, how: How) -> io::Result<Self> {
        let mask = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let found = statx(CWD, &link, AtFlags::empty(), mask)?;
        let (major, minor) = (found.stx_dev_major, found.stx_dev_minor);
        Ok(Self {
            device: nix::sys::stat::makedev(u64::from(major), u64::from(minor)),
            ino: found.stx_ino,
            mount_id: found.stx_mnt_id,
            links: found.stx_nlink,
            link,
            what,
            holder,
            how,
        })
    }

    /// Whether it is of a file of an area.
    pub fn is_in(&self, area: &Area) -> bool {
        self.mount_id == area.mount_id || self.device == area.device
    }

    /// Whether it is of a node of an area.
    pub fn is_of(&self, area: &Area, node: &Node) -> bool {
        let (device, ino) = node.meta.stat.shown;
        // The lower layers' own devices are not what the mount shows.
        self.is_in(area) && self.ino == ino && (node.of_lower || self.device == device)
    }
}

/// Inodes that may change without a trace, because of how they are used; `find` gives nodes that are shown to have a number.
pub fn exposed<'a, N: IntoIterator<Item = &'a Node>>(
    uses: &[Use],
    area: &Area,
    trust: Trust,
    find: impl Fn(u64) -> N,
) -> HashSet<u64> {
    let is_exposing = |using: &&Use| using.how == How::Mapped || trust != Trust::All;
    let mut exposed = HashSet::new();
    for using in uses.iter().filter(is_exposing) {
        let nodes = find(using.ino).into_iter();
        let nodes = nodes.filter(|node| using.is_of(area, node));
        exposed.extend(nodes.map(|node| node.meta.stat.ino));
    }
    exposed
}

/// Nodes that are shown to have each number.
pub fn shown<'a>(nodes: impl IntoIterator<Item = &'a Node>) -> HashMap<u64, Vec<&'a Node>> {
    let mut shown: HashMap<u64, Vec<&Node>> = HashMap::new();
    for node in nodes {
        shown.entry(node.meta.stat.shown.1).or_default().push(node);
    }
    shown
}
