//! The files of one tree, across its checkpoints.

mod early;
mod settle;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::unistd::Pid;

use super::Result;
use super::area::{Area, Kind, Options};
use super::capture::{self, lacks_names, recognize};
use super::check::{check, check_uses};
use super::complete::complete;
use super::diff::{Change, changes};
use super::execute::{Put, execute};
use super::image::{AreaImage, Image};
use super::journal::{Journal, Seen};
use super::known::{Inodes, Trust};
use super::meta::Meta;
use super::mounted::Mounted;
use super::plan::{Plan, plan};
use super::store::{Kept, Store};
use super::touched::Touched;
use super::tree::{Content, Node, Tree};
use super::uses::Use;
use super::verify::verify;
use super::walk::{At, Watched, walk_among, walk_changed};
use crate::outcome::Difference;

pub use early::Prepared;

/// The files of a tree: what content is kept, and what is known of live ones.
#[derive(Debug)]
pub struct Files {
    options: Options,
    store: Store,
    known: Vec<Live>,
    /// Where there is no journal of inodes. `None`: nothing is watched (yet).
    journal: Option<Journal>,
    /// `None`: not begun yet, or this kernel can't.
    touched: Option<Touched>,
    tried: bool,
}

/// What is known of the live files of an area.
#[derive(Debug)]
struct Live {
    area: Area,
    inodes: Inodes,
    /// The file system that the journal of inodes tells of.
    device: Option<u64>,
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
    /// Live files that had to be compared to be known: these are what they were, or will be changed.
    recognized: Vec<(Arc<Meta>, Content)>,
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
            journal: None,
            touched: None,
            tried: false,
        }
    }

    /// What is to go back with the next checkpoint.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Changes that; where content is kept stays the same.
    pub fn set_options(&mut self, options: Options) {
        self.store.limit(options.max_bytes);
        self.options = Options {
            store: std::mem::take(&mut self.options.store),
            ..options
        };
    }

    /// Whether something was refused because no more may be kept, since this was asked last.
    pub fn take_lack(&mut self) -> bool {
        self.store.take_lack()
    }

    /// Bytes of content that are kept, for all checkpoints.
    pub fn kept_bytes(&self) -> u64 {
        self.store.used()
    }

    /// Frees content that no checkpoint has: one was released, or refused.
    pub fn forget_unused(&mut self) {
        for live in &mut self.known {
            live.inodes.forget_unused();
        }
    }

    /// Forgets what is known of live files: the tree has ended, and another is to take its place. What checkpoints have is kept; so
    /// is the journal of inodes, by which moments of theirs count.
    pub fn start_again(&mut self) {
        self.known.clear();
        self.journal = None;
    }

    /// Keeps a content for a file of an area that is told by `read`, as far as it is no hole.
    pub(super) fn keep_read(
        &mut self,
        area: &Area,
        mounted: &Mounted,
        size: u64,
        data: Vec<(u64, u64)>,
        read: &mut dyn FnMut(u64, &mut [u8]) -> std::io::Result<()>,
    ) -> Result<Arc<Kept>> {
        let beside = (area.device, mounted.beside.as_path());
        self.store.keep_read(size, data, beside, read)
    }

    /// The moment that this operation ends at.
    fn moment(&self, index: usize) -> Option<u64> {
        self.known[index].device?;
        self.touched.as_ref().map(Touched::next)
    }

    /// All is as it is known: to be called at the end of an operation, before the tree runs.
    pub fn rest(&mut self) {
        if let Some(journal) = &mut self.journal {
            journal.clear();
        }
        let complete = self.touched.as_mut().is_none_or(Touched::rest);
        self.doubt_unless(complete);
    }

    /// Takes what the journal of inodes tells: see [`Touched::take`].
    fn take(&mut self, begins: bool) -> bool {
        let touched = self.touched.as_mut();
        let complete = touched.is_none_or(|touched| touched.take(begins));
        self.doubt_unless(complete);
        complete
    }

    fn doubt_unless(&mut self, complete: bool) {
        if !complete {
            let told = self.known.iter_mut().filter(|live| live.device.is_some());
            told.for_each(|live| live.inodes.doubt());
        }
    }

    /// The place in `known` of an area.
    fn index(&mut self, area: &Area) -> usize {
        let is_it = |live: &Live| live.area == *area;
        if let Some(index) = self.known.iter().position(is_it) {
            return index;
        }
        let trust = match &area.kind {
            Kind::Overlay { upper, .. } => Trust::of_path(upper),
            _ => Trust::of(&area.file_system),
        };
        // Where stores to mappings change no times they would not be told of.
        let device = (trust == Trust::All).then(|| area.superblock()).flatten();
        let touched = self.touched.as_mut();
        let is_told = touched
            .zip(device)
            .is_some_and(|(touched, device)| touched.watch(device));
        self.known.push(Live {
            area: area.clone(),
            inodes: Inodes::new(trust),
            device: device.filter(|_| is_told),
        });
        self.known.len() - 1
    }

    /// Opens the areas of a checkpoint; the tree may run meanwhile.
    ///
    /// # Errors
    ///
    /// Refused if a mount is not the one that was there.
    pub fn open(&self, root: Pid, image: &Image) -> Result<Mounts> {
        let areas = image.areas.iter();
        let open = |area: &AreaImage| {
            // Before the stop.
            area.index();
            Mounted::open(root, &area.area)
        };
        let mounts: Result<_> = areas.map(open).collect();
        Ok(Mounts(mounts?))
    }

    /// Looks at the files of a stopped tree and plans. Nothing is touched. `uses` are those at the checkpoint.
    ///
    /// # Errors
    ///
    /// Refused if what has changed can't be changed back.
    pub fn plan(&mut self, mounts: &Mounts, image: &Image, uses: &[Use]) -> Result<Plans> {
        let mut plans = Vec::new();
        self.take(true);
        for (area, mounted) in image.areas.iter().zip(&mounts.0) {
            let (mut wanted, mut live) = self.changed(mounted, area)?;
            let index = self.index(&area.area);
            let known = &self.known[index].inodes;
            let is_news = |node: &&Node| {
                !matches!(node.content, Content::Unknown)
                    && known.find(&node.meta.stat, true).1 != node.content
            };
            let recognized = live.nodes.iter().filter(is_news);
            let recognized = recognized.map(|node| (Arc::clone(&node.meta), node.content.clone()));
            let recognized = recognized.collect();
            complete(mounted, &mut wanted, &mut live)?;
            let plan = plan(&wanted, &live);
            check(mounted, &wanted, &live, &plan)?;
            check_uses(mounted, &area.area, &wanted, &plan, uses)?;
            let nameless: std::io::Result<_> = area.nameless.iter().map(capture::differs).collect();
            plans.push(AreaPlan {
                nameless: nameless.map_err(mounted.error("compare", Path::new("(deleted)")))?,
                wanted,
                plan,
                recognized,
            });
        }
        Ok(Plans(plans))
    }

    /// Recorded and live tree without what is the same in both.
    fn changed(&mut self, mounted: &Mounted, area: &AreaImage) -> Result<(Tree, Tree)> {
        let index = self.index(&area.area);
        let live = &self.known[index];
        let known = &live.inodes;
        let mut recognize = |at: At<'_>, node: &mut Node| recognize(mounted, known, at, node);
        if let Some((touched, device)) = self.touched.as_mut().zip(live.device) {
            let among = area.moment.and_then(|moment| touched.since(device, moment));
            if let Some(mut among) = among {
                among.extend(known.exposed());
                let watched = told(touched, device);
                let recorded = (&area.tree, area.index());
                let found = walk_among(mounted, known, watched, &mut recognize, recorded, &among)?;
                if !lacks_names([&found.0, &found.1], area.index(), &among) {
                    return Ok(found);
                }
            }
            let watched = told(touched, device);
            return walk_changed(mounted, known, watched, &mut recognize, &area.tree);
        }
        let seen = seen(&mut self.journal);
        let watched = watched(&mut self.journal, &seen);
        walk_changed(mounted, known, watched, &mut recognize, &area.tree)
    }

    /// What has become of the files of a stopped tree; in the order of paths. Nothing is touched.
    ///
    /// # Errors
    ///
    /// They can't be looked at.
    pub fn diff(&self, mounts: &Mounts, image: &Image) -> Result<Vec<Change>> {
        let nothing = Inodes::default();
        let mut found = Vec::new();
        for (area, mounted) in image.areas.iter().zip(&mounts.0) {
            let known = self.known.iter().find(|live| live.area == area.area);
            let known = known.map_or(&nothing, |live| &live.inodes);
            // Without the journal: only checkpoints and rollbacks take from that.
            let mut recognize = |at: At<'_>, node: &mut Node| recognize(mounted, known, at, node);
            let changed = walk_changed(mounted, known, Watched::Not, &mut recognize, &area.tree);
            let (mut wanted, mut live) = changed?;
            complete(mounted, &mut wanted, &mut live)?;
            found.extend(changes(&area.area.mount_point, &wanted, &live));
        }
        found.sort();
        Ok(found)
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
        image: &Image,
        plans: &Plans,
        uses: &[Use],
    ) -> Result<Vec<Moved>> {
        let mut found = Vec::new();
        let areas = image.areas.iter().zip(&mounts.0).zip(&plans.0);
        for ((area, mounted), todo) in areas {
            for node in &todo.plan.made {
                let wanted = &todo.wanted.nodes[*node];
                let (Some(using), Some(path)) = (
                    uses.iter().find(|using| using.is_of(&area.area, wanted)),
                    todo.plan.after.get(node),
                ) else {
                    continue;
                };
                let now = mounted.stat(path).map_err(mounted.error("look at", path))?;
                let seen = mounted.path(path);
                let below = seen.strip_prefix("/").unwrap_or(&seen);
                found.push(Moved {
                    was: (using.device, using.ino),
                    is: now.shown,
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

/// What has happened until now.
fn seen(journal: &mut Option<Journal>) -> Seen {
    match journal {
        Some(journal) => {
            journal.take();
            journal.changes()
        }
        None => Seen::default(),
    }
}

fn told(touched: &mut Touched, device: u64) -> Watched<'_> {
    Watched::Inodes {
        touched,
        device,
        running: false,
    }
}

fn watched<'a>(journal: &'a mut Option<Journal>, seen: &'a Seen) -> Watched<'a> {
    match journal {
        Some(journal) => Watched::Stopped(journal, seen),
        None => Watched::Not,
    }
}

/// A file that was made again while descriptors were open on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// Device and number of the recorded inode, as the mount shows them.
    pub was: (u64, u64),
    /// Those of the new one.
    pub is: (u64, u64),
    /// A path that leads to it through the tree's own mounts.
    pub path: PathBuf,
}

#[cfg(test)]
pub(super) mod tests_only;
