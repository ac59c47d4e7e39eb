//! `snapback checkpoint --image-path`: straight to disk, with runc's flags.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use nix::unistd::Pid;

use super::persist::{Compress, persist, summary};
use super::target::{Target, absolute, ask, failed, report};
use super::{Global, UsageError};
use crate::image::Summary;
use crate::keeper::protocol::{FileOptions, KeepOptions, Request, Response};
use crate::keeper::{Client, Errand, Error};
use crate::kernel::pidfd;

/// The name of a checkpoint that is in RAM only until it is on disk.
const PASSING: &str = ".image-path";

/// How long a container that was killed may take to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where to, and what callers of runc say. podman says some of it twice.
#[derive(Debug, Args)]
#[command(next_help_heading = "To disk, with runc's flags and meaning")]
pub(super) struct ToDisk {
    /// Write the checkpoint to DIR, not to RAM, and end the container. Files stay where they are
    #[arg(long, value_name = "DIR", conflicts_with_all = ["name", "no_files", "volume", "max_bytes"])]
    pub(super) image_path: Option<PathBuf>,
    /// Let the container run on; it is not stopped while the image is written
    #[arg(long, requires = "image_path", overrides_with = "leave_running")]
    leave_running: bool,
    /// How memory is compressed
    #[arg(long, value_enum, default_value = "none", requires = "image_path")]
    compress: Compress,
    /// Accepted; nothing is written there
    #[arg(long, value_name = "DIR", requires = "image_path")]
    work_path: Option<PathBuf>,
    /// Accepted: established connections are in every image, and a restore decides about them
    #[arg(long, requires = "image_path", overrides_with = "tcp_established")]
    tcp_established: bool,
    /// Accepted: what is connected to the outside is noticed by a restore
    #[arg(long, requires = "image_path", overrides_with = "ext_unix_sk")]
    ext_unix_sk: bool,
    /// Accepted: terminals are in every image
    #[arg(long, requires = "image_path", overrides_with = "shell_job")]
    shell_job: bool,
    /// Accepted: file locks are in every image
    #[arg(long, requires = "image_path", overrides_with = "file_locks")]
    file_locks: bool,
    /// Accepted: a restore makes the container's cgroup as the bundle says
    #[arg(long, value_name = "MODE", requires = "image_path", value_parser = ["soft", "full", "strict", "ignore"])]
    manage_cgroups_mode: Option<String>,
    /// Refused: there is nothing to gain, since the container is not stopped for its memory
    #[arg(long, requires = "image_path")]
    pre_dump: bool,
    /// Refused: images stand alone
    #[arg(long, value_name = "DIR", requires = "image_path")]
    parent_path: Option<PathBuf>,
}

/// Writes it.
pub(super) fn write(
    global: &Global,
    target: &Target,
    to: &ToDisk,
    image_path: &std::path::Path,
    json: bool,
) -> anyhow::Result<(PathBuf, Summary)> {
    if to.pre_dump {
        return Err(UsageError(
            "--pre-dump is not supported: with --leave-running nothing is stopped while memory is written".into(),
        )
        .into());
    }
    if to.parent_path.is_some() {
        let message = "--parent-path is not supported: every image stands alone";
        return Err(UsageError(message.into()).into());
    }
    let errand = target.running(global)?;
    let image_path = absolute(image_path)?;
    let summary = match to.leave_running {
        true => copy_out(&errand, &image_path, to.compress, json)?,
        false => move_out(&errand, &image_path, to.compress)?,
    };
    Ok((image_path, summary))
}

/// By way of a checkpoint in RAM, which is freed when it is on disk.
fn copy_out(
    errand: &Errand,
    to: &std::path::Path,
    compress: Compress,
    json: bool,
) -> anyhow::Result<Summary> {
    let request = Request::Checkpoint {
        name: PASSING.into(),
        files: FileOptions::default(),
        keep: KeepOptions::default(),
    };
    report(Client::ask_or_start(&errand.directory(), errand, &request)?)?;
    let done = persist(errand, (PASSING, Some("default")), to, compress, json);
    let request = Request::Release {
        name: Some(PASSING.into()),
    };
    match ask(errand, &request) {
        Ok(Response::Failure(failure)) if done.is_ok() => Err(failed(failure)),
        // It is gone with its keeper.
        Ok(_) | Err(Error::NoKeeper { .. } | Error::Died { .. }) => done,
        Err(error) => done.and(Err(error.into())),
    }
}

/// While the container is stopped; then it is ended.
fn move_out(errand: &Errand, to: &std::path::Path, compress: Compress) -> anyhow::Result<Summary> {
    let root = pidfd::open(Pid::from_raw(errand.target.pid));
    let request = Request::MoveOut {
        to: to.to_owned(),
        encoding: compress.into(),
        files: FileOptions::default(),
    };
    let answer = Client::ask_or_start(&errand.directory(), errand, &request)?;
    let summary = summary(answer)?;
    let began = Instant::now();
    if let Ok(root) = root
        && !pidfd::await_end(root.as_fd(), PATIENCE)
    {
        bail!(
            "the image is written, but {} has not ended {} s after it was killed",
            errand.label,
            began.elapsed().as_secs()
        );
    }
    Ok(summary)
}
