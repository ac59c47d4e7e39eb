//! Leaves out of a recorded and a live tree what is the same in both, so that a plan costs what has changed.
//!
//! Left out is a file or link that has one name, in both, and is the same inode with the same content, rights and times; and
//! only in a directory that is the same inode at the same path. So all a plan looks at is there: directories on the way to
//! what differs, and all names of inodes that have several.
//!
//! If the journal of inodes tells what may differ ([`Same::but`]), other things are not even looked at: an inode that it does
//! not tell of is as it was, and has the names it had, unless a directory has another name; or two names were exchanged, which XFS
//! does without a trace but in their directories.

use std::collections::{BTreeMap, HashSet};
use std::ffi::{OsStr, OsString};

use super::index::{Index, Needed};
use super::known::Inodes;
use super::meta::{Entry, Stat};
use super::tree::{Merged, Node, NodeId, ROOT, Tree};

/// What of a recorded tree was found to be the same.
#[derive(Debug)]
pub struct Same<'a> {
    recorded: &'a Tree,
    /// Recorded names, and their directories, that are left out.
    same: HashSet<(NodeId, OsString)>,
    /// Recorded directories that are where they were. Of others all names are needed.
    directories: HashSet<NodeId>,
    /// Where not all is looked at.
    only: Option<Only>,
}

#[derive(Debug)]
struct Only {
    /// What is looked at.
    needed: Needed,
    /// What may differ. Directories among it are listed.
    touched: HashSet<NodeId>,
}

impl<'a> Same<'a> {
    /// Nothing was found yet.
    pub fn new(recorded: &'a Tree) -> Self {
        Self {
            recorded,
            same: HashSet::new(),
            directories: HashSet::from([ROOT]),
            only: None,
        }
    }

    /// The same, but all is known to be as it was but inodes with numbers that are `touched`.
    pub fn but(recorded: &'a Tree, index: &Index, touched: &HashSet<u64>) -> Self {
        let touched = touched.iter().flat_map(|number| index.nodes(*number));
        let touched: HashSet<NodeId> = touched.collect();
        Self {
            only: Some(Only {
                needed: index.needed(recorded, touched.iter().copied()),
                touched,
            }),
            ..Self::new(recorded)
        }
    }

    /// The names to be looked at in a recorded directory that is where it was. `None`: it has to be listed.
    pub fn names(&self, directory: NodeId) -> Option<Vec<OsString>> {
        let only = self.only.as_ref()?;
        if only.touched.contains(&directory) {
            return None;
        }
        let needed = only.needed.get(&directory).into_iter().flatten();
        Some(needed.cloned().collect())
    }

    /// What a recorded directory hides.
    pub fn merged(&self, directory: NodeId) -> Option<&Merged> {
        self.recorded.nodes[directory].merged.as_ref()
    }

    /// Whether what is listed in a recorded directory need not be looked at, and is left out from now on.
    pub fn passes_over(&mut self, directory: NodeId, entry: &Entry) -> bool {
        let Some(only) = &self.only else {
            return false;
        };
        let needed = only.needed.get(&directory);
        let Some(was) = self.recorded.at(directory, &entry.name) else {
            return false;
        };
        let is_same = self.recorded.nodes[was].meta.stat.ino == entry.number
            && needed.is_none_or(|needed| !needed.contains(&entry.name));
        if is_same {
            self.same.insert((directory, entry.name.clone()));
        }
        is_same
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
        if is_same {
            self.same.insert((directory, name.to_owned()));
        }
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
        let in_place = self.directories.contains(&node);
        let names = in_place.then(|| self.names(node)).flatten();
        let entries: Vec<(OsString, NodeId)> = match names {
            Some(names) => {
                let of = |name: OsString| Some((name.clone(), self.recorded.at(node, &name)?));
                names.into_iter().filter_map(of).collect()
            }
            None => {
                let entries = recorded.entries.iter();
                entries.map(|(name, node)| (name.clone(), *node)).collect()
            }
        };
        for (name, below) in entries {
            let key = (node, name);
            if in_place && self.same.contains(&key) {
                continue;
            }
            let below = self.copy(below, into, ids);
            into.nodes[id].entries.insert(key.1, below);
        }
        id
    }
}
