//! The plan of a rollback of one area: recorded and live tree in, operations out. Pure.
//!
//! An inode that was recorded and is still there keeps being that inode: it goes back to its names by rename and is rewritten
//! in place. Everything is named by path. Operations are in order: first names that are in the way go, the deepest first, what
//! is to stay being stashed in a directory of its own; then names are made, the highest first; further names of inodes when
//! all directories are in place; at last content, rights, and times.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use super::meta::{Identity, Meta};
use super::tree::{NodeId, ROOT, Tree};

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Moves what is at a path into the stash, where it is called by the number of its recorded node.
    Stash(PathBuf, NodeId),
    /// Removes a name that is not a directory's.
    Unlink(PathBuf),
    /// Removes an empty directory.
    RemoveDirectory(PathBuf),
    /// Makes a recorded node, content and all.
    Make(PathBuf, NodeId),
    /// Moves a node from the stash to its place.
    Unstash(NodeId, PathBuf),
    /// Gives a node one more name.
    Link {
        /// A name it has.
        from: PathBuf,
        /// The new one.
        to: PathBuf,
    },
    /// Makes the content that of the node.
    Rewrite(PathBuf, NodeId),
    /// Owner, permissions, extended attributes.
    Rights(PathBuf, NodeId),
    /// Times of last access and change of content.
    Times(PathBuf, NodeId),
}

/// What is to be done, and what is known of who is who.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// In order.
    pub ops: Vec<Op>,
    /// Recorded nodes that are not there: their inodes will be others.
    pub made: BTreeSet<NodeId>,
    /// A path of every live node that is changed or removed, and of directories in which names are: they must not be immutable.
    pub touched: BTreeMap<NodeId, PathBuf>,
    /// Where every recorded node is afterwards that is changed or made.
    pub after: BTreeMap<NodeId, PathBuf>,
}

/// Plans how `live` becomes `wanted`.
pub fn plan(wanted: &Tree, live: &Tree) -> Plan {
    let matches = Matches::find(wanted, live);
    let mut planner = Planner {
        wanted,
        live,
        anchored: BTreeSet::new(),
        stashed: BTreeSet::new(),
        placed: HashMap::new(),
        later: Vec::new(),
        changed: BTreeSet::new(),
        plan: Plan::default(),
        matches,
    };
    planner.find_anchors(ROOT);
    planner.clear(ROOT, Path::new(""));
    planner.place(ROOT, Path::new(""));
    planner.link();
    planner.restore();
    planner.plan
}

/// Which live node is which recorded one.
struct Matches {
    of_wanted: HashMap<NodeId, NodeId>,
    of_live: HashMap<NodeId, NodeId>,
}

impl Matches {
    fn find(wanted: &Tree, live: &Tree) -> Self {
        let mut matches = Self {
            of_wanted: HashMap::new(),
            of_live: HashMap::new(),
        };
        matches.add(ROOT, ROOT);
        let identity = |node: NodeId| (live.nodes[node].meta.stat.identity(), node);
        let by_identity: HashMap<Identity, NodeId> = (1..live.nodes.len()).map(identity).collect();
        // A copy that was made of a lower layer's file has its number, but was made when it was copied.
        let number = |node: NodeId| (live.nodes[node].meta.stat.shown.1, node);
        let by_number: HashMap<u64, NodeId> = (1..live.nodes.len()).map(number).collect();
        for node in 1..wanted.nodes.len() {
            let was = &wanted.nodes[node];
            let found = match was.of_lower {
                true => by_number.get(&was.meta.stat.ino),
                false => by_identity.get(&was.meta.stat.identity()),
            };
            let found = found.filter(|found| {
                let is = &live.nodes[**found];
                // What shows directories of lower layers can't be moved; it is where it was.
                was.merged.is_none() && is.merged.is_none() && is.meta.is_same_sort(&was.meta)
            });
            if let Some(&found) = found {
                matches.add(node, found);
            }
        }
        matches.by_path(wanted, live);
        matches
    }

    /// What is where it was but has another inode number: directories, which have nothing that is worth another one; sockets,
    /// which belong to whoever bound them; files of the lower layers, which got another when they were copied up.
    fn by_path(&mut self, wanted: &Tree, live: &Tree) {
        let mut pending = vec![(ROOT, ROOT)];
        while let Some((one, other)) = pending.pop() {
            for (name, &node) in &wanted.nodes[one].entries {
                let Some(found) = live.at(other, name) else {
                    continue;
                };
                let (was, is) = (&wanted.nodes[node], &live.nodes[found]);
                let is_directory = was.meta.stat.is_directory();
                let is_socket = was.meta.stat.file_type() == libc::S_IFSOCK;
                if (is_directory || is_socket || was.of_lower)
                    && !self.of_wanted.contains_key(&node)
                    && !self.of_live.contains_key(&found)
                    && was.meta.is_same_sort(&is.meta)
                {
                    self.add(node, found);
                }
                if is_directory && self.of_wanted.get(&node) == Some(&found) {
                    pending.push((node, found));
                }
            }
        }
    }

    fn add(&mut self, wanted: NodeId, live: NodeId) {
        if self.of_live.contains_key(&live) {
            return;
        }
        self.of_wanted.insert(wanted, live);
        self.of_live.insert(live, wanted);
    }
}

struct Planner<'a> {
    wanted: &'a Tree,
    live: &'a Tree,
    matches: Matches,
    /// Recorded nodes that have a right name and keep it.
    anchored: BTreeSet<NodeId>,
    stashed: BTreeSet<NodeId>,
    /// A path of each recorded node that has one again.
    placed: HashMap<NodeId, PathBuf>,
    /// Names to be made when all directories are in place.
    later: Vec<(NodeId, PathBuf)>,
    /// Recorded directories in which names change.
    changed: BTreeSet<NodeId>,
    plan: Plan,
}

impl Planner<'_> {
    /// The recorded node that a name in a live directory is a right name of.
    fn is_right(
        &self,
        directory: Option<NodeId>,
        name: &std::ffi::OsStr,
        live: NodeId,
    ) -> Option<NodeId> {
        let wanted = self.wanted.at(directory?, name)?;
        (self.matches.of_wanted.get(&wanted) == Some(&live)).then_some(wanted)
    }

    fn find_anchors(&mut self, directory: NodeId) {
        let of = self.matches.of_live.get(&directory).copied();
        for (name, &node) in &self.live.nodes[directory].entries {
            if let Some(wanted) = self.is_right(of, name, node) {
                self.anchored.insert(wanted);
            }
            if self.live.nodes[node].meta.stat.is_directory() {
                self.find_anchors(node);
            }
        }
    }

    /// Removes or stashes every wrong name below a live directory.
    fn clear(&mut self, directory: NodeId, path: &Path) {
        let of = self.matches.of_live.get(&directory).copied();
        for (name, &node) in &self.live.nodes[directory].entries {
            let path_of = path.join(name);
            let is_directory = self.live.nodes[node].meta.stat.is_directory();
            if is_directory {
                self.clear(node, &path_of);
            }
            if self.is_right(of, name, node).is_some() {
                continue;
            }
            self.changed.extend(of);
            self.touch(directory, path);
            self.touch(node, &path_of);
            let kept = self.matches.of_live.get(&node).copied();
            let op = match kept {
                Some(kept) if !self.anchored.contains(&kept) && self.stashed.insert(kept) => {
                    // The stash is made in it.
                    self.changed.insert(ROOT);
                    Op::Stash(path_of, kept)
                }
                _ if is_directory => Op::RemoveDirectory(path_of),
                _ => Op::Unlink(path_of),
            };
            self.plan.ops.push(op);
        }
    }

    /// Gives every recorded node below a directory its first name.
    fn place(&mut self, directory: NodeId, path: &Path) {
        let of = self.matches.of_wanted.get(&directory).copied();
        for (name, &node) in &self.wanted.nodes[directory].entries {
            let path_of = path.join(name);
            let is_there = of
                .and_then(|of| self.live.at(of, name))
                .is_some_and(|live| self.matches.of_wanted.get(&node) == Some(&live));
            if is_there {
                self.placed.entry(node).or_insert_with(|| path_of.clone());
            } else {
                self.changed.insert(directory);
                if let Some(of) = of {
                    self.touch(of, path);
                }
                if self.placed.contains_key(&node) || self.anchored.contains(&node) {
                    self.later.push((node, path_of.clone()));
                } else {
                    let op = match self.stashed.contains(&node) {
                        true => Op::Unstash(node, path_of.clone()),
                        false => {
                            self.plan.made.insert(node);
                            Op::Make(path_of.clone(), node)
                        }
                    };
                    self.plan.ops.push(op);
                    self.placed.insert(node, path_of.clone());
                }
            }
            if self.wanted.nodes[node].meta.stat.is_directory() {
                self.place(node, &path_of);
            }
        }
    }

    fn link(&mut self) {
        for (node, to) in std::mem::take(&mut self.later) {
            let from = self.placed[&node].clone();
            if let Some(&live) = self.matches.of_wanted.get(&node) {
                self.touch(live, &from);
            }
            self.plan.ops.push(Op::Link { from, to });
        }
    }

    /// Content, rights and times of what is there, rights and times of what is made.
    fn restore(&mut self) {
        self.placed.insert(ROOT, PathBuf::new());
        let mut times = Vec::new();
        let paths: BTreeMap<NodeId, PathBuf> = self.placed.drain().collect();
        for (node, path) in paths {
            let wanted = &self.wanted.nodes[node];
            let Some(&found) = self.matches.of_wanted.get(&node) else {
                // Its times are the last: if it is a directory more is made in it.
                self.plan.after.insert(node, path.clone());
                times.push(Op::Times(path, node));
                continue;
            };
            let live = &self.live.nodes[found];
            let rewrite = wanted.meta.stat.is_file() && wanted.content != live.content;
            let rights = !wanted.meta.has_same_rights(&live.meta);
            // A directory that is moved may get another time with it: seen on XFS.
            if rewrite
                || rights
                || self.changed.contains(&node)
                || self.stashed.contains(&node)
                || differ_in_time(&wanted.meta, &live.meta)
            {
                self.touch(found, &path);
                times.push(Op::Times(path.clone(), node));
            }
            // Another inode does for it, which is to be known from now on.
            let is_another = wanted.meta.stat.identity() != live.meta.stat.identity();
            if is_another && !wanted.of_lower {
                self.touch(found, &path);
            }
            if self.plan.touched.contains_key(&found) {
                self.plan.after.insert(node, path.clone());
            }
            if rewrite {
                self.plan.ops.push(Op::Rewrite(path.clone(), node));
            }
            // Writing takes set-user-ID bits and capabilities away.
            if rights || rewrite {
                self.plan.ops.push(Op::Rights(path, node));
            }
        }
        self.plan.ops.append(&mut times);
    }

    fn touch(&mut self, live: NodeId, path: &Path) {
        self.plan
            .touched
            .entry(live)
            .or_insert_with(|| path.to_owned());
    }
}

/// Whether times have to be put back. That of the last access is not looked at: it goes back where something else does.
fn differ_in_time(wanted: &Meta, live: &Meta) -> bool {
    wanted.stat.mtime != live.stat.mtime
}

#[cfg(test)]
#[path = "plan_tests.rs"]
pub(super) mod tests;
