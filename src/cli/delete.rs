//! `delete`: remove a container's cgroups and state.

use std::path::Path;

use super::target::Target;
use super::{Global, Status};
use crate::container::{self, lifecycle};
use crate::keeper::protocol::Request;
use crate::keeper::{Client, Error};

pub(super) fn run(global: &Global, args: &liboci_cli::Delete) -> anyhow::Result<Status> {
    delete(&global.root, &args.container_id, args.force)?;
    Ok(Status::Done)
}

/// Deletes a container, and its checkpoints with it.
pub(super) fn delete(root: &Path, id: &str, force: bool) -> anyhow::Result<()> {
    container::again::settle(root, id)?;
    let located = container::locate(root, id);
    let is_to_go = |located: &container::Located| force || located.init.is_none();
    if let Ok(located) = located.as_ref()
        && is_to_go(located)
        && let Some(errand) = Target::of_located(root, located)?
    {
        match Client::ask(&errand.directory(), &Request::EndWithContainer) {
            Ok(_) | Err(Error::NoKeeper { .. } | Error::Died { .. }) => {}
            // It must not keep a container from being deleted.
            Err(error) => eprintln!("snapback: its checkpoints: {error}"),
        }
    }
    Ok(lifecycle::delete(root, id, force)?)
}
