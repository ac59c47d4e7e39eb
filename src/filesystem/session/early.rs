//! A checkpoint of files: what is done before the stop, and in it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use super::{Files, seen, told, watched};
use crate::filesystem::area::{Area, Found, LeftOut};
use crate::filesystem::areas::discover;
use crate::filesystem::capture::{
    Base, capture, capture_among, keep_early, keep_early_among, measure,
};
use crate::filesystem::image::Image;
use crate::filesystem::journal::Journal;
use crate::filesystem::known::Trust;
use crate::filesystem::mapped::mapped;
use crate::filesystem::meta::Time;
use crate::filesystem::mounted::Mounted;
use crate::filesystem::touched::Touched;
use crate::filesystem::uses::Use;
use crate::filesystem::{Error, Result};

/// A pass that takes no longer leaves little to be done in the stop.
const SHORT: Duration = Duration::from_millis(20);
/// No more than that, in bytes, is left to the stop.
const LITTLE: u64 = 4 << 20;
/// The same in files.
const FEW: usize = 500;

/// The areas of a tree, open for a checkpoint.
#[derive(Debug)]
pub struct Prepared {
    areas: Vec<(Area, Mounted, Option<Base>)>,
    left_out: Vec<LeftOut>,
}

impl Files {
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
    pub(super) fn begin<'a>(
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

    pub(super) fn open_found(root: Pid, found: Found) -> Result<Prepared> {
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

fn clock(clock: ClockId) -> Result<Time> {
    let now = clock_gettime(clock).map_err(|errno| Error::File {
        what: "read the clock for",
        path: PathBuf::from("files"),
        error: errno.into(),
    })?;
    Ok((now.tv_sec(), now.tv_nsec() as u32))
}
