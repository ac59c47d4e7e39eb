//! Giving checkpoints up.

use std::collections::BTreeSet;

use nix::unistd::Pid;

use super::{Checkpoint, Result, Spaces};
use crate::freeze::{OnTracerDeath, Stopped, Tree};
use crate::memory::{Shadow, Space, SpaceImage};
use crate::task;

/// Frees checkpoints that are not in `others` any more. The tree is stopped only if shadows or windows go with them.
///
/// # Errors
///
/// The tree can't be stopped.
pub fn release(
    tree: &mut Tree,
    spaces: &mut Spaces,
    others: &[Checkpoint],
    checkpoints: Vec<Checkpoint>,
) -> Result<()> {
    let images: Vec<SpaceImage> = checkpoints
        .into_iter()
        .flat_map(|checkpoint| checkpoint.spaces)
        .collect();
    if !tree.is_alive() && !tree.can_lose_root() {
        end_shadows(&images);
        return Ok(());
    }
    let left: BTreeSet<Pid> = all(others).map(|image| image.pid).collect();
    let is_needed = |image: &SpaceImage| is_shared(image, others) && left.contains(&image.pid);
    if images.iter().all(is_needed) {
        discard(spaces, None, others, images);
        return Ok(());
    }
    let mut stopped = tree.stop_remains(OnTracerDeath::RunOn)?;
    task::prepare(&mut stopped)?;
    discard(spaces, Some(&mut stopped), others, images);
    forget_unused(&mut stopped, spaces, others);
    Ok(stopped.resume()?)
}

/// Ends the shadows of images of a tree that ends: without that its PID namespace does not.
pub fn end_shadows(images: &[SpaceImage]) {
    let shadows = images.iter().filter_map(|image| image.source.shadow());
    shadows.for_each(Shadow::kill);
}

fn all(checkpoints: &[Checkpoint]) -> impl Iterator<Item = &SpaceImage> {
    checkpoints.iter().flat_map(|checkpoint| &checkpoint.spaces)
}

/// Whether other checkpoints need the shadow of an image.
fn is_shared(image: &SpaceImage, others: &[Checkpoint]) -> bool {
    all(others).any(|other| image.source.shares_shadow(&other.source))
}

/// Gives up images, and the shadows that no other checkpoint needs.
pub(super) fn discard(
    spaces: &mut Spaces,
    mut stopped: Option<&mut Stopped>,
    others: &[Checkpoint],
    images: Vec<SpaceImage>,
) {
    let mut images = images;
    while let Some(image) = images.pop() {
        let is_shared = is_shared(&image, others)
            || images
                .iter()
                .any(|other| image.source.shares_shadow(&other.source));
        let space = spaces.get_mut(&image.pid);
        Space::discard(space, stopped.as_deref_mut(), image, is_shared);
    }
}

/// Takes windows and tracking away from processes that no checkpoint holds.
pub(super) fn forget_unused(
    stopped: &mut Stopped,
    spaces: &mut Spaces,
    checkpoints: &[Checkpoint],
) {
    let used = |pid: &Pid| {
        checkpoints
            .iter()
            .flat_map(|checkpoint| &checkpoint.spaces)
            .any(|image| image.pid == *pid)
    };
    spaces.retain(|pid, _| used(pid));
    let windows: Vec<Pid> = stopped
        .processes()
        .map(|process| process.pid)
        .filter(|pid| !used(pid))
        .collect();
    for pid in windows {
        // Best effort: a window left behind is a mapping that nobody uses.
        if let Err(error) = stopped.close_window(pid) {
            tracing::debug!(%pid, %error, "the window was left in place");
        }
    }
}
