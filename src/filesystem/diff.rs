//! What has become of files since a checkpoint.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::tree::{NodeId, ROOT, Tree};

/// What has become of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// It was not there.
    Added,
    /// Content, rights, times or sort are others; of a directory, also its names.
    Changed,
    /// It is not there any more.
    Deleted,
}

impl fmt::Display for ChangeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ChangeKind::Added => "A",
            ChangeKind::Changed => "C",
            ChangeKind::Deleted => "D",
        })
    }
}

/// A file that is not as it was.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// Where it is, as the tree sees it.
    pub path: PathBuf,
    /// What has become of it.
    pub kind: ChangeKind,
    /// Its size in bytes at the checkpoint, if it was a regular file.
    pub before: Option<u64>,
    /// Its size now, if it is one.
    pub after: Option<u64>,
}

/// What differs between a recorded and a live tree that are mounted at `place`, in the order of paths.
pub fn changes(place: &Path, wanted: &Tree, live: &Tree) -> Vec<Change> {
    let mut found = Differences {
        wanted,
        live,
        changes: Vec::new(),
    };
    found.at(Some(ROOT), Some(ROOT), place);
    found.changes.sort();
    found.changes
}

struct Differences<'a> {
    wanted: &'a Tree,
    live: &'a Tree,
    changes: Vec<Change>,
}

impl Differences<'_> {
    fn at(&mut self, was: Option<NodeId>, is: Option<NodeId>, path: &Path) {
        let size = |tree: &Tree, node: Option<NodeId>| {
            let stat = &tree.nodes[node?].meta.stat;
            stat.is_file().then_some(stat.size)
        };
        let kind = match (was, is) {
            (Some(was), Some(is)) if self.is_same(was, is) => None,
            (Some(_), Some(_)) => Some(ChangeKind::Changed),
            (Some(_), None) => Some(ChangeKind::Deleted),
            (None, Some(_)) => Some(ChangeKind::Added),
            (None, None) => None,
        };
        self.changes.extend(kind.map(|kind| Change {
            path: path.to_owned(),
            kind,
            before: size(self.wanted, was),
            after: size(self.live, is),
        }));
        let names = |tree: &Tree, node: Option<NodeId>| match node {
            Some(node) => tree.nodes[node].entries.clone(),
            None => Default::default(),
        };
        let (before, after) = (names(self.wanted, was), names(self.live, is));
        for (name, &node) in &before {
            self.at(Some(node), after.get(name).copied(), &path.join(name));
        }
        for (name, &node) in after.iter().filter(|(name, _)| !before.contains_key(*name)) {
            self.at(None, Some(node), &path.join(name));
        }
    }

    fn is_same(&self, was: NodeId, is: NodeId) -> bool {
        let (was, is) = (&self.wanted.nodes[was], &self.live.nodes[is]);
        was.meta.is_same_sort(&is.meta)
            && was.meta.has_same_rights(&is.meta)
            && was.meta.stat.mtime == is.meta.stat.mtime
            && (!was.meta.stat.is_file() || was.content == is.content)
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;
    use crate::filesystem::plan::tests::node;

    fn tree(files: &[(&str, i64)]) -> Tree {
        let mut tree = Tree::default();
        tree.nodes.push(node(1, libc::S_IFDIR | 0o755, 0));
        for (number, (name, time)) in files.iter().enumerate() {
            tree.nodes
                .push(node(number as u64 + 2, libc::S_IFREG | 0o644, *time));
            let name = OsStr::new(name).to_owned();
            tree.nodes[ROOT].entries.insert(name, number + 1);
        }
        tree
    }

    #[test]
    fn each_file_is_told_once() {
        let before = tree(&[("gone", 1), ("same", 2), ("touched", 3)]);
        let after = tree(&[("new", 1), ("same", 2), ("touched", 4)]);
        let told: Vec<String> = changes(Path::new("/mnt"), &before, &after)
            .iter()
            .map(|change| format!("{} {}", change.kind, change.path.display()))
            .collect();
        assert_eq!(told, ["D /mnt/gone", "A /mnt/new", "C /mnt/touched"]);
        assert_eq!(changes(Path::new("/"), &before, &before), []);
    }
}
