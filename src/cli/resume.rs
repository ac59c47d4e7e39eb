//! `resume`: let a paused container run on.

use super::{Global, Status};
use crate::container::lifecycle;

pub(super) fn run(global: &Global, args: &liboci_cli::Resume) -> anyhow::Result<Status> {
    lifecycle::resume(&global.root, &args.container_id)?;
    Ok(Status::Done)
}
