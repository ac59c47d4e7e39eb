//! The plan, carried out on a model of a file system.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;

use super::{Op, plan};
use crate::filesystem::meta::{Meta, Stat};
use crate::filesystem::tree::{Content, Node, NodeId, ROOT, Tree};

fn node(ino: u64, mode: u32, time: i64) -> Node {
    let stat = Stat {
        ino,
        device: 1,
        mode,
        uid: 0,
        gid: 0,
        rdev: 0,
        links: 1,
        size: 0,
        atime: (0, 0),
        mtime: (time, 0),
        ctime: (0, 0),
        born: (0, 0),
        attributes: 0,
    };
    Node {
        meta: Arc::new(Meta {
            stat,
            target: Vec::new(),
            xattrs: BTreeMap::new(),
        }),
        content: Content::Lower(PathBuf::from(time.to_string())),
        entries: BTreeMap::new(),
        merged: None,
        of_lower: false,
    }
}

/// A file system: inodes, and names of those that are directories.
#[derive(Debug, Clone)]
struct Model {
    inodes: HashMap<u64, (bool, i64)>,
    names: BTreeMap<PathBuf, u64>,
    next: u64,
}

/// One thing a program does.
#[derive(Debug, Clone)]
enum Did {
    Make(u8, bool),
    Link(u8, u8),
    Rename(u8, u8),
    Remove(u8),
    Write(u8),
}

fn did() -> impl Strategy<Value = Did> {
    prop_oneof![
        (any::<u8>(), any::<bool>()).prop_map(|(at, directory)| Did::Make(at, directory)),
        (any::<u8>(), any::<u8>()).prop_map(|(from, to)| Did::Link(from, to)),
        (any::<u8>(), any::<u8>()).prop_map(|(from, to)| Did::Rename(from, to)),
        any::<u8>().prop_map(Did::Remove),
        any::<u8>().prop_map(Did::Write),
    ]
}

impl Model {
    fn new() -> Self {
        Self {
            inodes: HashMap::from([(1, (true, 0))]),
            names: BTreeMap::new(),
            next: 2,
        }
    }

    fn is_directory(&self, path: &Path) -> bool {
        path == Path::new("") || self.names.get(path).is_some_and(|ino| self.inodes[ino].0)
    }

    fn pick(&self, number: u8) -> Option<PathBuf> {
        let count = self.names.len();
        (count > 0).then(|| self.names.keys().nth(usize::from(number) % count).cloned())?
    }

    /// A path in some directory that may or may not be taken.
    fn place(&self, number: u8) -> PathBuf {
        let mut directories: Vec<&Path> = vec![Path::new("")];
        directories.extend(
            self.names
                .keys()
                .map(PathBuf::as_path)
                .filter(|path| self.is_directory(path)),
        );
        let directory = directories[usize::from(number / 3) % directories.len()];
        directory.join(["a", "b", "c"][usize::from(number % 3)])
    }

    fn is_empty(&self, directory: &Path) -> bool {
        !self
            .names
            .keys()
            .any(|path| path.parent() == Some(directory))
    }

    fn rename(&mut self, from: &Path, to: &Path) {
        let moved: Vec<PathBuf> = self
            .names
            .keys()
            .filter(|path| path.starts_with(from))
            .cloned()
            .collect();
        for path in moved {
            let ino = self.names.remove(&path).unwrap();
            let rest = path.strip_prefix(from).unwrap();
            let to = match rest == Path::new("") {
                true => to.to_owned(),
                false => to.join(rest),
            };
            self.names.insert(to, ino);
        }
    }

    fn make(&mut self, path: PathBuf, directory: bool, time: i64) {
        self.inodes.insert(self.next, (directory, time));
        self.names.insert(path, self.next);
        self.next += 1;
    }

    fn run(&mut self, did: &Did, time: i64) {
        match did {
            Did::Make(at, directory) => {
                let path = self.place(*at);
                if !self.names.contains_key(&path) {
                    self.make(path, *directory, time);
                }
            }
            Did::Link(from, to) => {
                let (Some(from), to) = (self.pick(*from), self.place(*to)) else {
                    return;
                };
                if !self.is_directory(&from) && !self.names.contains_key(&to) {
                    self.names.insert(to, self.names[&from]);
                }
            }
            Did::Rename(from, to) => {
                let (Some(from), to) = (self.pick(*from), self.place(*to)) else {
                    return;
                };
                if from == to || to.starts_with(&from) {
                    return;
                }
                if let Some(&there) = self.names.get(&to) {
                    let both = (self.is_directory(&from), self.is_directory(&to));
                    if both.0 != both.1 || there == self.names[&from] || !self.is_empty(&to) {
                        return;
                    }
                    self.names.remove(&to);
                }
                self.rename(&from, &to);
            }
            Did::Remove(at) => {
                if let Some(path) = self.pick(*at)
                    && self.is_empty(&path)
                {
                    self.names.remove(&path);
                }
            }
            Did::Write(at) => {
                if let Some(path) = self.pick(*at) {
                    self.inodes.get_mut(&self.names[&path]).unwrap().1 = time;
                }
            }
        }
    }

    fn tree(&self) -> Tree {
        let mut ids = HashMap::from([(1u64, ROOT)]);
        let of = |ino: u64| {
            let (directory, time) = self.inodes[&ino];
            let kind = if directory {
                libc::S_IFDIR
            } else {
                libc::S_IFREG
            };
            node(ino, kind, time)
        };
        let mut tree = Tree { nodes: vec![of(1)] };
        for (path, &ino) in &self.names {
            let id = *ids.entry(ino).or_insert_with(|| {
                tree.nodes.push(of(ino));
                tree.nodes.len() - 1
            });
            let parent = match path.parent().unwrap() {
                root if root == Path::new("") => ROOT,
                parent => ids[&self.names[parent]],
            };
            let name: OsString = path.file_name().unwrap().to_owned();
            tree.nodes[parent].entries.insert(name, id);
        }
        tree
    }

    /// Carries a plan out as a file system would, which refuses what can't be.
    fn execute(&mut self, ops: &[Op], wanted: &Tree) {
        let mut stash: HashMap<NodeId, BTreeMap<PathBuf, u64>> = HashMap::new();
        let parent_is_there = |model: &Self, path: &Path| {
            assert!(model.is_directory(path.parent().unwrap()), "{path:?}");
            assert!(!model.names.contains_key(path), "{path:?} is taken");
        };
        for op in ops {
            match op {
                Op::Stash(path, node) => {
                    let all: Vec<PathBuf> = self
                        .names
                        .keys()
                        .filter(|name| name.starts_with(path))
                        .cloned()
                        .collect();
                    assert!(!all.is_empty(), "{path:?} is not there");
                    let moved = all
                        .into_iter()
                        .map(|name| {
                            let ino = self.names.remove(&name).unwrap();
                            (name.strip_prefix(path).unwrap().to_owned(), ino)
                        })
                        .collect();
                    assert!(stash.insert(*node, moved).is_none());
                }
                Op::Unlink(path) => {
                    assert!(!self.is_directory(path));
                    self.names.remove(path).expect("a name to remove");
                }
                Op::RemoveDirectory(path) => {
                    assert!(self.is_directory(path) && self.is_empty(path));
                    self.names.remove(path).expect("a directory to remove");
                }
                Op::Make(path, node) => {
                    parent_is_there(self, path);
                    let meta = &wanted.nodes[*node].meta;
                    self.make(path.clone(), meta.stat.is_directory(), meta.stat.mtime.0);
                }
                Op::Unstash(node, path) => {
                    parent_is_there(self, path);
                    for (rest, ino) in stash.remove(node).expect("a node in the stash") {
                        let to = match rest == Path::new("") {
                            true => path.clone(),
                            false => path.join(rest),
                        };
                        self.names.insert(to, ino);
                    }
                }
                Op::Link { from, to } => {
                    parent_is_there(self, to);
                    self.names.insert(to.clone(), self.names[from]);
                }
                Op::Rewrite(path, node) | Op::Rights(path, node) => {
                    assert!(!self.is_directory(path));
                    let time = wanted.nodes[*node].meta.stat.mtime.0;
                    self.inodes.get_mut(&self.names[path]).unwrap().1 = time;
                }
                Op::Times(path, node) => {
                    let time = wanted.nodes[*node].meta.stat.mtime.0;
                    let ino = match path == Path::new("") {
                        true => 1,
                        false => self.names[path],
                    };
                    self.inodes.get_mut(&ino).unwrap().1 = time;
                }
            }
        }
        assert!(stash.is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn the_plan_makes_it_as_it_was(before in proptest::collection::vec(did(), 0..30), since in proptest::collection::vec(did(), 0..30)) {
        let mut was = Model::new();
        for (time, did) in before.iter().enumerate() {
            was.run(did, time as i64);
        }
        let mut is = was.clone();
        for (time, did) in since.iter().enumerate() {
            is.run(did, 1000 + time as i64);
        }
        let wanted = was.tree();
        let live = is.tree();
        let plan = plan(&wanted, &live);
        let alive: Vec<u64> = is.names.values().copied().collect();
        is.execute(&plan.ops, &wanted);
        prop_assert_eq!(is.names.keys().collect::<Vec<_>>(), was.names.keys().collect::<Vec<_>>());
        for (path, ino) in &was.names {
            let found = is.names[path];
            prop_assert_eq!(was.inodes[ino], is.inodes[&found], "{:?}", path);
            if alive.contains(ino) {
                prop_assert_eq!(*ino, found, "{:?} was there and is another", path);
            }
            for (other, at) in &was.names {
                prop_assert_eq!(ino == at, found == is.names[other], "{:?} and {:?}", path, other);
            }
        }
        // And then there is nothing left to do.
        let again = super::plan(&is.tree(), &is.tree());
        prop_assert_eq!(again.ops, vec![]);
    }
}
