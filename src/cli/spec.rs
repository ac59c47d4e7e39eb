//! `spec`: write a default `config.json`.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;

use super::Status;
use crate::container::config;

/// Options of `spec`.
#[derive(Debug, Args)]
pub(crate) struct Spec {
    /// Directory to write config.json into
    #[arg(long, short, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Refused: containers are run by root only
    #[arg(long)]
    rootless: bool,
}

pub(super) fn run(args: &Spec) -> anyhow::Result<Status> {
    if args.rootless {
        bail!("--rootless: containers are run by root only");
    }
    let path = args.bundle.join("config.json");
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .with_context(|| {
            format!(
                "creating {} (an existing one is never overwritten)",
                path.display()
            )
        })?;
    file.write_all(config::DEFAULT.as_bytes())
        .with_context(|| format!("writing {}", path.display()))?;
    Ok(Status::Done)
}
