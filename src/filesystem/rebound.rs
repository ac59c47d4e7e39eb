//! Files that other parts of a rollback have changed after the files went back.

use std::collections::HashSet;
use std::path::PathBuf;

use super::Result;
use super::mounted::Mounted;
use super::tree::{Node, ROOT, Tree};

/// Sockets, FIFOs and exposed files that other parts of the rollback have made again or written to, and their directories.
pub fn rebound<'a>(
    mounted: &Mounted,
    recorded: &'a Tree,
    exposed: &HashSet<u64>,
) -> Result<Vec<(&'a Node, PathBuf)>> {
    let is_rebound = |node: &Node| {
        let stat = &node.meta.stat;
        matches!(stat.file_type(), libc::S_IFSOCK | libc::S_IFIFO) || exposed.contains(&stat.ino)
    };
    let mut found = Vec::new();
    if !recorded.nodes.iter().any(is_rebound) {
        return Ok(found);
    }
    let mut pending = vec![(ROOT, PathBuf::new())];
    while let Some((directory, parent)) = pending.pop() {
        for (name, &node) in &recorded.nodes[directory].entries {
            let was = &recorded.nodes[node];
            if was.meta.stat.is_directory() {
                pending.push((node, parent.join(name)));
            } else if is_rebound(was) {
                let path = parent.join(name);
                let now = mounted.stat(&path);
                let now = now.map_err(mounted.error("look at", &path))?;
                if (now.ino, now.mtime) != (was.meta.stat.ino, was.meta.stat.mtime) {
                    found.push((was, path));
                    found.push((&recorded.nodes[directory], parent.clone()));
                }
            }
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
