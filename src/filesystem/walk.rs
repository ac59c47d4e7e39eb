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

use super::cut::Same;
use super::journal::{Directory, Journal, Seen};
use super::known::{Inodes, Trust};
use super::meta::{Meta, Stat, names, open_directory, path_of, stat};
use super::mounted::Mounted;
use super::tree::{Content, Merged, Node, NodeId, ROOT, Tree};
use super::{Error, Result};
use crate::outcome::Refusal;

/// Reads what is known of an inode, and if it is not known looks.
fn look(
    known: &Inodes,
    directory: BorrowedFd<'_>,
    name: &OsStr,
    stat: Stat,
    unchanged: bool,
) -> io::Result<(Arc<Meta>, Content)> {
    match known.find(&stat, unchanged) {
        (Some(meta), content) => Ok((meta, content)),
        (None, content) => Ok((Arc::new(Meta::read(directory, name, stat)?), content)),
    }
}

/// Makes a node of what is at a name in a directory. `unchanged` as for [`Inodes::find`].
pub fn node(
    known: &Inodes,
    directory: BorrowedFd<'_>,
    name: &OsStr,
    stat: Stat,
    unchanged: bool,
) -> io::Result<Node> {
    let (meta, content) = look(known, directory, name, stat, unchanged)?;
    Ok(Node {
        meta,
        content,
        entries: Default::default(),
        merged: None,
        of_lower: false,
    })
}

/// Who watches the directories, and what has changed in them; how a tree is walked.
#[derive(Debug)]
pub enum Watched<'a> {
    /// It is stopped.
    Stopped(&'a mut Journal, &'a Seen),
    /// It runs: what can't be looked at is passed over.
    Running(&'a mut Journal),
    /// Nobody does.
    Not,
}

impl Watched<'_> {
    fn watch(&mut self, directory: BorrowedFd<'_>, key: Directory, trust: Trust) {
        match self {
            Self::Stopped(journal, _) | Self::Running(journal) => {
                journal.watch(directory, key, trust != Trust::All);
            }
            Self::Not => {}
        }
    }

    fn is_unchanged(&self, directory: Directory, name: &OsStr) -> bool {
        match self {
            Self::Stopped(_, seen) => seen.is_unchanged(directory, name),
            // What is known is compared again when the tree has stopped.
            Self::Running(_) => true,
            Self::Not => false,
        }
    }
}

/// What is done with a regular file whose content is not known.
pub type Unknown<'a> = &'a mut dyn FnMut(At<'_>, &mut Node) -> io::Result<()>;

/// Where a name is.
#[derive(Debug, Clone, Copy)]
pub struct At<'a> {
    /// The directory, through the mount.
    pub directory: BorrowedFd<'a>,
    /// The directory in the upper layer.
    pub upper: Option<BorrowedFd<'a>>,
    /// The name.
    pub name: &'a OsStr,
}

/// Walks all of an area.
pub fn walk(
    mounted: &Mounted,
    known: &Inodes,
    watched: Watched<'_>,
    unknown: Unknown<'_>,
) -> Result<Tree> {
    Ok(walk_but(mounted, known, watched, unknown, None)?.0)
}

/// The same, but leaves out what is as it was recorded: returns both trees without that, the recorded one first.
pub fn walk_changed(
    mounted: &Mounted,
    known: &Inodes,
    watched: Watched<'_>,
    unknown: Unknown<'_>,
    recorded: &Tree,
) -> Result<(Tree, Tree)> {
    let same = Some(Same::new(recorded));
    let (live, same) = walk_but(mounted, known, watched, unknown, same)?;
    let others = same.map(|same| same.others()).unwrap_or_default();
    Ok((others, live))
}

fn walk_but<'a>(
    mounted: &'a Mounted,
    known: &'a Inodes,
    watched: Watched<'a>,
    unknown: Unknown<'a>,
    same: Option<Same<'a>>,
) -> Result<(Tree, Option<Same<'a>>)> {
    let was = same.is_some().then_some(ROOT);
    let mut walker = Walker {
        mounted,
        known,
        watched,
        unknown,
        same,
        tree: Tree::default(),
        linked: HashMap::new(),
        path: PathBuf::new(),
    };
    let root = mounted.root.as_fd();
    let failed = |error| mounted.error("look at", Path::new(""))(error);
    let found = mounted.stat(Path::new("")).map_err(failed)?;
    let mut node = node(known, root, OsStr::new(""), found, false).map_err(failed)?;
    node.merged = mounted.upper.as_ref().map(|_| Merged::default());
    walker.tree.nodes.push(node);
    let upper = mounted.upper.as_ref().map(|upper| upper.as_fd());
    walker.directory((ROOT, was), root, upper)?;
    Ok((walker.tree, walker.same))
}

struct Walker<'a> {
    mounted: &'a Mounted,
    known: &'a Inodes,
    watched: Watched<'a>,
    unknown: Unknown<'a>,
    /// What of a recorded tree was found to be as it was.
    same: Option<Same<'a>>,
    tree: Tree,
    /// Nodes of inodes that have more than one name.
    linked: HashMap<u64, NodeId>,
    path: PathBuf,
}

/// A directory of the live tree, and the recorded one that it is.
type Both = (NodeId, Option<NodeId>);

impl Walker<'_> {
    fn failed(&self, name: &OsStr) -> impl FnOnce(io::Error) -> Error + use<> {
        self.mounted.error("look at", &self.path.join(name))
    }

    fn directory(
        &mut self,
        (id, was): Both,
        directory: BorrowedFd<'_>,
        upper: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let here = OsStr::new("");
        let own = upper.unwrap_or(directory);
        let found = stat(own, here).map_err(self.failed(here))?;
        let key = (found.device, found.ino);
        // Before it is listed, so that nothing can happen in between.
        self.watched.watch(own, key, self.known.trust());
        for name in names(own).map_err(self.failed(here))? {
            let done = self.name((id, was), directory, upper, key, name);
            match (&self.watched, done) {
                (Watched::Running(_), Err(Error::File { error, .. })) => {
                    tracing::debug!(%error, "passed over");
                }
                (_, done) => done?,
            }
        }
        Ok(())
    }

    fn name(
        &mut self,
        (id, was): Both,
        directory: BorrowedFd<'_>,
        upper: Option<BorrowedFd<'_>>,
        key: Directory,
        name: OsString,
    ) -> Result<()> {
        let own = stat(upper.unwrap_or(directory), &name).map_err(self.failed(&name))?;
        if upper.is_some() && is_whiteout(&own) {
            if let Some(merged) = &mut self.tree.nodes[id].merged {
                merged.whiteouts.insert(name);
            }
            return Ok(());
        }
        if let (Some(was), Some(same)) = (was, &mut self.same) {
            let unchanged = self.watched.is_unchanged(key, &name);
            if same.leaves_out(was, &name, self.known, &own, unchanged) {
                return Ok(());
            }
        }
        let found = match upper {
            Some(_) => {
                let found = stat(directory, &name).map_err(self.failed(&name))?;
                found.in_upper(&own)
            }
            None => own,
        };
        let depth = self.path.components().count();
        let done = self.entry((id, was), directory, upper, key, name, found);
        if done.is_err() {
            self.path = self.path.components().take(depth).collect();
        }
        done
    }

    fn entry(
        &mut self,
        (parent, was): Both,
        directory: BorrowedFd<'_>,
        upper: Option<BorrowedFd<'_>>,
        key: Directory,
        name: OsString,
        found: Stat,
    ) -> Result<()> {
        let unchanged = self.watched.is_unchanged(key, &name);
        let (ino, links, is_directory) = (found.ino, found.links, found.is_directory());
        if links > 1
            && !is_directory
            && let Some(&id) = self.linked.get(&ino)
        {
            let node = &mut self.tree.nodes[id];
            if !unchanged && node.meta.stat.is_file() {
                // It may have been changed by this name.
                let (_, content) = self.known.find(&found, false);
                node.content = content;
                if matches!(node.content, Content::Unknown) {
                    let name = &name;
                    let at = At {
                        directory,
                        upper,
                        name,
                    };
                    let done = (self.unknown)(at, node);
                    done.map_err(self.mounted.error("look at", &self.path.join(name)))?;
                }
            }
            self.tree.nodes[parent].entries.insert(name, id);
            return Ok(());
        }
        let node = node(self.known, directory, &name, found, unchanged);
        let mut node = node.map_err(self.failed(&name))?;
        if node.meta.stat.is_file() && matches!(node.content, Content::Unknown) {
            let at = At {
                directory,
                upper,
                name: &name,
            };
            (self.unknown)(at, &mut node).map_err(self.failed(&name))?;
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
            let was = match (was, &mut self.same) {
                (Some(was), Some(same)) => {
                    let node = &self.tree.nodes[id];
                    same.directory(was, &name, &node.meta.stat, node.merged.as_ref())
                }
                _ => None,
            };
            self.path.push(&name);
            let above = above.as_ref().map(|above| above.as_fd());
            self.directory((id, was), below.as_fd(), above)?;
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
