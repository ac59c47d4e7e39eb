//! Containers that have ended: their checkpoints outlive them, and a container can be made of one.

use std::time::{Duration, Instant};

use nix::unistd::Pid;

use super::streams::Streams;
use super::{Engine, Error, Held, RollbackOptions, Stream};
use crate::checkpoint;
use crate::fault;
use crate::freeze::{self, Tree};
use crate::image;
use crate::memory;
use crate::outcome::{Outcome, Refusal, Report};
use crate::restore::{self, Origin};

impl Engine {
    /// Whether checkpoints are kept when the root of the tree ends, so that the container can be made again: if that is the end of
    /// all its processes.
    fn outlives_root(&self) -> bool {
        self.target.outlives && !self.tree.can_lose_root()
    }

    /// The container is about to be deleted: its checkpoints end with it, at once if it has ended.
    ///
    /// # Errors
    ///
    /// They could not be freed.
    pub fn end_with_container(&mut self) -> Result<(), Error> {
        self.target.outlives = false;
        if !self.tree.is_alive() {
            return self.release(None);
        }
        for source in self.sources() {
            source.end_with_tree();
        }
        Ok(())
    }

    /// Prepares a checkpoint for the end of the container.
    pub(super) fn prepare_to_outlive(&mut self, checkpoint: &Held) {
        if !self.outlives_root() {
            return;
        }
        self.streams = Streams::of(self.tree.root());
        for image in &checkpoint.spaces {
            if let Err(error) = image.source.prepare_to_outlive() {
                tracing::warn!(%error, "this checkpoint will end with the container");
            }
        }
    }

    /// Copies out what shadows have that are about to end, and lets them.
    pub(super) fn outlive(&self) {
        let is_wanted = self.outlives_root() && !self.is_killed;
        for source in self.sources() {
            if !is_wanted {
                source.let_go();
                continue;
            }
            if let Err(error) = source.outlive() {
                tracing::warn!(%error, "what a shadow had could not be kept");
            }
        }
    }

    /// If the container has ended, sets those of its checkpoints apart that have outlived it.
    pub(super) fn note_end(&mut self) {
        if self.is_killed || self.tree.is_alive() || !self.outlives_root() {
            return;
        }
        self.outlive();
        for mut checkpoint in std::mem::take(&mut self.checkpoints) {
            if checkpoint.spaces.iter().all(|image| image.source.is_kept()) {
                // What has a name is found by it; a pin would keep a mount that nobody else has.
                checkpoint.objects.forget_named();
                self.ended.push(checkpoint);
                continue;
            }
            let name = &checkpoint.name;
            tracing::warn!(
                name,
                "this checkpoint has ended with the container, whose memory it shared"
            );
            self.lineage.drop(checkpoint.number);
            self.on_disk.remove(name.as_str());
            checkpoint::end_shadows(&checkpoint.spaces);
        }
        self.spaces.clear();
        self.files.start_again();
    }

    /// Whether the container has ended and there is a checkpoint of which it can be made again.
    pub(super) fn can_be_made_again(&self) -> bool {
        !self.is_killed && self.outlives_root() && !self.ended.is_empty()
    }

    /// Checks whether the container, which has ended, can be made again of a checkpoint; returns its init's standard streams.
    ///
    /// # Errors
    ///
    /// Refused by name, or failed: nothing was touched.
    pub fn prepare_again(&mut self, name: &str) -> Result<[Option<Stream>; 3], Error> {
        self.prepared = None;
        self.await_end()?;
        let held = &self.ended[self.ended_at(name)?];
        // An image of it, and the container.
        memory::check_available(&self.target.label, 2 * held.resident_pages * memory::PAGE)?;
        let parts = image::Parts::of(held)?;
        let origin = Origin::new(image::in_ram(parts)?);
        restore::check(&origin)?;
        self.prepared = Some((name.to_owned(), origin));
        Ok(self.streams.paths())
    }

    /// Waits for the end of an init that is ending: its first thread is a zombie before all of its PID namespace has ended.
    fn await_end(&mut self) -> Result<(), Error> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.collect_deaths();
            if !self.tree.is_alive() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::Failed(format!("{} runs", self.target.label)));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Makes of `root`, the init of the container created anew, what a checkpoint says that was [prepared](Engine::prepare_again),
    /// and goes on with that.
    ///
    /// # Errors
    ///
    /// It was not made: what there is of it is killed, and the checkpoints are still there.
    pub fn make_again(
        &mut self,
        name: &str,
        root: i32,
        options: RollbackOptions,
    ) -> Result<Report, Error> {
        let prepared = self.prepared.take();
        let Some((_, origin)) = prepared.filter(|(prepared, _)| prepared == name) else {
            let message = format!("{name:?} was not prepared");
            return Err(Error::Failed(message));
        };
        let old = self.ended_at(name)?;
        fault::point("ended.prepared");
        let tree = Tree::new(Pid::from_raw(root))?;
        let ended = std::mem::replace(&mut self.tree, tree);
        let made = self.fill(&origin, name, options);
        drop(origin);
        let (mut checkpoint, report) = match made {
            Ok(made) => made,
            Err(error) => {
                self.tree.kill();
                if !freeze::collect_all_deaths() {
                    tracing::error!("what was made of the container has not ended in time");
                }
                self.tree = ended;
                self.spaces.clear();
                self.files.start_again();
                let label = &self.target.label;
                return Err(Error::Failed(format!(
                    "{label} was not made again, and still has its checkpoints: {error}"
                )));
            }
        };
        let old = self.ended.remove(old);
        (checkpoint.number, checkpoint.pinned) = (old.number, old.pinned);
        checkpoint.taken_at = old.taken_at;
        self.lineage.go(old.number);
        self.prepare_to_outlive(&checkpoint);
        self.checkpoints.push(checkpoint);
        self.files.forget_unused();
        Ok(Report {
            outcome: Outcome::RolledBack,
            revived: report.threads,
            ..report
        })
    }

    /// Why a rollback can't go to such a checkpoint.
    pub(super) fn cannot_go_back_to(&self, ended: &Held) -> Error {
        if !self.tree.is_alive() {
            let label = &self.target.label;
            return Error::Failed(format!("{label} has ended, and is to be made again"));
        }
        Error::Refused(Refusal {
            object: format!("checkpoint {:?}", ended.name),
            holder: self.target.label.clone(),
            remedy: "it was taken before the container ended and was made again; kill the container, then roll back to it"
                .into(),
        })
    }

    /// Frees one of these.
    pub(super) fn free_ended(&mut self, name: &str) {
        self.prepared = None;
        if let Some(index) = self.find_ended(name) {
            let ended = self.ended.remove(index);
            self.lineage.drop(ended.number);
            self.forget_on_disk(name);
            drop(ended);
            self.files.forget_unused();
        }
    }

    fn ended_at(&self, name: &str) -> Result<usize, Error> {
        self.find_ended(name).ok_or_else(|| self.no_such(name))
    }

    pub(super) fn find_ended(&self, name: &str) -> Option<usize> {
        self.ended.iter().position(|held| held.name == name)
    }
}
