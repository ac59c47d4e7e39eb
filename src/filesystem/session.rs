//! The files of one tree, across its checkpoints.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::unistd::Pid;

use super::area::{Area, Found, Kind, Options};
use super::areas::discover;
use super::capture::{self, capture, recognize};
use super::complete::complete;
use super::execute::{Put, execute, set_times};
use super::image::{AreaImage, Image};
use super::known::{Inodes, Trust};
use super::meta::{APPEND, IMMUTABLE, Identity, Meta, stat};
use super::mounted::{Mounted, descend, file_error, split};
use super::plan::{Plan, plan};
use super::store::Store;
use super::tree::{Content, NodeId, ROOT, Tree};
use super::uses::{How, Use};
use super::verify::verify;
use super::walk::walk;
use super::{Error, Result};
use crate::outcome::{Difference, Refusal};

/// The files of a tree: what content is kept, and what is known of live ones.
#[derive(Debug)]
pub struct Files {
    options: Options,
    store: Store,
    known: Vec<(Area, Inodes)>,
}

/// The areas of a tree, open for a checkpoint.
#[derive(Debug)]
pub struct Prepared {
    found: Found,
    mounts: Vec<Mounted>,
}

/// The areas of a checkpoint, open for a rollback.
#[derive(Debug)]
pub struct Mounts(Vec<Mounted>);

/// What a rollback has to do with files.
#[derive(Debug)]
pub struct Plans(Vec<AreaPlan>);

#[derive(Debug)]
struct AreaPlan {
    wanted: Tree,
    plan: Plan,
    /// Of the files without a name: whether their content has changed.
    nameless: Vec<bool>,
}

impl Files {
    /// Those of a tree of which nothing is known yet.
    pub fn new(options: Options) -> Self {
        Self {
            store: Store::new(options.store.clone(), options.max_bytes),
            options,
            known: Vec::new(),
        }
    }

    /// Bytes of content that are kept, for all checkpoints.
    pub fn kept_bytes(&self) -> u64 {
        self.store.used()
    }

    /// Bytes of content that is known to be live.
    #[cfg(test)]
    pub(super) fn known_bytes(&self) -> u64 {
        self.known.iter().map(|(_, known)| known.kept_bytes()).sum()
    }

    /// Finds and opens what belongs to a tree, which may run meanwhile. `root` is its root.
    ///
    /// # Errors
    ///
    /// Refused if something can't be taken, naming it.
    pub fn prepare(&mut self, root: Pid) -> Result<Prepared> {
        let found = match self.options.include {
            true => discover(root, &self.options)?,
            false => Found::default(),
        };
        Self::open_found(root, found)
    }

    fn open_found(root: Pid, found: Found) -> Result<Prepared> {
        let areas = found.areas.iter().filter(|area| !area.read_only);
        let mounts: Result<Vec<_>> = areas.map(|area| Mounted::open(root, area)).collect();
        Ok(Prepared {
            mounts: mounts?,
            found,
        })
    }

    /// Records the files of a stopped tree.
    ///
    /// # Errors
    ///
    /// Refused if there is no room.
    pub fn capture(&mut self, prepared: Prepared, uses: &[Use]) -> Result<Image> {
        let mut image = Image {
            areas: Vec::new(),
            left_out: prepared.found.left_out,
        };
        let areas = prepared.found.areas.into_iter();
        let areas = areas.filter(|area| !area.read_only).zip(&prepared.mounts);
        for (area, mounted) in areas {
            let index = self.index(&area);
            let known = &mut self.known[index].1;
            let captured = capture(mounted, area, known, &mut self.store, uses)?;
            image.areas.push(captured);
        }
        Ok(image)
    }

    /// The place in `known` of an area.
    fn index(&mut self, area: &Area) -> usize {
        let is_it = |(other, _): &(Area, Inodes)| other == area;
        if let Some(index) = self.known.iter().position(is_it) {
            return index;
        }
        let trust = match &area.kind {
            Kind::Overlay { upper, .. } => Trust::of_path(upper),
            _ => Trust::of(&area.file_system),
        };
        self.known.push((area.clone(), Inodes::new(trust)));
        self.known.len() - 1
    }

    /// Opens the areas of a checkpoint; the tree may run meanwhile.
    ///
    /// # Errors
    ///
    /// Refused if a mount is not the one that was there.
    pub fn open(&self, root: Pid, image: &Image) -> Result<Mounts> {
        let areas = image.areas.iter();
        let mounts: Result<_> = areas.map(|area| Mounted::open(root, &area.area)).collect();
        Ok(Mounts(mounts?))
    }

    /// Looks at the files of a stopped tree and plans. Nothing is touched. `uses` are those at the checkpoint.
    ///
    /// # Errors
    ///
    /// Refused if what has changed can't be changed back.
    pub fn plan(&mut self, mounts: &Mounts, image: &Image, uses: &[Use]) -> Result<Plans> {
        let mut plans = Vec::new();
        for (area, mounted) in image.areas.iter().zip(&mounts.0) {
            let index = self.index(&area.area);
            let known = &self.known[index].1;
            let mut live = walk(mounted, known, &mut |directory, name, node| {
                recognize(mounted, known, directory, name, node)
            })?;
            let mut wanted = area.tree.clone();
            complete(mounted, &mut wanted, &mut live)?;
            let plan = plan(&wanted, &live);
            check(mounted, &wanted, &live, &plan)?;
            check_uses(mounted, &wanted, &plan, uses)?;
            let nameless: std::io::Result<_> = area.nameless.iter().map(capture::differs).collect();
            plans.push(AreaPlan {
                nameless: nameless.map_err(mounted.error("compare", Path::new("(deleted)")))?,
                wanted,
                plan,
            });
        }
        Ok(Plans(plans))
    }

    /// Files that have been made again and were open at the checkpoint. `root` is a process that sees them.
    ///
    /// # Errors
    ///
    /// They are not where they were made; the tree must be killed.
    pub fn moved(
        &self,
        root: Pid,
        mounts: &Mounts,
        plans: &Plans,
        uses: &[Use],
    ) -> Result<Vec<Moved>> {
        let mut found = Vec::new();
        for (mounted, todo) in mounts.0.iter().zip(&plans.0) {
            let device = todo.wanted.nodes[ROOT].meta.stat.device;
            for (node, path) in &todo.plan.after {
                let was = todo.wanted.nodes[*node].meta.stat.ino;
                let is_it = |using: &Use| using.device == device && using.ino == was;
                if !todo.plan.made.contains(node) || !uses.iter().any(is_it) {
                    continue;
                }
                let (parent, name) = split(path);
                let now = descend(mounted.root.as_fd(), parent)
                    .and_then(|directory| stat(directory.as_fd(), name))
                    .map_err(mounted.error("look at", path))?;
                let seen = mounted.path(path);
                let below = seen.strip_prefix("/").unwrap_or(&seen);
                found.push(Moved {
                    device,
                    was,
                    is: now.ino,
                    path: PathBuf::from(format!("/proc/{root}/root")).join(below),
                });
            }
        }
        Ok(found)
    }

    /// Makes the changes. After an error the tree must be killed.
    ///
    /// # Errors
    ///
    /// Those of the kernel.
    pub fn execute(&mut self, mounts: &Mounts, image: &Image, plans: &Plans) -> Result<Put> {
        let mut put = Put::default();
        for ((area, mounted), todo) in image.areas.iter().zip(&mounts.0).zip(&plans.0) {
            put.add(execute(mounted, &todo.wanted, &todo.plan)?);
            for (file, _) in area
                .nameless
                .iter()
                .zip(&todo.nameless)
                .filter(|(_, is)| **is)
            {
                let bytes = file.put_back();
                put.bytes += bytes.map_err(mounted.error("rewrite", Path::new("(deleted)")))?;
                put.changes += 1;
            }
        }
        Ok(put)
    }

    /// After all else went back: times that this has changed, and what is known now. `to` is the checkpoint among `images`.
    ///
    /// # Errors
    ///
    /// Those of the kernel; the tree must be killed.
    pub fn settle(
        &mut self,
        mounts: &Mounts,
        images: &mut [&mut Image],
        to: usize,
        plans: &Plans,
        uses: &[Use],
    ) -> Result<()> {
        for (number, (mounted, todo)) in mounts.0.iter().zip(&plans.0).enumerate() {
            let area = images[to].areas[number].area.clone();
            let index = self.index(&area);
            let mut after = todo.plan.after.clone();
            let rebound = rebound(mounted, &todo.wanted, uses)?;
            // The deepest first: what is done to a name changes the times of its directory only.
            for (node, path) in &rebound {
                let (parent, name) = split(path);
                let directory = descend(mounted.root.as_fd(), parent);
                directory
                    .and_then(|directory| {
                        let name = if name.is_empty() {
                            OsStr::new(".")
                        } else {
                            name
                        };
                        set_times(directory.as_fd(), name, &todo.wanted.nodes[*node].meta)
                    })
                    .map_err(mounted.error("set times of", path))?;
                after.insert(*node, path.clone());
            }
            let mut changed = HashMap::new();
            for (node, path) in after {
                let (parent, name) = split(&path);
                let now = descend(mounted.root.as_fd(), parent)
                    .and_then(|directory| stat(directory.as_fd(), name))
                    .map_err(mounted.error("look at", &path))?;
                let was = &todo.wanted.nodes[node];
                let is_mapped =
                    |using: &&Use| using.how == How::Mapped && using.ino == was.meta.stat.ino;
                let is_mapped = uses.iter().any(|using| is_mapped(&using));
                let meta = Arc::new(Meta {
                    stat: now,
                    ..Meta::clone(&was.meta)
                });
                if was.meta.stat.identity() != meta.stat.identity() && !was.of_lower {
                    changed.insert(was.meta.stat.identity(), meta.stat.identity());
                }
                let known = &mut self.known[index].1;
                known.learn(meta, was.content.clone(), is_mapped);
            }
            for image in images.iter_mut() {
                let of_area = image.areas.iter_mut().filter(|other| other.area == area);
                of_area.for_each(|other| other.renumber(&changed));
            }
        }
        Ok(())
    }

    /// Compares all files with a checkpoint.
    ///
    /// # Errors
    ///
    /// They can't be read.
    pub fn verify(&self, mounts: &Mounts, image: &Image) -> Result<Vec<Difference>> {
        let mut found = Vec::new();
        for (area, mounted) in image.areas.iter().zip(&mounts.0) {
            found.extend(verify(mounted, area)?);
        }
        Ok(found)
    }
}

impl Prepared {
    /// Whether no files are to be recorded.
    pub fn is_empty(&self) -> bool {
        self.mounts.is_empty()
    }
}

impl AreaImage {
    /// Learns what inodes are called that were made again: before and now.
    fn renumber(&mut self, changed: &HashMap<Identity, Identity>) {
        if changed.is_empty() {
            return;
        }
        for node in &mut self.tree.nodes {
            if let Some(new) = changed.get(&node.meta.stat.identity()) {
                let mut meta = Meta::clone(&node.meta);
                (meta.stat.ino, meta.stat.born) = *new;
                node.meta = Arc::new(meta);
            }
        }
    }
}

/// Sockets, FIFOs and mapped files that other parts of the rollback have made again or written to, and their directories.
fn rebound(mounted: &Mounted, wanted: &Tree, uses: &[Use]) -> Result<Vec<(NodeId, PathBuf)>> {
    let mut special = Vec::new();
    wanted.walk(|directory, path, node| {
        let stat = &wanted.nodes[node].meta.stat;
        let is_mapped = || {
            uses.iter()
                .any(|using| using.how == How::Mapped && using.ino == stat.ino)
        };
        if matches!(stat.file_type(), libc::S_IFSOCK | libc::S_IFIFO) || is_mapped() {
            special.push((directory, path.to_owned(), node));
        }
    });
    let mut found = Vec::new();
    for (directory, path, node) in special {
        let (parent, name) = split(&path);
        let now = descend(mounted.root.as_fd(), parent)
            .and_then(|directory| stat(directory.as_fd(), name))
            .map_err(mounted.error("look at", &path))?;
        let was = &wanted.nodes[node].meta.stat;
        if (now.ino, now.mtime) != (was.ino, was.mtime) {
            let parent = parent.to_owned();
            found.push((node, path));
            found.push((directory, parent));
        }
    }
    Ok(found)
}

/// Refuses what the kernel would refuse half-way: changes of what is immutable, and more content than there is room for.
fn check(mounted: &Mounted, wanted: &Tree, live: &Tree, plan: &Plan) -> Result<()> {
    for (node, path) in &plan.touched {
        if live.nodes[*node].meta.stat.attributes & (IMMUTABLE | APPEND) != 0 {
            return Err(Error::Refused(Refusal {
                object: format!("the file {}", mounted.path(path).display()),
                holder: format!("the mount at {}", mounted.mount_point.display()),
                remedy: "it is immutable or append-only and can't be changed back; remove that with chattr -ia".into(),
            }));
        }
    }
    let size = |node: NodeId| match &wanted.nodes[node].content {
        Content::Kept(kept) => kept.bytes(),
        Content::Lower(_) => wanted.nodes[node].meta.stat.size,
        Content::Unknown => 0,
    };
    let made: u64 = plan.made.iter().map(|node| size(*node)).sum();
    let room = rustix::fs::fstatvfs(&mounted.root)
        .map_err(|errno| file_error("statfs of", &mounted.mount_point)(errno.into()))?;
    let room = room.f_bfree * room.f_frsize;
    if made > room {
        return Err(Error::Refused(Refusal {
            object: format!("{made} bytes of files to be made again"),
            holder: format!("the mount at {}", mounted.mount_point.display()),
            remedy: format!("only {room} are free there; remove something"),
        }));
    }
    Ok(())
}

/// A file that was made again while descriptors were open on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// Device of both inodes.
    pub device: u64,
    /// The number of the recorded inode.
    pub was: u64,
    /// That of the new one.
    pub is: u64,
    /// A path that leads to it through the tree's own mounts.
    pub path: PathBuf,
}

/// Refuses if what is in use has to be made again, unless by descriptors, which can be opened again.
fn check_uses(mounted: &Mounted, wanted: &Tree, plan: &Plan, uses: &[Use]) -> Result<()> {
    let device = wanted.nodes[ROOT].meta.stat.device;
    for node in &plan.made {
        let stat = &wanted.nodes[*node].meta.stat;
        let is_it = |using: &&Use| {
            using.device == device && using.ino == stat.ino && using.how != How::Open
        };
        if stat.file_type() == libc::S_IFSOCK {
            continue;
        }
        if let Some(using) = uses.iter().find(is_it) {
            let path = plan.after.get(node).map_or(Path::new(""), PathBuf::as_path);
            return Err(Error::Refused(Refusal {
                object: format!("{}: {}", using.what, mounted.path(path).display()),
                holder: using.holder.clone(),
                remedy: "the file was deleted since the checkpoint while it was in use and would be another; keep the program from replacing it".into(),
            }));
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests_only {
    use super::*;

    /// Opens areas that were not discovered.
    pub(crate) fn files_of(root: Pid, found: Found) -> Result<Prepared> {
        Files::open_found(root, found)
    }
}
