//! `snapback check`

use std::fmt::Write;

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::Status;
use super::output::{self, print};
use crate::kernel::probe::{Feature, probe};

/// Show what this kernel offers of what snapback needs, and what is missing
#[derive(Debug, Args)]
#[command(after_help = "Exit status: 0 if all that is mandatory is there, else 1.")]
pub(crate) struct Check {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Printed {
    ok: bool,
    features: Vec<Feature>,
}

pub(crate) fn run(args: Check) -> anyhow::Result<Status> {
    let features = probe().context("cannot make a process to try the kernel on")?;
    let ok = features
        .iter()
        .all(|feature| feature.present || !feature.mandatory);
    if args.json {
        output::json(&Printed { ok, features })?;
    } else {
        print(&table(&features, ok))?;
    }
    Ok(if ok { Status::Done } else { Status::Error })
}

fn table(features: &[Feature], ok: bool) -> String {
    let width = features
        .iter()
        .map(|feature| feature.name.len())
        .max()
        .unwrap_or(0);
    let mut text = String::new();
    for Feature {
        name,
        mandatory,
        present,
        detail,
        consequence,
    } in features
    {
        let found = match (present, mandatory) {
            (true, _) => "present",
            (false, true) => "MISSING",
            (false, false) => "missing",
        };
        // Writing to a String can't fail.
        let _ = write!(text, "{found}  {name:width$}");
        let _ = match (present, detail.is_empty()) {
            (true, true) => writeln!(text),
            (true, false) => writeln!(text, "  {detail}"),
            (false, _) => writeln!(text, "  {consequence} ({detail})"),
        };
    }
    text += match ok {
        true => "\nAll that is mandatory is there.\n",
        false => "\nWhat is MISSING is mandatory: checkpoints are not possible here.\n",
    };
    text.lines()
        .map(str::trim_end)
        .fold(String::new(), |all, line| all + line + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_for_people() {
        let feature = |name, present, detail: &str| Feature {
            name,
            mandatory: true,
            present,
            detail: detail.to_owned(),
            consequence: "nothing works",
        };
        let features = [
            feature("kcmp", true, ""),
            feature("userfaultfd", false, "ENOSYS"),
        ];
        assert_eq!(
            table(&features, false),
            "present  kcmp\n\
             MISSING  userfaultfd  nothing works (ENOSYS)\n\n\
             What is MISSING is mandatory: checkpoints are not possible here.\n"
        );
    }
}
