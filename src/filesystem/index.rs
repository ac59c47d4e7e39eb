//! Finds inodes of a recorded tree by their numbers, and where they are.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::path::PathBuf;

use super::tree::{NodeId, ROOT, Tree};

/// What is where in a tree.
#[derive(Debug, Default)]
pub struct Index {
    /// Nodes by numbers of inodes, sorted.
    by_number: Vec<(u64, NodeId)>,
    /// The same by numbers that the mount shows, where those are others.
    by_shown: Vec<(u64, NodeId)>,
    /// The directories that have names of each node, sorted.
    parents: Vec<(NodeId, NodeId)>,
    /// Sockets and FIFOs.
    special: Vec<NodeId>,
}

/// Names that are looked at in recorded directories; no others are in those that are not listed.
pub type Needed = HashMap<NodeId, BTreeSet<OsString>>;

impl Index {
    /// Looks at all of a tree.
    pub fn of(tree: &Tree) -> Self {
        let mut index = Self::default();
        for (id, node) in tree.nodes.iter().enumerate() {
            let stat = &node.meta.stat;
            index.by_number.push((stat.ino, id));
            if stat.shown.1 != stat.ino {
                index.by_shown.push((stat.shown.1, id));
            }
            if matches!(stat.file_type(), libc::S_IFSOCK | libc::S_IFIFO) {
                index.special.push(id);
            }
            let below = node.entries.values();
            index.parents.extend(below.map(|below| (*below, id)));
        }
        index.by_number.sort_unstable();
        index.by_shown.sort_unstable();
        index.parents.sort_unstable();
        index.parents.dedup();
        index
    }

    /// Nodes whose inodes have a number.
    pub fn nodes(&self, number: u64) -> impl Iterator<Item = NodeId> {
        all(&self.by_number, number)
    }

    /// Nodes whose inodes have a number, or are shown to have it.
    pub fn shown(&self, number: u64) -> impl Iterator<Item = NodeId> {
        self.nodes(number).chain(all(&self.by_shown, number))
    }

    /// Sockets and FIFOs.
    pub fn special(&self) -> &[NodeId] {
        &self.special
    }

    /// All names of nodes, and of the directories on the way to them.
    pub fn needed(&self, tree: &Tree, nodes: impl IntoIterator<Item = NodeId>) -> Needed {
        let mut of_directories: HashMap<NodeId, BTreeSet<NodeId>> = HashMap::new();
        let mut pending: Vec<NodeId> = nodes.into_iter().collect();
        while let Some(node) = pending.pop() {
            for parent in all(&self.parents, node) {
                let below = of_directories.entry(parent).or_default();
                if below.is_empty() {
                    pending.push(parent);
                }
                below.insert(node);
            }
        }
        let names = |(directory, below): (NodeId, BTreeSet<NodeId>)| {
            let entries = tree.nodes[directory].entries.iter();
            let wanted = entries.filter(|(_, node)| below.contains(node));
            (directory, wanted.map(|(name, _)| name.clone()).collect())
        };
        of_directories.into_iter().map(names).collect()
    }

    /// A path of each node. One that has several names has several paths.
    pub fn paths(&self, tree: &Tree, nodes: &[NodeId]) -> Vec<(NodeId, NodeId, PathBuf)> {
        let wanted: BTreeSet<NodeId> = nodes.iter().copied().collect();
        let needed = self.needed(tree, nodes.iter().copied());
        let mut found = Vec::new();
        let mut pending = vec![(ROOT, PathBuf::new())];
        while let Some((directory, path)) = pending.pop() {
            for name in needed.get(&directory).into_iter().flatten() {
                let Some(node) = tree.at(directory, name) else {
                    continue;
                };
                let path = path.join(name);
                if wanted.contains(&node) {
                    found.push((directory, node, path.clone()));
                }
                pending.push((node, path));
            }
        }
        found
    }
}

fn all<T: Copy + Ord>(sorted: &[(T, NodeId)], key: T) -> impl Iterator<Item = NodeId> {
    let from = sorted.partition_point(|(other, _)| *other < key);
    let same = sorted[from..]
        .iter()
        .take_while(move |(other, _)| *other == key);
    same.map(|(_, node)| *node)
}
