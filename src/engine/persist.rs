//! Checkpoints to be written to disk.

use std::path::Path;
use std::sync::Arc;

use super::{Engine, Error};
use crate::checkpoint::{self, Then};
use crate::image::{self, Durability, Parts, Persisting, Why};
use crate::phases::Phases;

impl Engine {
    /// Prepares to write a checkpoint to the directory `target`; [`Persisting::run`] does it, on any thread. The tree runs on,
    /// and may be rolled back meanwhile; a release of the checkpoint cancels it.
    ///
    /// # Errors
    ///
    /// There is no checkpoint of that name, its shadows are dead, or it holds what can't be written.
    pub fn persist(
        &mut self,
        name: &str,
        target: &Path,
        options: image::Options,
    ) -> Result<Persisting, Error> {
        let parts = self.parts(name)?;
        let on_disk = self.on_disk.entry(name.to_owned()).or_default();
        Ok(on_disk.begin(parts, target, options))
    }

    /// Takes a checkpoint and writes it to the directory `target` while the tree is stopped; then ends the tree. Its other
    /// checkpoints can't be rolled back to any more.
    ///
    /// # Errors
    ///
    /// Refused or failed; the tree runs on, and what was at `target` is still there.
    pub fn move_out(
        &mut self,
        target: &Path,
        options: image::Options,
    ) -> Result<image::Summary, Error> {
        let mut phases = Phases::start();
        let mut written = None;
        let taken = checkpoint::take(
            &mut self.tree,
            &mut self.spaces,
            &self.checkpoints,
            &mut self.files,
            "default",
            &mut phases,
            |checkpoint| {
                let parts = Parts::of(checkpoint);
                let progress = image::Progress::default();
                let done =
                    parts.and_then(|parts| image::persist(parts, target, options, &progress));
                let then = match done {
                    Ok(_) => Then::End,
                    Err(_) => Then::RunOn,
                };
                written = Some(done);
                then
            },
        );
        if let Some(Ok(summary)) = written {
            self.is_killed = true;
            if let Err(error) = taken {
                // Dead it has to be: it must not go on after what is on disk.
                tracing::warn!(%error, "the tree did not end well");
                self.tree.kill();
            }
            return Ok(summary);
        }
        let checkpoint = taken.inspect_err(|_| self.files.forget_unused())?;
        let (tree, spaces) = (&mut self.tree, &mut self.spaces);
        checkpoint::release(tree, spaces, &self.checkpoints, vec![checkpoint])?;
        self.files.forget_unused();
        match written {
            Some(Err(error)) => Err(error.into()),
            _ => Err(Error::Failed("the image was not written".into())),
        }
    }

    /// What of a checkpoint is to be written out, or looked at.
    ///
    /// # Errors
    ///
    /// There is no checkpoint of that name, or its shadows are dead.
    pub fn parts(&self, name: &str) -> Result<Parts, Error> {
        Ok(Parts::of(self.get(name)?)?)
    }

    /// What is in a checkpoint.
    ///
    /// # Errors
    ///
    /// There is none of that name.
    pub fn inspect(&self, name: &str) -> Result<image::Inspection, Error> {
        Ok(image::Inspection::of_checkpoint(self.get(name)?))
    }

    /// Where a checkpoint is besides RAM.
    pub(super) fn durability(&self, name: &str) -> Durability {
        let on_disk = self.on_disk.get(name);
        on_disk.map_or(Durability::Resident, |on_disk| on_disk.durability())
    }

    /// A checkpoint goes from RAM: what is being written of it can't be.
    pub(super) fn forget_on_disk(&mut self, name: &str) {
        let on_disk: Option<Arc<image::OnDisk>> = self.on_disk.remove(name);
        on_disk
            .into_iter()
            .for_each(|on_disk| on_disk.cancel(Why::Released));
    }
}

impl From<image::Error> for Error {
    fn from(error: image::Error) -> Self {
        match error {
            image::Error::Refused(refusal) => Self::Refused(refusal),
            other => Self::Failed(other.to_string()),
        }
    }
}
