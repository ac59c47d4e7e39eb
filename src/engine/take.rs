//! Taking checkpoints, and releasing those that are too many.

use super::{Checkpoint, Engine, Error, Held, files_report, header_bytes};
use crate::checkpoint::{self, Then};
use crate::memory::{PAGE, Source};
use crate::outcome::{Outcome, Report};
use crate::phases::Phases;

/// What becomes of a checkpoint, and of others for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TakeOptions {
    /// It is never released but by name.
    pub pin: bool,
    /// As many are kept at most, the pinned ones not counted; the oldest are released.
    pub keep: Option<usize>,
    /// As many bytes are kept at most, by copy in memory or of files; the oldest are released that are not pinned.
    pub max_bytes: Option<u64>,
}

impl Engine {
    /// Takes a checkpoint. One of the same name is replaced once the new one is there.
    ///
    /// # Errors
    ///
    /// Refused, naming the object in the way, or failed; the tree runs as before and other checkpoints are kept.
    pub fn checkpoint(&mut self, name: &str) -> Result<Checkpoint<'_>, Error> {
        self.take(name)?;
        self.held(name)
    }

    /// As [`Engine::checkpoint`]; returns what it did and took.
    ///
    /// # Errors
    ///
    /// As [`Engine::checkpoint`].
    pub fn take(&mut self, name: &str) -> Result<Report, Error> {
        self.take_with(name, TakeOptions::default())
    }

    /// As [`Engine::take`]; older checkpoints are released as the options say, once the new one is there. If there is no room
    /// for its files they are released before, as they have to be.
    ///
    /// # Errors
    ///
    /// As [`Engine::checkpoint`].
    pub fn take_with(&mut self, name: &str, options: TakeOptions) -> Result<Report, Error> {
        let report = loop {
            match self.take_one(name, options.pin) {
                Err(Error::Refused(_)) if self.files.take_lack() && self.release_oldest(0)? => {}
                taken => break taken?,
            }
        };
        let too_many = |engine: &Self| {
            let all = engine.ended.iter().chain(&engine.checkpoints);
            let loose = all.filter(|other| !other.pinned);
            options.keep.is_some_and(|most| loose.count() > most)
        };
        while too_many(self) && self.release_oldest(1)? {}
        let too_much = |engine: &Self| {
            let most = options.max_bytes;
            most.is_some_and(|most| engine.kept_bytes() > most)
        };
        while too_much(self) && self.release_oldest(1)? {}
        Ok(report)
    }

    fn take_one(&mut self, name: &str, pin: bool) -> Result<Report, Error> {
        let mut phases = Phases::start();
        let taken = checkpoint::take(
            &mut self.tree,
            &mut self.spaces,
            &self.checkpoints,
            &mut self.files,
            name,
            &mut phases,
            |_| Then::RunOn,
        );
        let mut checkpoint = taken.inspect_err(|_| {
            self.files.forget_unused();
            self.tidy();
        })?;
        checkpoint.number = self.lineage.grow();
        checkpoint.pinned = pin;
        let shared: u64 = checkpoint.shared.iter().map(|shared| shared.bytes()).sum();
        let report = Report {
            outcome: Outcome::Checkpointed,
            stop_us: phases.stopped().as_micros() as u64,
            total_us: 0,
            phases: phases.microseconds(),
            processes: checkpoint.processes,
            threads: checkpoint.threads,
            dirty_pages: checkpoint.new_pages,
            copied_bytes: shared + checkpoint.copied_pages * PAGE,
            header_bytes: header_bytes(&checkpoint),
            killed: 0,
            revived: 0,
            reset_connections: 0,
            files: files_report(&checkpoint.files),
            refused: None,
        };
        let replaced = self.checkpoints.iter().position(|other| other.name == name);
        let replaced = replaced.map(|index| self.checkpoints.remove(index));
        self.prepare_to_outlive(&checkpoint);
        self.checkpoints.push(checkpoint);
        self.free_ended(name);
        if let Some(replaced) = replaced {
            self.free(vec![replaced])?;
        }
        Ok(Report {
            total_us: phases.total().as_micros() as u64,
            ..report
        })
    }

    /// Releases the oldest that is not pinned, but not one of the `newest`. False: there is none.
    fn release_oldest(&mut self, newest: usize) -> Result<bool, Error> {
        let ended = self.ended.iter().find(|checkpoint| !checkpoint.pinned);
        if let Some(name) = ended.map(|checkpoint| checkpoint.name.clone()) {
            tracing::info!(name, "released to make room");
            self.free_ended(&name);
            return Ok(true);
        }
        let old = self.checkpoints.len().saturating_sub(newest);
        let oldest = self.checkpoints[..old].iter();
        let Some(index) = oldest.clone().position(|checkpoint| !checkpoint.pinned) else {
            return Ok(false);
        };
        let checkpoint = self.checkpoints.remove(index);
        tracing::info!(name = checkpoint.name, "released to make room");
        self.free(vec![checkpoint])?;
        Ok(true)
    }

    /// Frees checkpoints that are not in the list any more.
    pub(super) fn free(&mut self, checkpoints: Vec<Held>) -> Result<(), Error> {
        for checkpoint in &checkpoints {
            self.lineage.drop(checkpoint.number);
            self.forget_on_disk(&checkpoint.name);
        }
        let released = checkpoint::release(
            &mut self.tree,
            &mut self.spaces,
            &self.checkpoints,
            checkpoints,
        );
        self.files.forget_unused();
        self.tidy();
        Ok(released?)
    }

    /// Gives back memory that no checkpoint needs any more.
    fn tidy(&self) {
        let spaces = self.spaces.values();
        spaces.for_each(|space| space.page_store().tidy());
    }

    /// Bytes that are kept for all checkpoints: pages that have changed since they were taken or were written before, shared
    /// memory, files, records.
    pub fn kept_bytes(&self) -> u64 {
        let pages: u64 = self
            .spaces
            .values()
            .map(|space| space.page_store().bytes())
            .sum();
        let all = || self.ended.iter().chain(&self.checkpoints);
        let mut sources: Vec<&Source> = Vec::new();
        for image in all().flat_map(|other| &other.spaces) {
            let is_it = |other: &&Source| other.shares_shadow(&image.source);
            if !sources.iter().any(is_it) {
                sources.push(&image.source);
            }
        }
        let of_shadows = sources.into_iter().map(Source::own_bytes);
        let of_each = all().map(|checkpoint| {
            let shared = checkpoint.shared.iter().map(|shared| shared.bytes());
            header_bytes(checkpoint) + shared.sum::<u64>()
        });
        pages + of_shadows.sum::<u64>() + of_each.sum::<u64>() + self.files.kept_bytes()
    }
}
