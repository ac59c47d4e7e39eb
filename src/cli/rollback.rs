//! `snapback rollback`

use std::time::Instant;

use clap::Args;

use super::target::{Target, ask, checkpoint_name, finish, report};
use super::{Global, Status, again};
use crate::keeper::protocol::Request;

/// Roll the container back to a checkpoint, in place
///
/// Processes keep their PIDs, what was born since the checkpoint is killed. The checkpoint is kept: roll back to it
/// as often as you like. A container that has ended is made again, under its ID, with mounts and cgroup as the bundle says.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  snapback rollback web                      back to the checkpoint `default`
  snapback rollback --to clean web           back to the checkpoint `clean`
  snapback rollback --verify web             compare all of it with the checkpoint before it runs again
  snapback rollback --pid 4711               a process tree that something else started

Exit status: 0 done, 1 error, 2 usage, 3 refused (nothing was touched), 4 lost (the container was killed).")]
pub(crate) struct Rollback {
    /// Name of the checkpoint
    #[arg(long, value_name = "NAME", default_value = "default", value_parser = checkpoint_name)]
    to: String,
    /// Compare every page and every object with the checkpoint before anything runs again; a difference is Lost
    #[arg(long)]
    verify: bool,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

pub(crate) fn run(global: &Global, args: Rollback) -> anyhow::Result<Status> {
    let began = Instant::now();
    let ended = args.target.kept(global).and_then(|errand| {
        let mut errand = errand;
        if args.target.has_ended(global) {
            match again::roll_back(global, &errand, &args.to, args.verify)? {
                Some(report) => return Ok(report),
                // Somebody else was faster.
                None => errand = args.target.kept(global)?,
            }
        }
        let request = Request::Rollback {
            name: args.to.clone(),
            verify: args.verify,
        };
        report(ask(&errand, &request)?)
    });
    finish(args.json, &args.to, began, ended)
}
