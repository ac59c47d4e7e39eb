//! `snapback inspect`

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use clap::Args;

use super::checkpoints::{age, now};
use super::output::{self, columns, print};
use super::target::{Target, ask, checkpoint_name, failed, size};
use super::{Global, Status};
use crate::image::{Inspection, ProcessView};
use crate::keeper::Error;
use crate::keeper::protocol::{Request, Response};

/// Show what is in an image or a checkpoint
///
/// Processes, records by kind, memory maps, descriptors, files. All of an image is read and its checksums are verified; of a
/// damaged one is shown what can be read, and which record is damaged at which offset.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  snapback inspect /var/lib/web.img          an image
  snapback inspect web                       the checkpoint `default` of the container `web`
  snapback inspect --name clean --json --pid 4711

What is a directory or has a slash in it is taken for an image. Exit status: 0 all is well, 1 damaged or an error.")]
pub(crate) struct Inspect {
    /// Directory of an image, or container
    #[arg(
        value_name = "DIR|ID",
        conflicts_with = "pid",
        required_unless_present = "pid"
    )]
    what: Option<String>,
    /// Root of any process tree, whoever started it
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// Name of the checkpoint
    #[arg(long, default_value = "default", value_parser = checkpoint_name)]
    name: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(global: &Global, args: &Inspect) -> anyhow::Result<Status> {
    let inspection = match &args.what {
        Some(what) if what.contains('/') || Path::new(what).is_dir() => {
            Inspection::of_directory(Path::new(what))
        }
        what => held(global, Target::of(what.clone(), args.pid), &args.name)?,
    };
    match args.json {
        true => output::json(&inspection)?,
        false => print(&text(&inspection))?,
    }
    Ok(match inspection.problems.is_empty() {
        true => Status::Done,
        false => Status::Error,
    })
}

fn held(global: &Global, target: Target, name: &str) -> anyhow::Result<Inspection> {
    let errand = target.known(global)?;
    let request = Request::Inspect {
        name: name.to_owned(),
    };
    match ask(&errand, &request)? {
        Response::Inspection { inspection } => Ok(*inspection),
        Response::Failure(failure) => Err(failed(failure)),
        other => Err(Error::Protocol(format!("{other:?}")).into()),
    }
}

/// The inspection for people.
fn text(inspection: &Inspection) -> String {
    let mut text = String::new();
    // Writing to a String can't fail.
    if let Some(directory) = &inspection.directory {
        let _ = writeln!(text, "image {}", directory.display());
    }
    if let Some(info) = &inspection.checkpoint {
        let _ = writeln!(
            text,
            "checkpoint {:?}, taken {} ago: {} processes, {} threads, {} resident",
            info.name,
            age(now() - info.taken_ns as f64 / 1e9),
            info.processes,
            info.threads,
            size(info.resident_pages * 4096),
        );
    }
    if let Some(made) = &inspection.made {
        let _ = writeln!(
            text,
            "made by snapback {} on Linux {}",
            made.writer, made.kernel
        );
    }
    for file in &inspection.files {
        let _ = writeln!(
            text,
            "{}: {}, {} records",
            file.name,
            size(file.bytes),
            file.records
        );
    }
    section(&mut text, "processes", &processes(&inspection.processes));
    section(&mut text, "records", &records(inspection));
    for space in &inspection.spaces {
        let written = space
            .written_bytes
            .map(|bytes| format!(", {} not zero", size(bytes)));
        let program = space.program.as_ref();
        let program = program.map(|path| format!(" ({})", path.display()));
        let title = format!(
            "memory of pid {}{}: {} populated{}",
            space.pid,
            program.unwrap_or_default(),
            size(space.populated_bytes),
            written.unwrap_or_default(),
        );
        let rows: Vec<_> = space
            .vmas
            .iter()
            .map(|vma| {
                [
                    format!("{:012x}-{:012x}", vma.start, vma.end),
                    vma.rights.clone(),
                    size(vma.populated_bytes),
                    vma.name.clone(),
                ]
            })
            .collect();
        section(&mut text, &title, &columns(&rows));
    }
    let shared: Vec<_> = inspection
        .shared
        .iter()
        .map(|(name, bytes)| [size(*bytes), name.clone()])
        .collect();
    section(&mut text, "shared memory", &columns(&shared));
    let descriptors: Vec<_> = inspection
        .descriptors
        .iter()
        .map(|open| {
            [
                format!("pid {}", open.pid),
                format!("fd {}", open.fd),
                open.kind.clone(),
                open.what.clone(),
            ]
        })
        .collect();
    section(&mut text, "descriptors", &columns(&descriptors));
    section(&mut text, "files", &files(inspection));
    let problems: Vec<_> = inspection.problems.iter().map(|it| [it.clone()]).collect();
    section(&mut text, "damaged", &columns(&problems));
    text
}

fn section(text: &mut String, title: &str, lines: &str) {
    if lines.is_empty() {
        return;
    }
    let _ = writeln!(text, "\n{title}");
    for line in lines.lines() {
        let _ = writeln!(text, "  {line}");
    }
}

/// The tree, children below their parents.
fn processes(all: &[ProcessView]) -> String {
    let mut children: BTreeMap<i32, Vec<&ProcessView>> = BTreeMap::new();
    let mut roots = Vec::new();
    for process in all {
        match all.iter().any(|other| other.pid == process.parent) && process.parent != process.pid {
            true => children.entry(process.parent).or_default().push(process),
            false => roots.push(process),
        }
    }
    let mut text = String::new();
    let mut pending: Vec<_> = roots.into_iter().rev().map(|root| (root, 0)).collect();
    loop {
        // Parents in a circle are damage; what is left of it comes last.
        let Some((process, depth)) = pending.pop().or_else(|| {
            let (_, left) = children.pop_first()?;
            pending.extend(left.into_iter().map(|process| (process, 0)));
            pending.pop()
        }) else {
            return text;
        };
        let inner = match process.inner_pid == process.pid {
            true => String::new(),
            false => format!(", {} inside", process.inner_pid),
        };
        let what = match (process.zombie, process.threads) {
            (true, _) => "had ended".to_owned(),
            (false, 1) => "1 thread".to_owned(),
            (false, threads) => format!("{threads} threads"),
        };
        let _ = writeln!(
            text,
            "{:depth$}pid {}{inner}: {} ({what})",
            "", process.pid, process.name,
        );
        // Each is taken once, whatever a damaged image says.
        let below = children.remove(&process.pid).unwrap_or_default();
        pending.extend(below.into_iter().rev().map(|child| (child, depth + 2)));
    }
}

fn records(inspection: &Inspection) -> String {
    let rows: Vec<_> = inspection
        .kinds
        .iter()
        .map(|kind| {
            [
                kind.kind.clone(),
                kind.records.to_string(),
                size(kind.payload_bytes),
                kind.file.clone(),
            ]
        })
        .collect();
    columns(&rows)
}

fn files(inspection: &Inspection) -> String {
    let mut text = String::new();
    if let Some(info) = &inspection.checkpoint {
        // Of a checkpoint in RAM their number is told by `checkpoint`.
        for mount_point in &info.files {
            let place = mount_point.display();
            let mut areas = inspection.areas.iter();
            let _ = match areas.find(|area| area.mount_point == *mount_point) {
                Some(area) => writeln!(
                    text,
                    "included: {place}, {} files and directories, {} contents",
                    area.files, area.contents
                ),
                None => writeln!(text, "included: {place}"),
            };
        }
        for (mount_point, why) in &info.left_out {
            let _ = writeln!(text, "not included: {}: {why}", mount_point.display());
        }
    }
    for file in &inspection.nameless {
        let path = file.path.display();
        let _ = writeln!(text, "without a name: {path}, {}", size(file.size));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, parent: i32) -> ProcessView {
        ProcessView {
            pid,
            inner_pid: pid - 10,
            parent,
            name: format!("p{pid}"),
            threads: 1,
            zombie: false,
        }
    }

    #[test]
    fn children_are_below_their_parents() {
        let all = [
            process(11, 3),
            process(13, 12),
            process(12, 11),
            process(14, 11),
        ];
        assert_eq!(
            processes(&all),
            "pid 11, 1 inside: p11 (1 thread)\n  pid 12, 2 inside: p12 (1 thread)\n    \
             pid 13, 3 inside: p13 (1 thread)\n  pid 14, 4 inside: p14 (1 thread)\n"
        );
    }

    #[test]
    fn a_circle_of_parents_ends() {
        let shown = processes(&[process(11, 12), process(12, 11)]);
        assert_eq!(shown.lines().count(), 2, "{shown}");
    }
}
