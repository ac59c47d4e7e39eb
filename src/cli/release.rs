//! `snapback release`

use clap::Args;

use super::target::{Target, ask, checkpoint_name, failed};
use super::{Global, Status};
use crate::keeper::Error;
use crate::keeper::protocol::{Request, Response};

/// Free checkpoints; the container runs on
///
/// With the last one the container's keeper ends.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  snapback release web                       frees the checkpoint `default`
  snapback release --name clean web          frees the checkpoint `clean`
  snapback release --all --pid 4711          frees all there are, none is fine too")]
pub(crate) struct Release {
    /// Name of the checkpoint
    #[arg(long, default_value = "default", value_parser = checkpoint_name, conflicts_with = "all")]
    name: String,
    /// All checkpoints of the container
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    target: Target,
}

pub(crate) fn run(global: &Global, args: Release) -> anyhow::Result<Status> {
    let errand = args.target.known(global)?;
    let request = Request::Release {
        name: (!args.all).then_some(args.name),
    };
    match ask(&errand, &request) {
        Ok(Response::Released { .. }) => Ok(Status::Done),
        Ok(Response::Failure(failure)) => Err(failed(failure)),
        Ok(other) => Err(Error::Protocol(format!("{other:?}")).into()),
        Err(Error::NoKeeper { .. }) if args.all => Ok(Status::Done),
        Err(error) => Err(error.into()),
    }
}
