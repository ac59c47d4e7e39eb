//! Leaves out of a recorded and a live tree what is the same in both, so that a plan costs what has changed.
//!
//! Left out is a file or link that has one name, in both, and is the same inode with the same content, rights and times; and
//! only in a directory that is the same inode at the same path. So all a plan looks at is there: directories on the way to
//! what differs, and all names of inodes that have several.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;

use super::known::Inodes;
use super::meta::Stat;
use super::tree::{Merged, Node, NodeId, ROOT, Tree};

/// What of a recorded tree was found to be the same.
#[derive(Debug)]
pub struct Same<'a> {
    recorded: &'a Tree,
    /// Of each recorded node: whether it is left out.
    same: Vec<bool>,
    /// Recorded directories that are where they were. Of others all names are needed.
    directories: HashSet<NodeId>,
}

impl<'a> Same<'a> {
    /// Nothing was found yet.
    pub fn new(recorded: &'a Tree) -> Self {
        Self {
            recorded,
            same: vec![false; recorded.nodes.len()],
            directories: HashSet::from([ROOT]),
        }
    }

    /// Whether what is found at a name in a recorded directory is as it was, and is left out from now on. `unchanged` as for
    /// [`Inodes::find`].
    pub fn leaves_out(
        &mut self,
        directory: NodeId,
        name: &OsStr,
        known: &Inodes,
        stat: &Stat,
        unchanged: bool,
    ) -> bool {
        let Some(was) = self.recorded.at(directory, name) else {
            return false;
        };
        let node = &self.recorded.nodes[was];
        let is_same = (stat.is_file() || stat.is_symlink())
            && (stat.links, node.meta.stat.links) == (1, 1)
            && stat.identity() == node.meta.stat.identity()
            && known.is_as(stat, unchanged, node);
        self.same[was] |= is_same;
        is_same
    }

    /// The recorded directory that is still at a name in a recorded directory.
    pub fn directory(
        &mut self,
        directory: NodeId,
        name: &OsStr,
        stat: &Stat,
        merged: Option<&Merged>,
    ) -> Option<NodeId> {
        let was = self.recorded.at(directory, name)?;
        let node = &self.recorded.nodes[was];
        let is_it = node.meta.stat.is_directory()
            && node.meta.stat.identity() == stat.identity()
            && node.merged.is_some() == merged.is_some();
        is_it.then(|| {
            self.directories.insert(was);
            was
        })
    }

    /// The recorded tree without what was left out.
    pub fn others(&self) -> Tree {
        let mut others = Tree::default();
        let mut ids = BTreeMap::new();
        self.copy(ROOT, &mut others, &mut ids);
        others
    }

    fn copy(&self, node: NodeId, into: &mut Tree, ids: &mut BTreeMap<NodeId, NodeId>) -> NodeId {
        if let Some(id) = ids.get(&node) {
            return *id;
        }
        let recorded = &self.recorded.nodes[node];
        let id = into.nodes.len();
        ids.insert(node, id);
        into.nodes.push(Node {
            entries: BTreeMap::new(),
            meta: recorded.meta.clone(),
            content: recorded.content.clone(),
            merged: recorded.merged.clone(),
            of_lower: recorded.of_lower,
        });
        let all = !self.directories.contains(&node);
        for (name, &below) in &recorded.entries {
            if all || !self.same[below] {
                let below = self.copy(below, into, ids);
                into.nodes[id].entries.insert(name.clone(), below);
            }
        }
        id
    }
}
