//! Walks a live area.
//!
//! Of an overlay the upper directory is walked, and each of its names is looked at through the mount: whiteouts and opaque
//! directories are seen above, everything else below.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::known::Inodes;
use super::meta::{Meta, Stat, names, open_directory, path_of, stat};
use super::mounted::Mounted;
use super::tree::{Content, Merged, Node, NodeId, Tree};
use super::{Error, Result};
use crate::outcome::Refusal;

/// Reads what is known of an inode, and if it is not known looks.
fn look(
    known: &Inodes,
    directory: BorrowedFd<'_>,
    name: &OsStr,
    stat: Stat,
) -> io::Result<(Arc<Meta>, Content)> {
    match known.find(&stat) {
        (Some(meta), content) => Ok((meta, content)),
        (None, content) => Ok((Arc::new(Meta::read(directory, name, stat)?), content)),
    }
}

/// Makes a node of what is at a name in a directory.
pub fn node(
    known: &Inodes,
    directory: BorrowedFd<'_>,
    name: &OsStr,
    stat: Stat,
) -> io::Result<Node> {
    let (meta, content) = look(known, directory, name, stat)?;
    Ok(Node {
        meta,
        content,
        entries: Default::default(),
        merged: None,
        of_lower: false,
    })
}

/// What is done with a regular file whose content is not known: its directory and name are given.
pub type Unknown<'a> = &'a mut dyn FnMut(BorrowedFd<'_>, &OsStr, &mut Node) -> io::Result<()>;

/// Walks all of an area.
pub fn walk(mounted: &Mounted, known: &Inodes, unknown: Unknown<'_>) -> Result<Tree> {
    let mut walker = Walker {
        mounted,
        known,
        unknown,
        tree: Tree::default(),
        linked: HashMap::new(),
        path: PathBuf::new(),
    };
    let root = mounted.root.as_fd();
    let failed = |error| mounted.error("look at", Path::new(""))(error);
    let found = stat(root, OsStr::new("")).map_err(failed)?;
    let mut node = node(known, root, OsStr::new(""), found).map_err(failed)?;
    node.merged = mounted.upper.as_ref().map(|_| Merged::default());
    walker.tree.nodes.push(node);
    let upper = mounted.upper.as_ref().map(|upper| upper.as_fd());
    walker.directory(super::tree::ROOT, root, upper)?;
    Ok(walker.tree)
}

struct Walker<'a> {
    mounted: &'a Mounted,
    known: &'a Inodes,
    unknown: Unknown<'a>,
    tree: Tree,
    /// Nodes of inodes that have more than one name.
    linked: HashMap<u64, NodeId>,
    path: PathBuf,
}

impl Walker<'_> {
    fn failed(&self, name: &OsStr) -> impl FnOnce(io::Error) -> Error + use<> {
        self.mounted.error("look at", &self.path.join(name))
    }

    fn directory(
        &mut self,
        id: NodeId,
        directory: BorrowedFd<'_>,
        upper: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let here = OsStr::new("");
        for name in names(upper.unwrap_or(directory)).map_err(self.failed(here))? {
            if let Some(upper) = upper
                && is_whiteout(&stat(upper, &name).map_err(self.failed(&name))?)
            {
                if let Some(merged) = &mut self.tree.nodes[id].merged {
                    merged.whiteouts.insert(name);
                }
                continue;
            }
            self.entry(id, directory, upper, name)?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        parent: NodeId,
        directory: BorrowedFd<'_>,
        upper: Option<BorrowedFd<'_>>,
        name: OsString,
    ) -> Result<()> {
        let found = stat(directory, &name).map_err(self.failed(&name))?;
        let (ino, links, is_directory) = (found.ino, found.links, found.is_directory());
        if links > 1
            && !is_directory
            && let Some(&id) = self.linked.get(&ino)
        {
            self.tree.nodes[parent].entries.insert(name, id);
            return Ok(());
        }
        let mut node = node(self.known, directory, &name, found).map_err(self.failed(&name))?;
        if node.meta.stat.is_file() && matches!(node.content, Content::Unknown) {
            (self.unknown)(directory, &name, &mut node).map_err(self.failed(&name))?;
        }
        let id = self.tree.nodes.len();
        self.tree.nodes.push(node);
        if links > 1 && !is_directory {
            self.linked.insert(ino, id);
        }
        if is_directory {
            let below = open_directory(directory, &name).map_err(self.failed(&name))?;
            let above = match upper {
                None => None,
                Some(upper) => Some(open_directory(upper, &name).map_err(self.failed(&name))?),
            };
            if let Some(upper) = upper
                && self.tree.nodes[parent].merged.is_some()
            {
                let is_merged = self.shows_lower(upper, &name)?;
                self.tree.nodes[id].merged = is_merged.then(Merged::default);
            }
            self.path.push(&name);
            let above = above.as_ref().map(|above| above.as_fd());
            self.directory(id, below.as_fd(), above)?;
            self.path.pop();
        }
        self.tree.nodes[parent].entries.insert(name, id);
        Ok(())
    }

    /// Whether a directory of the upper layer may show names of lower ones.
    fn shows_lower(&self, upper: BorrowedFd<'_>, name: &OsStr) -> Result<bool> {
        let path = path_of(upper, name);
        let attribute = |attribute: &str| -> Result<Vec<u8>> {
            let mut value = vec![0; 256];
            match rustix::fs::lgetxattr(&path, attribute, &mut value[..]) {
                Ok(length) => Ok(value[..length].to_vec()),
                Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => Ok(Vec::new()),
                Err(errno) => Err(self.failed(name)(errno.into())),
            }
        };
        if !attribute("trusted.overlay.redirect")?.is_empty() {
            let path = self.mounted.path(&self.path.join(name));
            return Err(Error::Refused(Refusal {
                object: format!("the directory {}", path.display()),
                holder: format!("the overlay at {}", self.mounted.mount_point.display()),
                remedy: "directories of lower layers that were renamed (redirect_dir) can't go back; mount it with redirect_dir=off, or take the checkpoint with --no-files".into(),
            }));
        }
        Ok(attribute("trusted.overlay.opaque")? != b"y")
    }
}

/// Whether what is in an upper directory says that a name is deleted.
fn is_whiteout(stat: &Stat) -> bool {
    stat.file_type() == libc::S_IFCHR && stat.rdev == 0
}
