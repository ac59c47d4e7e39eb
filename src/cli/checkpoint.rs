//! `snapback checkpoint`

use std::time::Instant;

use clap::Args;

use super::target::{Target, checkpoint_name, finish, report};
use super::{Global, Status};
use crate::keeper::Client;
use crate::keeper::protocol::Request;

/// Take a checkpoint in RAM while the container keeps running
///
/// A keeper process is started with the first checkpoint of a container and holds its checkpoints until they are
/// released or the container ends. A checkpoint of the same name is replaced.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  snapback checkpoint web                    of the container `web`, under the name `default`
  snapback checkpoint --name clean web       under the name `clean`
  snapback checkpoint --pid 4711             of a process tree that something else started
  snapback checkpoint --json web             the report for programs

Exit status: 0 done, 1 error, 2 usage, 3 refused (nothing was touched).")]
pub(crate) struct Checkpoint {
    /// Name of the checkpoint
    #[arg(long, default_value = "default", value_parser = checkpoint_name)]
    name: String,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

pub(crate) fn run(global: &Global, args: Checkpoint) -> anyhow::Result<Status> {
    let began = Instant::now();
    let ended = args.target.running(global).and_then(|errand| {
        let request = Request::Checkpoint {
            name: args.name.clone(),
        };
        report(Client::ask_or_start(
            &errand.directory(),
            &errand,
            &request,
        )?)
    });
    finish(args.json, &args.name, began, ended)
}
