//! What has become of files since a checkpoint.

use super::{Checkpoint, Result};
use crate::filesystem::{Change, Files};
use crate::freeze::{OnTracerDeath, Tree};
use crate::task;

/// Compares the files of a tree, which is stopped meanwhile, with those of a checkpoint; in the order of paths.
///
/// # Errors
///
/// The tree can't be stopped, or its files can't be looked at; it runs as before.
pub fn diff(tree: &mut Tree, files: &Files, checkpoint: &Checkpoint) -> Result<Vec<Change>> {
    let mounts = files.open(tree.root(), &checkpoint.files)?;
    let mut stopped = tree.stop(OnTracerDeath::RunOn)?;
    // Calls that a mere stop would end are made to start again.
    let unknown = task::prepare(&mut stopped)?;
    let changes = files.diff(&mounts, &checkpoint.files);
    stopped.resume()?;
    tree.learn_calls(&unknown);
    Ok(changes?)
}
