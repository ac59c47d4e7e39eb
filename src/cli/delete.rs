//! `delete`: remove a container's cgroups and state.

use super::{Global, Status};
use crate::container::lifecycle;

pub(super) fn run(global: &Global, args: &liboci_cli::Delete) -> anyhow::Result<Status> {
    lifecycle::delete(&global.root, &args.container_id, args.force)?;
    Ok(Status::Done)
}
