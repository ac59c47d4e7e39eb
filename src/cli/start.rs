//! `start`: let the program of a created container run.

use super::{Global, Status};
use crate::container::create;

pub(super) fn run(global: &Global, args: &liboci_cli::Start) -> anyhow::Result<Status> {
    create::start(&global.root, &args.container_id)?;
    Ok(Status::Done)
}
