//! Checkpoints to be written to disk.

use std::path::Path;
use std::sync::Arc;

use super::{Engine, Error};
use crate::image::{self, Durability, Parts, Persisting, Why};

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

    /// What of a checkpoint is to be written out, or looked at.
    ///
    /// # Errors
    ///
    /// There is no checkpoint of that name, or its shadows are dead.
    pub fn parts(&self, name: &str) -> Result<Parts, Error> {
        let checkpoint = &self.checkpoints[self.find(name)?];
        Ok(Parts::of(checkpoint)?)
    }

    /// What is in a checkpoint.
    ///
    /// # Errors
    ///
    /// There is none of that name.
    pub fn inspect(&self, name: &str) -> Result<image::Inspection, Error> {
        let checkpoint = &self.checkpoints[self.find(name)?];
        Ok(image::Inspection::of_checkpoint(checkpoint))
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
