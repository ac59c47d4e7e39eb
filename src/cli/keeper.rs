//! `snapback keeper`, hidden: what `checkpoint` starts.

use std::path::PathBuf;

use clap::Args;
use tracing_subscriber::EnvFilter;

use super::{Global, Status};
use crate::keeper::{self, Errand, Identity};

/// What to keep; the rest comes by inherited descriptors.
#[derive(Debug, Args)]
pub(crate) struct Keeper {
    #[arg(long)]
    pid: i32,
    #[arg(long)]
    start_time: u64,
    #[arg(long)]
    label: String,
    #[arg(long)]
    cgroup: Option<PathBuf>,
    #[arg(long)]
    outlives: bool,
}

pub(crate) fn run(global: &Global, args: Keeper) -> anyhow::Result<Status> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // With --debug there is a subscriber already.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .try_init();
    let errand = Errand {
        root: global.root.clone(),
        target: Identity {
            pid: args.pid,
            start_time: args.start_time,
        },
        cgroup: args.cgroup,
        label: args.label,
        outlives: args.outlives,
    };
    keeper::run(&errand, keeper::attach(&errand))?;
    Ok(Status::Done)
}
