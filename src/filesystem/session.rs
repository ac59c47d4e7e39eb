//! The files of one tree, across its checkpoints.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use super::area::{Area, Found, Kind, LeftOut, Options};
use super::areas::discover;
use super::capture::{
    self, Base, capture, capture_among, keep_early, keep_early_among, lacks_names, measure,
    recognize,
};
use super::check::{check, check_uses};
use super::complete::complete;
use super::diff::{Change, changes};
use super::execute::{Put, execute, set_times};
use super::image::{AreaImage, Image};
use super::journal::{Journal, Seen};
use super::known::{Inodes, Read, Trust};
use super::mapped::mapped;
use super::meta::{Meta, Time};
use super::mounted::{Mounted, descend, split};
use super::plan::{Plan, plan};
use super::rebound::{rebound, visited};
use super::store::{Kept, Store};
use super::touched::Touched;
use super::tree::{Content, Node, Tree};
use super::uses::{Use, exposed, shown};
use super::verify::verify;
use super::walk::{At, Watched, walk_among, walk_changed};
use super::{Error, Result};
use crate::outcome::Difference;

/// A pass that takes no longer leaves little to be done in the stop.
const SHORT: Duration = Duration::from_millis(20);
/// No more than that, in bytes, is left to the stop.
const LITTLE: u64 = 4 << 20;
/// The same in files.
const FEW: usize = 500;

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

/// The areas of a tree, open for a checkpoint.
#[derive(Debug)]
pub struct Prepared {
    areas: Vec<(Area, Mounted, Option<Base>)>,
    left_out: Vec<LeftOut>,
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

    /// Finds and opens what belongs to a tree, which may run meanwhile. `root` is its root, `others` what other checkpoints have.
    ///
    /// # Errors
    ///
    /// Refused if something can't be taken, naming it.
    pub fn prepare<'a>(
        &mut self,
        root: Pid,
        others: impl Iterator<Item = &'a Image> + Clone,
    ) -> Result<Prepared> {
        let found = match self.options.include {
            true => discover(root, &self.options)?,
            false => Found::default(),
        };
        let prepared = Self::open_found(root, found)?;
        self.begin(prepared, others)
    }

    /// Watches what is prepared, and finds out what is known of it.
    fn begin<'a>(
        &mut self,
        mut prepared: Prepared,
        others: impl Iterator<Item = &'a Image> + Clone,
    ) -> Result<Prepared> {
        if prepared.is_empty() {
            return Ok(prepared);
        }
        if !std::mem::replace(&mut self.tried, true) {
            let started = Touched::start();
            let started = started.inspect_err(|error| {
                tracing::info!(%error, "changes of files are told by inotify");
            });
            self.touched = started.ok();
        }
        let told = prepared.areas.iter();
        let told = told.map(|(area, ..)| self.index(area));
        let told: Vec<usize> = told.collect();
        if self.journal.is_none() && told.iter().any(|live| self.known[*live].device.is_none()) {
            match Journal::start() {
                Ok(journal) => self.journal = Some(journal),
                Err(error) => tracing::warn!(%error, "changes of files are not watched"),
            }
        }
        self.take(true);
        for ((area, _, base), live) in prepared.areas.iter_mut().zip(told) {
            let live = &mut self.known[live];
            let images = others.clone().flat_map(|image| &image.areas);
            let images = images.filter(|image| image.area == *area);
            let Some(touched) = &self.touched else {
                continue;
            };
            let latest = images.max_by_key(|image| image.moment);
            let usable = latest.filter(|image| {
                let told = live.device.zip(image.moment);
                told.is_some_and(|(device, moment)| touched.since(device, moment).is_some())
            });
            *base = usable.map(|image| Base::of(&image.tree, image.moment));
            if let Some(base) = base
                && live.inodes.len() > 2 * base.tree.nodes.len() + 1000
            {
                let numbers = base.tree.nodes.iter().map(|node| node.meta.stat.ino);
                live.inodes.keep_only(&numbers.collect());
            }
        }
        Ok(prepared)
    }

    /// Whether so much has changed that it should be kept before the stop.
    ///
    /// # Errors
    ///
    /// It can't be looked at.
    pub fn is_much(&mut self, prepared: &Prepared) -> Result<bool> {
        let (mut bytes, mut files) = (0u64, 0usize);
        for (area, mounted, base) in &prepared.areas {
            let live = self.index(area);
            let live = &self.known[live];
            let (of_area, number) = match (base, &self.touched, live.device) {
                (Some(base), Some(touched), Some(device)) => {
                    measure(mounted, &live.inodes, base, (touched, device))?
                }
                _ => return Ok(true),
            };
            bytes = bytes.saturating_add(of_area);
            files = files.saturating_add(number);
        }
        Ok(bytes > LITTLE || files > FEW)
    }

    /// Keeps content while the tree runs, so that little is left to be done in the stop. All calls that were under way in the tree
    /// when this or [`Self::prepare`] was called last have ended. True: that took long, and should be done again.
    ///
    /// # Errors
    ///
    /// Refused if there is no room.
    pub fn keep_early(&mut self, root: Pid, prepared: &mut Prepared) -> Result<bool> {
        if prepared.is_empty() {
            return Ok(false);
        }
        let started = Instant::now();
        let since = clock(ClockId::CLOCK_REALTIME_COARSE)?;
        let mapped = mapped(root);
        for (area, mounted, base) in &mut prepared.areas {
            let index = self.index(area);
            let live = &mut self.known[index];
            let (store, early) = (&mut self.store, (since, &mapped));
            let known = &mut live.inodes;
            match (live.device, &mut self.touched, &mut self.journal) {
                (Some(device), Some(touched), _) => {
                    let told = (touched, device);
                    let found = base.take();
                    *base = Some(keep_early_among(
                        mounted, area, known, store, found, told, early,
                    )?);
                }
                // What is read elsewhere is opened, which the journal takes for a change.
                (_, _, Some(journal)) if known.trust() == Trust::All => {
                    keep_early(mounted, area.device, known, store, journal, early)?;
                }
                _ => {}
            }
        }
        if !self.take(false) {
            prepared.forget();
        }
        Ok(started.elapsed() >= SHORT)
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

    fn open_found(root: Pid, found: Found) -> Result<Prepared> {
        let areas = found.areas.into_iter().filter(|area| !area.read_only);
        let opened: Result<_> = areas
            .map(|area| Ok((area.clone(), Mounted::open(root, &area)?, None)))
            .collect();
        Ok(Prepared {
            areas: opened?,
            left_out: found.left_out,
        })
    }

    /// Records the files of a stopped tree.
    ///
    /// # Errors
    ///
    /// Refused if there is no room.
    pub fn capture(&mut self, mut prepared: Prepared, uses: &[Use]) -> Result<Image> {
        let mut image = Image {
            areas: Vec::new(),
            left_out: std::mem::take(&mut prepared.left_out),
        };
        if !self.take(false) {
            prepared.forget();
        }
        for (area, mounted, base) in prepared.areas {
            let index = self.index(&area);
            let live = &mut self.known[index];
            let (known, store) = (&mut live.inodes, &mut self.store);
            let mut told = self.touched.as_mut().zip(live.device);
            let among = match (base, &mut told) {
                (Some(base), Some((touched, device))) => {
                    let told = (&mut **touched, *device);
                    capture_among(&mounted, &area, known, store, base, told, uses)?
                }
                _ => None,
            };
            let seen = seen(&mut self.journal);
            let mut captured = match (among, told) {
                (Some(captured), _) => captured,
                (None, Some((touched, device))) => {
                    let watched = self::told(touched, device);
                    capture(&mounted, area, known, store, watched, uses)?
                }
                (None, None) => {
                    let watched = watched(&mut self.journal, &seen);
                    capture(&mounted, area, known, store, watched, uses)?
                }
            };
            captured.moment = self.moment(index);
            image.areas.push(captured);
        }
        self.rest();
        Ok(image)
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

    /// After all else went back: times that this has changed, and what is known now. `to` is the checkpoint among `images`;
    /// `directories` those, as the tree sees them, in which names may have come and gone.
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
        directories: &[PathBuf],
    ) -> Result<()> {
        for (number, (mounted, todo)) in mounts.0.iter().zip(&plans.0).enumerate() {
            let area = images[to].areas[number].area.clone();
            let index = self.index(&area);
            let recorded = &images[to].areas[number];
            let trust = self.known[index].inodes.trust();
            // What is as it was is in the recorded tree only, what is of lower layers in the wanted one.
            let nodes = shown(&todo.wanted.nodes);
            let find = |number| {
                let old = recorded.index().shown(number);
                let old = old.map(|node| &recorded.tree.nodes[node]);
                old.chain(nodes.get(&number).into_iter().flatten().copied())
            };
            let exposed = exposed(uses, &area, trust, find);
            let read = |ino: u64| match exposed.contains(&ino) {
                true => Read::Exposed,
                false => Read::Stopped,
            };
            let known = &mut self.known[index].inodes;
            for (meta, content) in &todo.recognized {
                let (meta, ino) = (Arc::clone(meta), meta.stat.ino);
                known.learn(meta, content.clone(), read(ino));
            }
            exposed.iter().for_each(|ino| known.expose(*ino));
            let mut rebound = rebound(mounted, recorded, &exposed)?;
            rebound.extend(visited(mounted, &recorded.tree, directories)?);
            let after = todo.plan.after.iter();
            let after = after.map(|(node, path)| (&todo.wanted.nodes[*node], path.clone()));
            let mut after: Vec<(&Node, PathBuf)> = after.collect();
            // The deepest first: what is done to a name changes the times of its directory only.
            for (node, path) in rebound {
                let (parent, name) = split(&path);
                let directory = descend(mounted.root.as_fd(), parent);
                directory
                    .and_then(|directory| {
                        let name = if name.is_empty() {
                            OsStr::new(".")
                        } else {
                            name
                        };
                        set_times(directory.as_fd(), name, &node.meta)
                    })
                    .map_err(mounted.error("set times of", &path))?;
                after.push((node, path));
            }
            self.take(false);
            let mut changed = HashMap::new();
            for (was, path) in after {
                let now = mounted
                    .stat(&path)
                    .map_err(mounted.error("look at", &path))?;
                let meta = Arc::new(Meta {
                    stat: now,
                    ..Meta::clone(&was.meta)
                });
                if was.meta.stat.identity() != meta.stat.identity() && !was.of_lower {
                    changed.insert(was.meta.stat.identity(), meta.stat.clone());
                }
                let read = match exposed.contains(&was.meta.stat.ino) {
                    true => Read::Exposed,
                    false => read(meta.stat.ino),
                };
                let live = &mut self.known[index];
                if let Some((touched, device)) = self.touched.as_mut().zip(live.device) {
                    touched.looked_at(device, meta.stat.ino);
                }
                live.inodes.learn(meta, was.content.clone(), read);
            }
            let device = self.known[index].device;
            if let Some((touched, device)) = self.touched.as_mut().zip(device) {
                // What has been copied up stays, and is not among what was recorded.
                for directory in holding_lower(&todo.wanted) {
                    touched.again(device, directory);
                }
            }
            images[to].areas[number].moment = self.moment(index);
            for image in images.iter_mut() {
                let of_area = image.areas.iter_mut().filter(|other| other.area == area);
                of_area.for_each(|other| other.renumber(&changed));
            }
        }
        Ok(())
    }

    /// Learns which files of a checkpoint are in use, and may change unseen.
    pub fn expose(&mut self, image: &Image, uses: &[Use]) {
        for area in &image.areas {
            let index = self.index(&area.area);
            let known = &mut self.known[index].inodes;
            let find = |number| {
                let nodes = area.index().shown(number);
                nodes.map(|node| &area.tree.nodes[node])
            };
            let exposed = exposed(uses, &area.area, known.trust(), find);
            exposed.iter().for_each(|ino| known.expose(*ino));
        }
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

/// Recorded directories that have names of the lower layers.
fn holding_lower(wanted: &Tree) -> impl Iterator<Item = u64> {
    let holds = |node: &&Node| {
        let mut below = node.entries.values();
        !node.of_lower && below.any(|below| wanted.nodes[*below].of_lower)
    };
    let directories = wanted.nodes.iter().filter(holds);
    directories.map(|node| node.meta.stat.ino)
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

fn clock(clock: ClockId) -> Result<Time> {
    let now = clock_gettime(clock).map_err(|errno| Error::File {
        what: "read the clock for",
        path: PathBuf::from("files"),
        error: errno.into(),
    })?;
    Ok((now.tv_sec(), now.tv_nsec() as u32))
}

impl Prepared {
    /// What is known of files is not told to be so.
    fn forget(&mut self) {
        self.areas.iter_mut().for_each(|(_, _, base)| *base = None);
    }

    /// Whether no files are to be recorded.
    pub fn is_empty(&self) -> bool {
        self.areas.is_empty()
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
pub(super) mod tests_only {
    use std::collections::BTreeSet;

    use super::*;
    use crate::filesystem::plan::Op;
    use crate::filesystem::tree::NodeId;

    /// The plan of the only area by all of both trees, to be called after [`Files::plan`]; and what that planned.
    pub(crate) fn full_plan(
        files: &mut Files,
        mounts: &Mounts,
        image: &Image,
        plans: &Plans,
    ) -> Result<[BTreeSet<String>; 2]> {
        let (area, mounted, cut) = (&image.areas[0], &mounts.0[0], &plans.0[0]);
        let index = files.index(&area.area);
        let live = &files.known[index];
        let known = &live.inodes;
        let seen = seen(&mut files.journal);
        let watched = match (&mut files.touched, live.device) {
            (Some(touched), Some(device)) => super::told(touched, device),
            _ => watched(&mut files.journal, &seen),
        };
        let mut recognize = |at: At<'_>, node: &mut Node| recognize(mounted, known, at, node);
        let mut live = crate::filesystem::walk::walk(mounted, known, watched, &mut recognize)?;
        let mut wanted = area.tree.clone();
        complete(mounted, &mut wanted, &mut live)?;
        let full = plan(&wanted, &live);
        Ok([told(&wanted, &full), told(&cut.wanted, &cut.plan)])
    }

    /// What a plan does, without the numbers of nodes. Names are changed in an order, which is told; inodes in any.
    fn told(wanted: &Tree, plan: &Plan) -> BTreeSet<String> {
        let of = |node: &NodeId| wanted.nodes[*node].meta.stat.identity();
        let ops = plan.ops.iter().enumerate().map(|(number, op)| match op {
            Op::Stash(path, node) => format!("{number} stash {path:?} {:?}", of(node)),
            Op::Make(path, node) => format!("{number} make {path:?} {:?}", of(node)),
            Op::Unstash(node, path) => format!("{number} unstash {path:?} {:?}", of(node)),
            Op::Rewrite(path, node) => format!("rewrite {path:?} {:?}", of(node)),
            Op::Rights(path, node) => format!("rights {path:?} {:?}", of(node)),
            Op::Times(path, node) => format!("times {path:?} {:?}", of(node)),
            other => format!("{number} {other:?}"),
        });
        let after = plan.after.iter();
        let after = after.map(|(node, path)| format!("after {path:?} {:?}", of(node)));
        let made = plan.made.iter().map(|node| format!("made {:?}", of(node)));
        let touched = plan.touched.values();
        let touched = touched.map(|path| format!("touched {path:?}"));
        ops.chain(after).chain(made).chain(touched).collect()
    }

    /// Prepares areas that were not discovered.
    pub(crate) fn files_of(
        files: &mut Files,
        root: Pid,
        found: Found,
        others: &[&Image],
    ) -> Result<Prepared> {
        let prepared = Files::open_found(root, found)?;
        files.begin(prepared, others.iter().copied())
    }

    /// Does as on a kernel that has no journal of inodes.
    pub(crate) fn without_journal(files: &mut Files) {
        files.tried = true;
    }
}
