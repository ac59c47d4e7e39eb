//! `snapback persist`

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::output::{json_line, print};
use super::target::{Target, absolute, checkpoint_name, failed, size};
use super::{Global, Status};
use crate::image::{Encoding, Summary};
use crate::keeper::protocol::{Request, Response};
use crate::keeper::{Client, Errand, Error};
use crate::outcome::Refusal;

/// Write a checkpoint to disk while the container runs on
///
/// The container is not stopped, and can be rolled back meanwhile; the checkpoint stays in RAM. The directory is there whole or
/// not at all: it gets its name when everything is on disk, and an image that was there is replaced only then. A program that
/// is interrupted (Ctrl-C) leaves nothing behind.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  snapback persist --image-path /var/lib/web.img web
  snapback persist --name clean --image-path clean.img --compress zstd web
  snapback persist --json --image-path /tmp/img --pid 4711   a JSON object per line, with the progress

Exit status: 0 done, 1 error, 2 usage, 3 refused; if it is not 0 what was at DIR is as it was.")]
pub(crate) struct Persist {
    /// Name of the checkpoint
    #[arg(long, default_value = "default", value_parser = checkpoint_name)]
    name: String,
    /// Directory to write to: an image, empty, or not there
    #[arg(long, value_name = "DIR")]
    image_path: PathBuf,
    /// How memory is compressed
    #[arg(long, value_enum, default_value = "none")]
    compress: Compress,
    /// Print JSON objects, one per line: `progress` ones and one that tells the end
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// How memory is compressed.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Compress {
    /// Zstandard
    Zstd,
    /// Not at all
    None,
}

impl From<Compress> for Encoding {
    fn from(compress: Compress) -> Self {
        match compress {
            Compress::Zstd => Self::Zstd,
            Compress::None => Self::Plain,
        }
    }
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event {
    Progress {
        done: u64,
        total: u64,
    },
    Persisted {
        image_path: PathBuf,
        #[serde(flatten)]
        summary: Summary,
        total_us: u64,
    },
    Failed {
        error: String,
        refused: Option<Refusal>,
    },
}

pub(crate) fn run(global: &Global, args: Persist) -> anyhow::Result<Status> {
    let began = Instant::now();
    let ended = args.target.known(global).and_then(|errand| {
        let to = absolute(&args.image_path)?;
        let summary = persist(&errand, (&args.name, None), &to, args.compress, args.json)?;
        Ok((to, summary))
    });
    finish(args.json, &args.name, began, ended)
}

/// Prints how it ended.
pub(super) fn finish(
    json: bool,
    name: &str,
    began: Instant,
    ended: anyhow::Result<(PathBuf, Summary)>,
) -> anyhow::Result<Status> {
    match ended {
        Ok((image_path, summary)) if json => json_line(&Event::Persisted {
            image_path,
            summary,
            total_us: u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX),
        })?,
        Ok((image_path, summary)) => print(&format!(
            "persisted {name:?} to {}: {} of memory, {} on disk\n",
            image_path.display(),
            size(summary.memory_bytes),
            size(summary.image_bytes),
        ))?,
        Err(error) if json => {
            json_line(&Event::Failed {
                error: format!("{error:#}"),
                refused: error.downcast_ref().cloned(),
            })?;
            return Ok(Status::of(&error));
        }
        Err(error) => return Err(error),
    }
    Ok(Status::Done)
}

/// Has the keeper write a checkpoint, and shows how far it is.
pub(super) fn persist(
    errand: &Errand,
    (name, called): (&str, Option<&str>),
    to: &Path,
    compress: Compress,
    json: bool,
) -> anyhow::Result<Summary> {
    let request = Request::Persist {
        name: name.to_owned(),
        to: to.to_owned(),
        encoding: compress.into(),
        called: called.map(str::to_owned),
        lend: false,
    };
    let mut shown = Shown::new(json);
    let mut watch = |done, total| shown.update(done, total);
    let answer = Client::ask_and_watch(&errand.directory(), &request, &mut watch);
    shown.clear();
    summary(answer?)
}

/// The summary in a keeper's answer.
pub(super) fn summary(answer: Response) -> anyhow::Result<Summary> {
    match answer {
        Response::Persisted { summary } => Ok(summary),
        Response::Failure(failure) => Err(failed(failure)),
        other => Err(Error::Protocol(format!("{other:?}")).into()),
    }
}

/// How progress is shown.
enum Shown {
    Bar(ProgressBar),
    Json,
    Nothing,
}

impl Shown {
    fn new(json: bool) -> Self {
        match json {
            true => Self::Json,
            false if std::io::stderr().is_terminal() => {
                let bar = ProgressBar::new(0);
                let style = "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec}";
                if let Ok(style) = ProgressStyle::with_template(style) {
                    bar.set_style(style);
                }
                Self::Bar(bar)
            }
            false => Self::Nothing,
        }
    }

    fn update(&mut self, done: u64, total: u64) {
        match self {
            Self::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            // What is said at the end matters; if nobody reads that is told then.
            Self::Json => drop(json_line(&Event::Progress { done, total })),
            Self::Nothing => {}
        }
    }

    fn clear(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
