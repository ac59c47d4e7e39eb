//! Files that other parts of a rollback have changed after the files went back.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::Result;
use super::image::AreaImage;
use super::mounted::Mounted;
use super::tree::{Node, ROOT, Tree};

/// Sockets, FIFOs and exposed files that other parts of the rollback have made again or written to, and their directories.
pub fn rebound<'a>(
    mounted: &Mounted,
    recorded: &'a AreaImage,
    exposed: &HashSet<u64>,
) -> Result<Vec<(&'a Node, PathBuf)>> {
    let (tree, index) = (&recorded.tree, recorded.index());
    let mut nodes = index.special().to_vec();
    nodes.extend(exposed.iter().flat_map(|number| index.nodes(*number)));
    nodes.retain(|node| !tree.nodes[*node].meta.stat.is_directory());
    let mut found = Vec::new();
    for (directory, node, path) in index.paths(tree, &nodes) {
        let was = &tree.nodes[node];
        let now = mounted.stat(&path);
        let now = now.map_err(mounted.error("look at", &path))?;
        if (now.ino, now.mtime) != (was.meta.stat.ino, was.meta.stat.mtime) {
            let parent = path.parent().unwrap_or(Path::new("")).to_owned();
            found.push((was, path));
            found.push((&tree.nodes[directory], parent));
        }
    }
    Ok(found)
}

/// Those of the directories, as the tree sees them, that are in the area and have another time of change than they had.
pub fn visited<'a>(
    mounted: &Mounted,
    recorded: &'a Tree,
    directories: &[PathBuf],
) -> Result<Vec<(&'a Node, PathBuf)>> {
    let mut found = Vec::new();
    for below in directories
        .iter()
        .filter_map(|path| path.strip_prefix(&mounted.mount_point).ok())
    {
        let mut names = below.iter();
        let Some(node) = names.try_fold(ROOT, |node, name| recorded.at(node, name)) else {
            continue;
        };
        let now = mounted.stat(below);
        let now = now.map_err(mounted.error("look at", below))?;
        let was = &recorded.nodes[node];
        if now.mtime != was.meta.stat.mtime {
            found.push((was, below.to_owned()));
        }
    }
    Ok(found)
}
