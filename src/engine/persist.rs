//! Checkpoints to be written to disk.

use super::{Engine, Error};
use crate::image::{self, Parts};

impl Engine {
    /// What of a checkpoint is to be written out, by [`image::persist`] on any thread. The tree runs on, and may be rolled
    /// back meanwhile.
    ///
    /// # Errors
    ///
    /// There is no checkpoint of that name, or its shadows are dead.
    pub fn parts(&self, name: &str) -> Result<Parts, Error> {
        let checkpoint = &self.checkpoints[self.find(name)?];
        Ok(Parts::of(checkpoint, &self.spaces, &self.tree)?)
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
