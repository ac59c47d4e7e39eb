//! `snapback checkpoints`

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use serde::Serialize;

use super::output::{self, print};
use super::target::{Target, ask, failed, size};
use super::{Global, Status};
use crate::image::Durability;
use crate::keeper::Error;
use crate::keeper::protocol::{CheckpointInfo, Request, Response};

/// List the checkpoints of a container: names, where each came from, ages, sizes by kind
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  snapback checkpoints web
  snapback checkpoints --json --pid 4711

FROM is the checkpoint that one came from: the last that was taken or rolled back to before; if that was released, the one
before it. MARK says which one the container was equal to last (`current`), which are released by name only (`pinned`), and
which were taken before the container ended (`ended`).
HEADERS is all that a checkpoint holds besides page contents, which stay shared with the running processes until they
are changed; PAGES were copied, since they had changed since the one it came from; SHARE compares it with the memory that was resident when the checkpoint was taken. FILES is content of files;
what several checkpoints have in common is kept once and shown with each. WHERE is `resident` (in RAM only), `persisting` (being
written to disk), or `durable` (on disk too), with the directory.")]
pub(crate) struct Checkpoints {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Serialize)]
struct Printed {
    checkpoints: Vec<CheckpointInfo>,
}

#[derive(Debug, Serialize)]
struct Failed {
    outcome: &'static str,
    error: String,
}

pub(crate) fn run(global: &Global, args: Checkpoints) -> anyhow::Result<Status> {
    match (list(global, &args), args.json) {
        (Ok(checkpoints), true) => output::json(&Printed { checkpoints })?,
        (Ok(checkpoints), false) => print(&table(&checkpoints, now()))?,
        (Err(error), true) => {
            output::json(&Failed {
                outcome: "error",
                error: format!("{error:#}"),
            })?;
            return Ok(Status::of(&error));
        }
        (Err(error), false) => return Err(error),
    }
    Ok(Status::Done)
}

fn list(global: &Global, args: &Checkpoints) -> anyhow::Result<Vec<CheckpointInfo>> {
    let errand = args.target.known(global)?;
    match ask(&errand, &Request::Checkpoints) {
        Ok(Response::Checkpoints { checkpoints }) => Ok(checkpoints),
        Ok(Response::Failure(failure)) => Err(failed(failure)),
        Ok(other) => Err(Error::Protocol(format!("{other:?}")).into()),
        Err(Error::NoKeeper { .. }) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

fn table(checkpoints: &[CheckpointInfo], now: f64) -> String {
    let header = [
        "NAME", "FROM", "MARK", "AGE", "HEADERS", "PAGES", "RESIDENT", "SHARE", "FILES", "WHERE",
        "BY KIND",
    ]
    .map(str::to_owned);
    let mut rows = vec![header];
    rows.extend(checkpoints.iter().map(|info| {
        let mut kinds: Vec<_> = info.kinds.iter().collect();
        kinds.sort_by_key(|(_, bytes)| std::cmp::Reverse(**bytes));
        let kinds: Vec<String> = kinds
            .iter()
            .map(|(kind, bytes)| format!("{kind} {}", size(**bytes)))
            .collect();
        [
            info.name.clone(),
            info.parent.clone().unwrap_or_else(|| "-".to_owned()),
            mark(info),
            age(now - info.taken_at),
            size(info.header_bytes),
            size(info.page_bytes),
            size(info.resident_bytes),
            share(info.header_bytes, info.resident_bytes),
            size(info.file_bytes),
            place(&info.durability),
            kinds.join(", "),
        ]
    }));
    let mut text = String::new();
    for row in &rows {
        for (column, cell) in row.iter().enumerate() {
            let width = rows
                .iter()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or(0);
            // Writing to a String can't fail.
            let _ = match column + 1 == row.len() {
                true => writeln!(text, "{cell}"),
                false => write!(text, "{cell:width$}  "),
            };
        }
    }
    text
}

fn mark(info: &CheckpointInfo) -> String {
    let marks = [
        (info.current, "current"),
        (info.pinned, "pinned"),
        (info.ended, "ended"),
    ];
    let marks = marks.iter().filter(|(is_so, _)| *is_so);
    let marks: Vec<&str> = marks.map(|(_, name)| *name).collect();
    match marks.is_empty() {
        true => "-".to_owned(),
        false => marks.join(","),
    }
}

fn place(durability: &Durability) -> String {
    match durability {
        Durability::Resident => "resident".to_owned(),
        Durability::Persisting { to, done, total } => {
            let percent = done.saturating_mul(100).checked_div(*total).unwrap_or(0);
            format!("persisting {percent}% {}", to.display())
        }
        Durability::Durable { at } => format!("durable {}", at.display()),
    }
}

fn share(headers: u64, resident: u64) -> String {
    match resident {
        0 => "-".to_owned(),
        _ => format!(
            "{:.2}% of resident",
            headers as f64 * 100.0 / resident as f64
        ),
    }
}

/// How long ago in the two largest units, as `2h 5m`.
pub(super) fn age(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m {}s", seconds % 60),
        3600..86400 => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn table_for_people() {
        let info = CheckpointInfo {
            name: "default".into(),
            taken_at: 1000.0,
            kinds: BTreeMap::from([("pipe".to_owned(), 1024), ("vma".to_owned(), 20 << 10)]),
            header_bytes: 21 << 10,
            resident_bytes: 100 << 20,
            parent: Some("clean".into()),
            current: true,
            ended: false,
            pinned: true,
            page_bytes: 4096,
            copied_bytes: 0,
            file_bytes: 3 << 20,
            durability: Durability::Durable { at: "/i".into() },
        };
        assert_eq!(
            table(&[info], 1075.5),
            "NAME     FROM   MARK            AGE     HEADERS   PAGES    RESIDENT   SHARE              FILES    WHERE       BY KIND\n\
             default  clean  current,pinned  1m 15s  21.0 KiB  4.0 KiB  100.0 MiB  0.02% of resident  3.0 MiB  durable /i  vma 20.0 KiB, pipe 1.0 KiB\n"
        );
    }

    #[test]
    fn ages() {
        assert_eq!(age(-1.0), "0s");
        assert_eq!(age(59.9), "59s");
        assert_eq!(age(7500.0), "2h 5m");
        assert_eq!(age(90000.0), "1d 1h");
    }
}
