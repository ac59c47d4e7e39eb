//! `snapback diff`

use clap::Args;
use serde::Serialize;

use super::output::{self, print};
use super::target::{Target, ask, checkpoint_name, failed, size};
use super::{Global, Status};
use crate::keeper::Error;
use crate::keeper::protocol::{Change, Request, Response};

/// List what has changed in files since a checkpoint
///
/// These are the changes that a rollback would undo. The container is stopped while they are looked for.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  snapback diff web
  snapback diff --name clean --json --pid 4711

Each line is A (added), C (changed) or D (deleted), the path as the container sees it, and the size of a file, before and
after. A directory is changed if a name in it is. Control characters, backslashes and bytes that are no UTF-8 are shown
as \\xNN.")]
pub(crate) struct Diff {
    /// Name of the checkpoint
    #[arg(long, default_value = "default", value_parser = checkpoint_name)]
    name: String,
    /// Print one JSON object: `changes`, a list of `kind`, `path`, `before`, `after`
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Serialize)]
struct Printed {
    changes: Vec<Change>,
}

pub(crate) fn run(global: &Global, args: Diff) -> anyhow::Result<Status> {
    let errand = args.target.running(global)?;
    let changes = match ask(&errand, &Request::Diff { name: args.name })? {
        Response::Changes { changes } => changes,
        Response::Failure(failure) => return Err(failed(failure)),
        other => return Err(Error::Protocol(format!("{other:?}")).into()),
    };
    match args.json {
        true => output::json(&Printed { changes })?,
        false => print(&changes.iter().map(line).collect::<String>())?,
    }
    Ok(Status::Done)
}

fn line(change: &Change) -> String {
    let sizes = match (change.before, change.after) {
        (Some(before), Some(after)) if before != after => {
            format!("  {} -> {}", size(before), size(after))
        }
        (_, Some(bytes)) | (Some(bytes), None) => format!("  {}", size(bytes)),
        (None, None) => String::new(),
    };
    format!("{} {}{sizes}\n", change.kind, change.path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filesystem::ChangeKind;

    #[test]
    fn a_line_has_the_sizes_that_there_are() {
        let shown = |kind, before, after| {
            line(&Change {
                kind,
                path: "/a".into(),
                before,
                after,
            })
        };
        assert_eq!(shown(ChangeKind::Added, None, Some(7)), "A /a  7 B\n");
        assert_eq!(
            shown(ChangeKind::Changed, Some(7), Some(2048)),
            "C /a  7 B -> 2.0 KiB\n"
        );
        assert_eq!(shown(ChangeKind::Changed, Some(7), Some(7)), "C /a  7 B\n");
        assert_eq!(shown(ChangeKind::Deleted, None, None), "D /a\n");
    }
}
