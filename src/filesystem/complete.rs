//! Adds to a recorded and a live tree of an overlay what shows through from the lower layers, wherever one of the two says
//! something that the other does not: afterwards neither needs to be seen as an overlay.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use super::Result;
use super::known::Inodes;
use super::meta::{names, stat};
use super::mounted::{Mounted, descend};
use super::tree::{Content, Merged, Node, NodeId, ROOT, Tree};

/// Completes both trees. Does nothing if it is not an overlay.
pub fn complete(mounted: &Mounted, wanted: &mut Tree, live: &mut Tree) -> Result<()> {
    let Some(lower) = &mounted.lower else {
        return Ok(());
    };
    let mut layers = Layers {
        mounted,
        lower: lower.as_fd(),
        wanted,
        live,
    };
    layers.visit(Some(ROOT), Some(ROOT), Path::new(""))
}

struct Layers<'a> {
    mounted: &'a Mounted,
    lower: BorrowedFd<'a>,
    wanted: &'a mut Tree,
    live: &'a mut Tree,
}

impl Layers<'_> {
    fn visit(&mut self, wanted: Option<NodeId>, live: Option<NodeId>, path: &Path) -> Result<()> {
        let (was, is) = (merged(self.wanted, wanted), merged(self.live, live));
        if was.is_none() && is.is_none() {
            return Ok(());
        }
        let mut all = BTreeSet::new();
        for (tree, node) in [(&*self.wanted, wanted), (&*self.live, live)] {
            if let Some(node) = node.map(|node| &tree.nodes[node]) {
                all.extend(node.entries.keys().cloned());
                let hidden = node.merged.iter().flat_map(|merged| &merged.whiteouts);
                all.extend(hidden.cloned());
            }
        }
        if is.is_none() {
            all.extend(self.list(self.lower, path)?);
        }
        if was.is_none() {
            all.extend(self.list(self.mounted.root.as_fd(), path)?);
        }
        for name in all {
            let path = path.join(&name);
            let was = match (wanted, &was) {
                (Some(node), Some(merged)) => self.of_lower(node, merged, &name, &path)?,
                (Some(node), None) => self.wanted.at(node, &name),
                (None, _) => None,
            };
            let is = match (live, &is) {
                (Some(node), Some(merged)) => self.of_live(node, merged, &name, &path)?,
                (Some(node), None) => self.live.at(node, &name),
                (None, _) => None,
            };
            self.visit(was, is, &path)?;
        }
        Ok(())
    }

    /// The recorded node at a name, which may be the lower layers'.
    fn of_lower(
        &mut self,
        directory: NodeId,
        merged: &Merged,
        name: &OsStr,
        path: &Path,
    ) -> Result<Option<NodeId>> {
        let there = self.wanted.at(directory, name);
        if there.is_some() || merged.whiteouts.contains(name) {
            return Ok(there);
        }
        let node = self.find(self.lower, path)?;
        Ok(node.map(|node| insert(self.wanted, directory, name, node)))
    }

    /// The live node at a name, which may not be in the upper layer.
    fn of_live(
        &mut self,
        directory: NodeId,
        merged: &Merged,
        name: &OsStr,
        path: &Path,
    ) -> Result<Option<NodeId>> {
        let there = self.live.at(directory, name);
        if there.is_some() || merged.whiteouts.contains(name) {
            return Ok(there);
        }
        let node = self.find(self.mounted.root.as_fd(), path)?;
        Ok(node.map(|node| insert(self.live, directory, name, node)))
    }

    /// A node of what is at a path, whose content is that of the lower layers.
    fn find(&self, root: BorrowedFd<'_>, path: &Path) -> Result<Option<Node>> {
        let found = (|| {
            let (parent, name) = super::mounted::split(path);
            let directory = descend(root, parent)?;
            let found = stat(directory.as_fd(), name)?;
            super::walk::node(&Inodes::default(), directory.as_fd(), name, found, false)
        })();
        match found {
            Ok(mut node) => {
                node.of_lower = true;
                if node.meta.stat.is_file() {
                    node.content = Content::Lower(path.to_owned());
                }
                node.merged = node.meta.stat.is_directory().then(Merged::default);
                Ok(Some(node))
            }
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(self.mounted.error("look at", path)(error)),
        }
    }

    fn list(&self, root: BorrowedFd<'_>, path: &Path) -> Result<Vec<OsString>> {
        match descend(root, path).and_then(|directory| names(directory.as_fd())) {
            Ok(names) => Ok(names),
            Err(error) if is_absent(&error) => Ok(Vec::new()),
            Err(error) => Err(self.mounted.error("list", path)(error)),
        }
    }
}

fn is_absent(error: &io::Error) -> bool {
    // A link where a directory was asked for is ENOTDIR with O_DIRECTORY, or ELOOP.
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)
    )
}

fn merged(tree: &Tree, node: Option<NodeId>) -> Option<Merged> {
    tree.nodes[node?].merged.clone()
}

fn insert(tree: &mut Tree, directory: NodeId, name: &OsStr, node: Node) -> NodeId {
    let id = tree.nodes.len();
    tree.nodes.push(node);
    tree.nodes[directory].entries.insert(name.to_owned(), id);
    id
}
