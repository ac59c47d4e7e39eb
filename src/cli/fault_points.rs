//! `snapback fault-points`, hidden: the names that `SNAPBACK_FAULT` takes.

use super::Status;
use super::output::print;
use crate::fault;

pub(crate) fn run() -> anyhow::Result<Status> {
    let mut text = fault::POINTS.join("\n");
    text.push('\n');
    print(&text)?;
    Ok(Status::Done)
}
