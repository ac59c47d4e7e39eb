//! `state`: a container's state as JSON.

use super::{Global, Status, output};
use crate::container::locate;
use crate::container::view::View;

pub(super) fn run(global: &Global, args: &liboci_cli::State) -> anyhow::Result<Status> {
    output::json(&View::from(locate(&global.root, &args.container_id)?))?;
    Ok(Status::Done)
}
