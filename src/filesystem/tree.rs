//! A tree of files as it is recorded, and as it is found.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::Arc;

use super::meta::Meta;
use super::store::Kept;

/// A node of a [`Tree`], by its place in [`Tree::nodes`].
pub type NodeId = usize;

/// The root of every tree.
pub const ROOT: NodeId = 0;

/// Where the content of a regular file is.
#[derive(Debug, Clone)]
pub enum Content {
    /// It is kept.
    Kept(Arc<Kept>),
    /// In the lower layers, which do not change, at this path.
    Lower(PathBuf),
    /// It is the file's own, and not known to be any that is kept.
    Unknown,
}

impl PartialEq for Content {
    /// Whether it is known to be the same.
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Kept(one), Self::Kept(other)) => Arc::ptr_eq(one, other),
            (Self::Lower(one), Self::Lower(other)) => one == other,
            _ => false,
        }
    }
}

/// An inode.
#[derive(Debug, Clone)]
pub struct Node {
    /// What is known of it.
    pub meta: Arc<Meta>,
    /// Of a regular file.
    pub content: Content,
    /// Of a directory: its names.
    pub entries: BTreeMap<OsString, NodeId>,
    /// Of a directory: whether the lower layers' names show through.
    pub merged: Option<Merged>,
    /// It is the lower layers': it was in none of the upper ones.
    pub of_lower: bool,
}

/// What hides names of the lower layers in a directory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Merged {
    /// Names that were deleted.
    pub whiteouts: BTreeSet<OsString>,
}

/// A tree of files. Inodes with several names are one node.
#[derive(Debug, Clone, Default)]
pub struct Tree {
    /// The nodes; the first is the root, all others have a name.
    pub nodes: Vec<Node>,
}

impl Tree {
    /// The node at a name in a directory.
    pub fn at(&self, directory: NodeId, name: &OsStr) -> Option<NodeId> {
        self.nodes[directory].entries.get(name).copied()
    }

    /// Calls `visit` with every name: its directory, path and node; a directory before what is in it.
    pub fn walk(&self, mut visit: impl FnMut(NodeId, &std::path::Path, NodeId)) {
        let mut pending = vec![(ROOT, PathBuf::new())];
        while let Some((directory, path)) = pending.pop() {
            for (name, &node) in &self.nodes[directory].entries {
                let path = path.join(name);
                visit(directory, &path, node);
                if self.nodes[node].meta.stat.is_directory() {
                    pending.push((node, path));
                }
            }
        }
    }
}
