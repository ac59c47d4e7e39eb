//! `features`: what this runtime offers, as JSON.

use super::{Status, output};
use crate::container::features;

pub(super) fn run() -> anyhow::Result<Status> {
    output::json(&features::features())?;
    Ok(Status::Done)
}
