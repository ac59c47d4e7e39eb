//! The oracle: all of an area compared with what was recorded, trusting nothing that is known.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::Result;
use super::complete::complete;
use super::content::{Source, first_difference};
use super::execute::Wanted;
use super::image::AreaImage;
use super::known::Inodes;
use super::meta::Meta;
use super::mounted::{Mounted, descend, open_file, split};
use super::tree::{Node, NodeId, ROOT, Tree};
use super::walk::walk;
use crate::outcome::Difference;

/// Compares an area with its image.
pub fn verify(mounted: &Mounted, image: &AreaImage) -> Result<Vec<Difference>> {
    let mut live = walk(mounted, &Inodes::default(), &mut |_, _, _| Ok(()))?;
    let mut wanted = image.tree.clone();
    complete(mounted, &mut wanted, &mut live)?;
    let mut verifier = Verifier {
        mounted,
        wanted: &wanted,
        live: &live,
        same: HashMap::new(),
        found: Vec::new(),
    };
    verifier.node(ROOT, ROOT, Path::new(""))?;
    verifier.directory(ROOT, ROOT, Path::new(""))?;
    for file in &image.nameless {
        let link = PathBuf::from(format!("/proc/self/fd/{}", file.pin.as_raw_fd()));
        let open = File::open(&link).map_err(mounted.error("open", Path::new("(deleted)")))?;
        let differs = first_difference(&open, Source::Kept(&file.content))
            .map_err(mounted.error("compare", Path::new("(deleted)")))?;
        if let Some(at) = differs {
            verifier.found.push(Difference {
                what: format!("the deleted file of {}", file.holder),
                expected: "its content".into(),
                found: format!("another from byte {at}"),
            });
        }
    }
    Ok(verifier.found)
}

struct Verifier<'a> {
    mounted: &'a Mounted,
    wanted: &'a Tree,
    live: &'a Tree,
    /// The live node of each recorded one that was met.
    same: HashMap<NodeId, NodeId>,
    found: Vec<Difference>,
}

impl Verifier<'_> {
    fn differs(&mut self, path: &Path, what: &str, expected: String, found: String) {
        let path = self.mounted.path(path);
        self.found.push(Difference {
            what: format!("file {}: {what}", path.display()),
            expected,
            found,
        });
    }

    fn directory(&mut self, wanted: NodeId, live: NodeId, path: &Path) -> Result<()> {
        let (was, is) = (&self.wanted.nodes[wanted], &self.live.nodes[live]);
        for name in is
            .entries
            .keys()
            .filter(|name| !was.entries.contains_key(*name))
        {
            self.differs(&path.join(name), "name", "nothing".into(), "a file".into());
        }
        for (name, &node) in &was.entries {
            let path = path.join(name);
            let Some(&found) = is.entries.get(name) else {
                self.differs(&path, "name", "a file".into(), "nothing".into());
                continue;
            };
            match self.same.insert(node, found) {
                // Names of one file in the lower layers are several when they were copied up.
                Some(other) if other != found && !self.wanted.nodes[node].of_lower => {
                    let same = "the inode of its other names";
                    self.differs(&path, "inode", same.into(), "another".into());
                }
                Some(_) => {}
                None => self.node(node, found, &path)?,
            }
            let directories = [&self.wanted.nodes[node], &self.live.nodes[found]];
            if directories.iter().all(|node| node.meta.stat.is_directory()) {
                self.directory(node, found, &path)?;
            }
        }
        Ok(())
    }

    fn node(&mut self, wanted: NodeId, live: NodeId, path: &Path) -> Result<()> {
        let (was, is) = (&self.wanted.nodes[wanted], &self.live.nodes[live]);
        for (what, expected, found) in meta(&was.meta, &is.meta) {
            self.differs(path, what, expected, found);
        }
        if was.meta.stat.is_file() && is.meta.stat.is_file() {
            self.content(was, path)?;
        }
        Ok(())
    }

    fn content(&mut self, was: &Node, path: &Path) -> Result<()> {
        let differs = (|| {
            let content = Wanted::open(self.mounted, was)?;
            let (parent, name) = split(path);
            let directory = descend(self.mounted.root.as_fd(), parent)?;
            let live = open_file(directory.as_fd(), name, OFlags::RDONLY)?;
            first_difference(&live, content.source())
        })()
        .map_err(self.mounted.error("compare", path))?;
        if let Some(at) = differs {
            let found = format!("another from byte {at}");
            self.differs(path, "content", "as recorded".into(), found);
        }
        Ok(())
    }
}

/// What differs. Not looked at: inode number, link count (which the names tell), time of change, and time of access, which goes
/// back only where something else does.
fn meta(was: &Meta, is: &Meta) -> Vec<(&'static str, String, String)> {
    let mut found = Vec::new();
    let mut check = |what, expected: String, now: String| {
        if expected != now {
            found.push((what, expected, now));
        }
    };
    let (old, new) = (&was.stat, &is.stat);
    check("mode", format!("{:o}", old.mode), format!("{:o}", new.mode));
    let owner = |uid, gid| format!("{uid}:{gid}");
    check("owner", owner(old.uid, old.gid), owner(new.uid, new.gid));
    check("device number", old.rdev.to_string(), new.rdev.to_string());
    let time = |time| format!("{time:?}");
    check("time of change", time(old.mtime), time(new.mtime));
    let attributes = |meta: &Meta| format!("{:?}", meta.xattrs);
    check("extended attributes", attributes(was), attributes(is));
    let target = |meta: &Meta| String::from_utf8_lossy(&meta.target).into_owned();
    check("link", target(was), target(is));
    found
}
