//! Walks a live area.
//!
//! Of an overlay the upper directory is walked, and each of its names is looked at through the mount: whiteouts and opaque
//! directories are seen above, everything else below.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::cut::Same;
use super::index::Index;
use super::journal::{Directory, Journal, Seen};
use super::known::{Inodes, Trust};
use super::meta::{Meta, Stat, entries, open_directory, path_of, stat};
use super::mounted::Mounted;
use super::touched::Touched;
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
    /// The journal of inodes tells of changes.
    Inodes {
        /// That.
        touched: &'a mut Touched,
        /// The device it tells of.
        device: u64,
        /// As for [`Self::Running`].
        running: bool,
    },
    /// It runs, and nothing is kept of what is found.
    Glance,
    /// Nobody does.
    Not,
}

impl Watched<'_> {
    fn watch(&mut self, directory: BorrowedFd<'_>, key: Directory, trust: Trust) {
        match self {
            Self::Stopped(journal, _) | Self::Running(journal) => {
                journal.watch(directory, key, trust != Trust::All);
            }
            Self::Inodes { .. } | Self::Glance | Self::Not => {}
        }
    }

    /// Whether nothing has happened to what is at a name since it was read last.
    fn is_unchanged(&self, directory: Directory, name: &OsStr, inode: u64) -> bool {
        match self {
            Self::Stopped(_, seen) => seen.is_unchanged(directory, name),
            // What is known is compared again when the tree has stopped.
            Self::Running(_) | Self::Glance => true,
            Self::Inodes {
                touched, device, ..
            } => !touched.is_pending(*device, inode),
            Self::Not => false,
        }
    }

    fn looked_at(&mut self, inode: u64) {
        if let Self::Inodes {
            touched, device, ..
        } = self
        {
            touched.looked_at(*device, inode);
        }
    }

    fn again(&mut self, inode: u64) {
        if let Self::Inodes {
            touched, device, ..
        } = self
        {
            touched.again(*device, inode);
        }
    }

    fn runs(&self) -> bool {
        matches!(
            self,
            Self::Running(_) | Self::Inodes { running: true, .. } | Self::Glance
        )
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

/// The same, but looks only at inodes with numbers that are `among`; others are as they were recorded.
pub fn walk_among(
    mounted: &Mounted,
    known: &Inodes,
    watched: Watched<'_>,
    unknown: Unknown<'_>,
    (recorded, index): (&Tree, &Index),
    among: &HashSet<u64>,
) -> Result<(Tree, Tree)> {
    let same = Some(Same::but(recorded, index, among));
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
    walker.watched.looked_at(node.meta.stat.ino);
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
        for name in self.names((id, was), own)? {
            let done = self.name((id, was), directory, upper, key, name);
            match done {
                Err(Error::File { error, .. }) if self.watched.runs() => {
                    tracing::debug!(%error, "passed over");
                    self.watched.again(key.1);
                }
                done => done?,
            }
        }
        Ok(())
    }

    /// The names in a directory that have to be looked at.
    fn names(&mut self, (id, was): Both, own: BorrowedFd<'_>) -> Result<Vec<OsString>> {
        let failed = self.failed(OsStr::new(""));
        let (Some(was), Some(same)) = (was, &mut self.same) else {
            let all = entries(own).map_err(failed)?.into_iter();
            return Ok(all.map(|entry| entry.name).collect());
        };
        if let Some(names) = same.names(was) {
            self.tree.nodes[id].merged = same.merged(was).cloned();
            return Ok(names);
        }
        let mut all = entries(own).map_err(failed)?;
        all.retain(|entry| !same.passes_over(was, entry));
        Ok(all.into_iter().map(|entry| entry.name).collect())
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
        let unchanged = self.watched.is_unchanged(key, &name, own.ino);
        self.watched.looked_at(own.ino);
        if let (Some(was), Some(same)) = (was, &mut self.same)
            && same.leaves_out(was, &name, self.known, &own, unchanged)
        {
            return Ok(());
        }
        let found = match upper {
            Some(_) => {
                let found = stat(directory, &name).map_err(self.failed(&name))?;
                found.in_upper(&own)
            }
            None => own,
        };
        let depth = self.path.components().count();
        let done = self.entry((id, was), directory, upper, unchanged, name, found);
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
        unchanged: bool,
        name: OsString,
        found: Stat,
    ) -> Result<()> {
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
