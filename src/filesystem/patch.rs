//! Makes a recorded tree what the live one is, of what [`super::cut`] has left of both.

use std::collections::HashMap;

use super::tree::{Node, NodeId, ROOT, Tree};

/// `recorded` with what is `live` instead of what `was`, which are both trees without what is the same in them.
pub fn patch(recorded: Tree, was: &Tree, live: &Tree) -> Tree {
    let mut patch = Patch {
        tree: recorded,
        was,
        live,
        new: HashMap::new(),
    };
    patch.directory(ROOT, ROOT, ROOT);
    compact(patch.tree)
}

struct Patch<'a> {
    tree: Tree,
    was: &'a Tree,
    live: &'a Tree,
    /// The nodes that live ones have become.
    new: HashMap<NodeId, NodeId>,
}

impl Patch<'_> {
    fn directory(&mut self, at: NodeId, was: NodeId, live: NodeId) {
        let (was, live) = (&self.was.nodes[was], &self.live.nodes[live]);
        self.tree.nodes[at].meta = live.meta.clone();
        self.tree.nodes[at].merged = live.merged.clone();
        for name in was.entries.keys() {
            if !live.entries.contains_key(name) {
                self.tree.nodes[at].entries.remove(name);
            }
        }
        for (name, &node) in &live.entries {
            match (self.tree.at(at, name), was.entries.get(name)) {
                (Some(old), Some(&was)) if is_in_place(&self.tree.nodes[old], self.live, node) => {
                    self.directory(old, was, node);
                }
                _ => {
                    let new = self.graft(node);
                    self.tree.nodes[at].entries.insert(name.clone(), new);
                }
            }
        }
    }

    fn graft(&mut self, node: NodeId) -> NodeId {
        if let Some(new) = self.new.get(&node) {
            return *new;
        }
        let id = self.tree.nodes.len();
        self.new.insert(node, id);
        self.tree.nodes.push(self.live.nodes[node].clone());
        for (name, &below) in &self.live.nodes[node].entries {
            let below = self.graft(below);
            self.tree.nodes[id].entries.insert(name.clone(), below);
        }
        id
    }
}

/// As [`super::cut::Same::directory`] sees it: not all of what is in it is among what is left.
fn is_in_place(old: &Node, live: &Tree, node: NodeId) -> bool {
    let live = &live.nodes[node];
    old.meta.stat.is_directory()
        && old.meta.stat.identity() == live.meta.stat.identity()
        && old.merged.is_some() == live.merged.is_some()
}

/// Without nodes that have no name any more.
fn compact(tree: Tree) -> Tree {
    let mut old: Vec<Option<Node>> = tree.nodes.into_iter().map(Some).collect();
    let mut places: Vec<Option<NodeId>> = vec![None; old.len()];
    let mut nodes: Vec<Node> = Vec::with_capacity(old.len());
    places[ROOT] = Some(ROOT);
    nodes.extend(old[ROOT].take());
    let mut done = 0;
    while done < nodes.len() {
        let mut entries = std::mem::take(&mut nodes[done].entries);
        for node in entries.values_mut() {
            if let Some(moved) = old[*node].take() {
                places[*node] = Some(nodes.len());
                nodes.push(moved);
            }
            *node = places[*node].unwrap_or(ROOT);
        }
        nodes[done].entries = entries;
        done += 1;
    }
    Tree { nodes }
}
