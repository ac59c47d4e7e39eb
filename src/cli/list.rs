//! `list`: the containers below the root directory.

use super::{Global, Status, UsageError, output};
use crate::container::list;
use crate::container::view::View;

pub(super) fn run(global: &Global, args: &liboci_cli::List) -> anyhow::Result<Status> {
    let mut status = Status::Done;
    let mut views = Vec::new();
    for found in list(&global.root)? {
        match found {
            Ok(located) => views.push(View::from(located)),
            Err(error) => {
                output::error(global, &error.into());
                status = Status::Error;
            }
        }
    }
    match args.format.as_str() {
        _ if args.quiet => {
            let ids: String = views.iter().map(|view| format!("{}\n", view.id)).collect();
            output::print(&ids)?;
        }
        "table" => output::print(&table(&views))?,
        "json" => output::json(&views)?,
        other => return Err(UsageError(format!("--format {other:?}: table or json")).into()),
    }
    Ok(status)
}

fn table(views: &[View]) -> String {
    let heading = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(String::from);
    let rows = views.iter().map(|view| {
        [
            view.id.clone(),
            view.pid.to_string(),
            view.status.to_string(),
            view.bundle.display().to_string(),
            view.created.clone(),
            view.owner.clone(),
        ]
    });
    let rows: Vec<_> = std::iter::once(heading).chain(rows).collect();
    output::columns(&rows)
}
