//! `pause`: freeze a container's processes.

use super::{Global, Status};
use crate::container::lifecycle;

pub(super) fn run(global: &Global, args: &liboci_cli::Pause) -> anyhow::Result<Status> {
    lifecycle::pause(&global.root, &args.container_id)?;
    Ok(Status::Done)
}
