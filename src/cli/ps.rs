//! `ps`: the processes of a container.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, bail};
use nix::unistd::Pid;

use super::{Global, Status, UsageError, output};
use crate::container::{lifecycle, locate};

pub(super) fn run(global: &Global, args: &liboci_cli::Ps) -> anyhow::Result<Status> {
    let located = locate(&global.root, &args.container_id)?;
    let processes = lifecycle::processes(&located)?;
    match args.format.as_str() {
        "json" => output::json(&processes.iter().map(|pid| pid.as_raw()).collect::<Vec<_>>())?,
        "table" => output::print(&table(&processes, &args.ps_options)?)?,
        other => return Err(UsageError(format!("--format {other:?}: table or json")).into()),
    }
    Ok(Status::Done)
}

/// The lines of ps(1) that are about these processes, as runc does it; `-ef` unless other options are given.
fn table(processes: &BTreeSet<Pid>, options: &[String]) -> anyhow::Result<String> {
    let mut command = Command::new("ps");
    if options.is_empty() {
        command.arg("-ef");
    } else {
        command.args(options);
    }
    let ran = command
        .output()
        .context("running ps (install procps, or use --format json)")?;
    if !ran.status.success() {
        bail!("ps: {}", String::from_utf8_lossy(&ran.stderr).trim_end());
    }
    let text = String::from_utf8_lossy(&ran.stdout);
    select(&text, processes).context("ps: no column PID in its output")
}

fn select(text: &str, processes: &BTreeSet<Pid>) -> Option<String> {
    let heading = text.lines().next()?;
    let column = heading.split_whitespace().position(|name| name == "PID")?;
    let is_ours = |line: &&str| {
        let pid = line
            .split_whitespace()
            .nth(column)
            .and_then(|pid| pid.parse().ok());
        pid.is_some_and(|pid| processes.contains(&Pid::from_raw(pid)))
    };
    let lines = std::iter::once(heading).chain(text.lines().skip(1).filter(is_ours));
    Some(lines.map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_containers_lines_are_kept() {
        let text = "UID  PID PPID CMD\nroot   1    0 init 7\nroot   7    1 sh\n";
        let processes = BTreeSet::from([Pid::from_raw(7)]);
        assert_eq!(
            select(text, &processes).unwrap(),
            "UID  PID PPID CMD\nroot   7    1 sh\n"
        );
        assert_eq!(select("UID CMD\n", &processes), None);
    }
}
