//! Which process tree an engine verb is about, and the report it ends with.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;

use super::output::{self, print};
use super::{Global, LostError, Status};
use crate::container;
use crate::keeper::protocol::{Failure, Request, Response};
use crate::keeper::{self, Client, Errand, Identity};
use crate::outcome::{Files, Outcome, Refusal, Report};

/// The container or process tree.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Target {
    /// Container that `snapback run` or `create` made
    #[arg(value_name = "ID")]
    id: Option<String>,
    /// Root of any process tree, whoever started it
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
}

impl Target {
    /// That of a verb whose arguments mean something else, too.
    pub(crate) fn of(id: Option<String>, pid: Option<i32>) -> Self {
        Self { id, pid }
    }

    /// Finds the processes, which must be running, and what their keeper needs to know.
    pub(crate) fn running(&self, global: &Global) -> anyhow::Result<Errand> {
        self.errand(global, Must::Run)
    }

    /// The same of a process tree of which there may be checkpoints, which may have ended.
    pub(crate) fn kept(&self, global: &Global) -> anyhow::Result<Errand> {
        self.errand(global, Must::BeKept)
    }

    /// A container by its ID.
    pub(super) fn container(id: &str) -> Self {
        Self {
            id: Some(id.to_owned()),
            pid: None,
        }
    }

    /// The same for what can also be done while the container is paused.
    pub(crate) fn known(&self, global: &Global) -> anyhow::Result<Errand> {
        self.errand(global, Must::BeKnown)
    }

    /// Whether it is a container that has ended.
    pub(crate) fn has_ended(&self, global: &Global) -> bool {
        let located = self
            .id
            .as_ref()
            .map(|id| container::locate(&global.root, id));
        located.is_some_and(|located| {
            located.is_ok_and(|located| located.status == container::Status::Stopped)
        })
    }

    fn errand(&self, global: &Global, must: Must) -> anyhow::Result<Errand> {
        if !nix::unistd::geteuid().is_root() {
            bail!("only root may take checkpoints and roll back: run it with sudo");
        }
        let (pid, cgroup, label, outlives) = match (&self.id, self.pid) {
            (Some(id), _) => {
                container::again::settle(&global.root, id)?;
                let located = container::locate(&global.root, id)?;
                if located.status == container::Status::Stopped
                    && !matches!(must, Must::Run)
                    && let Some(errand) = Self::of_located(&global.root, &located)?
                    && errand.directory().is_there()
                {
                    return Ok(errand);
                }
                let init = match must {
                    Must::BeKnown => located.init,
                    Must::Run | Must::BeKept => Some(located.running()?),
                };
                let init = init.with_context(|| format!("container {id} has stopped"))?;
                let outlives = !located.is_deleted_at_end();
                (init.as_raw(), located.cgroup, id.clone(), outlives)
            }
            (None, Some(pid)) => (pid, None, format!("pid {pid}"), false),
            (None, None) => bail!("neither a container nor a PID"),
        };
        let root = absolute(&global.root)?;
        let target = match must {
            Must::Run => Identity::look_up(pid).with_context(|| {
                let is_kept = Identity::kept(&root, pid).is_ok();
                let hint = "of which there are checkpoints; `snapback rollback` brings it back";
                format!(
                    "pid {pid}{}",
                    if is_kept {
                        format!(", {hint}")
                    } else {
                        String::new()
                    }
                )
            })?,
            Must::BeKept | Must::BeKnown => Identity::kept(&root, pid)?,
        };
        Ok(Errand {
            root,
            target,
            cgroup,
            label,
            outlives,
        })
    }

    /// A container that runs or has ended: what its keeper knows it by. `None`: it never had an init.
    pub(super) fn of_located(
        root: &Path,
        located: &container::Located,
    ) -> anyhow::Result<Option<Errand>> {
        let Some((pid, start_time)) = located.last_init else {
            return Ok(None);
        };
        Ok(Some(Errand {
            root: absolute(root)?,
            target: Identity {
                pid: pid.as_raw(),
                start_time,
            },
            cgroup: located.cgroup.clone(),
            label: located.id.clone(),
            outlives: !located.is_deleted_at_end(),
        }))
    }
}

/// In which state a container or process tree has to be.
#[derive(Debug, Clone, Copy)]
enum Must {
    /// Running.
    Run,
    /// A container running; of a tree that has ended a keeper must have checkpoints.
    BeKept,
    /// As before, but a container may be paused.
    BeKnown,
}

/// Asks the tree's keeper. If there is none, the reason may be that the process is not one to keep.
pub(crate) fn ask(errand: &Errand, request: &Request) -> Result<Response, keeper::Error> {
    let answer = Client::ask(&errand.directory(), request);
    if let Err(keeper::Error::NoKeeper { .. }) = answer {
        Identity::of(errand.target.pid)?;
    }
    answer
}

/// A path whatever our working directory: the keeper has another.
pub(crate) fn absolute(root: &Path) -> anyhow::Result<std::path::PathBuf> {
    std::path::absolute(root).with_context(|| format!("cannot tell where {} is", root.display()))
}

/// Takes a name of a checkpoint from the command line.
pub(crate) fn checkpoint_name(text: &str) -> Result<String, String> {
    const LIMIT: usize = 128;
    if text.is_empty() || text.len() > LIMIT {
        Err(format!("a name has 1 to {LIMIT} bytes"))
    } else if text.chars().any(char::is_control) {
        Err("a name has no control characters".to_owned())
    } else {
        Ok(text.to_owned())
    }
}

/// The error that a keeper's failure is, with the exit status that belongs to it.
pub(crate) fn failed(failure: Failure) -> anyhow::Error {
    match failure {
        Failure::Refused { refusal } => refusal.into(),
        Failure::Lost { message } => LostError(message).into(),
        Failure::Error { message } => anyhow::anyhow!(message),
    }
}

/// The report in a keeper's answer.
pub(crate) fn report(response: Response) -> anyhow::Result<Report> {
    match response {
        Response::Done { report } => Ok(report),
        Response::Failure(failure) => Err(failed(failure)),
        other => Err(keeper::Error::Protocol(format!("{other:?}")).into()),
    }
}

/// The object that `--json` prints, the same fields however the verb ended.
#[derive(Debug, Default, Serialize)]
struct Printed {
    outcome: &'static str,
    stop_us: u64,
    total_us: u64,
    phases: BTreeMap<String, u64>,
    processes: usize,
    threads: usize,
    dirty_pages: u64,
    copied_bytes: u64,
    header_bytes: u64,
    killed: usize,
    revived: usize,
    reset_connections: usize,
    files: Files,
    refused: Option<Refusal>,
    error: Option<String>,
}

impl Printed {
    fn done(report: Report) -> Printed {
        Printed {
            outcome: match report.outcome {
                Outcome::Checkpointed => "checkpointed",
                Outcome::RolledBack => "rolled_back",
                Outcome::Restored => "restored",
                Outcome::Refused => "refused",
                Outcome::Lost => "lost",
            },
            stop_us: report.stop_us,
            total_us: report.total_us,
            phases: report.phases,
            processes: report.processes,
            threads: report.threads,
            dirty_pages: report.dirty_pages,
            copied_bytes: report.copied_bytes,
            header_bytes: report.header_bytes,
            killed: report.killed,
            revived: report.revived,
            reset_connections: report.reset_connections,
            files: report.files,
            refused: report.refused,
            error: None,
        }
    }

    fn failed(error: &anyhow::Error, took: Duration) -> Printed {
        Printed {
            outcome: match Status::of(error) {
                Status::Refused => "refused",
                Status::Lost => "lost",
                _ => "error",
            },
            total_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            refused: error
                .chain()
                .find_map(|cause| cause.downcast_ref::<Refusal>())
                .cloned(),
            error: Some(format!("{error:#}")),
            ..Printed::default()
        }
    }
}

/// Prints how `checkpoint` or `rollback` ended.
pub(crate) fn finish(
    json: bool,
    name: &str,
    began: Instant,
    ended: anyhow::Result<Report>,
) -> anyhow::Result<Status> {
    match ended {
        Ok(report) if json => output::json(&Printed::done(report))?,
        Ok(report) => print(&sentence(name, &report))?,
        Err(error) if json => {
            output::json(&Printed::failed(&error, began.elapsed()))?;
            return Ok(Status::of(&error));
        }
        Err(error) if error.is::<Refusal>() => {
            return Err(error.context("refused, nothing was touched"));
        }
        Err(error) => return Err(error),
    }
    Ok(Status::Done)
}

/// The report for people, as `rolled back "default": 3 processes, 12 threads, 1,024 pages in 0.81 ms (stop 0.74 ms)`.
fn sentence(name: &str, report: &Report) -> String {
    let what = match report.outcome {
        Outcome::RolledBack => "rolled back",
        Outcome::Restored => "restored",
        _ => "checkpoint",
    };
    let mut text = format!(
        "{what} {name:?}: {}, {}, {} in {} (stop {})",
        count(report.processes as u64, "process", "processes"),
        count(report.threads as u64, "thread", "threads"),
        count(report.dirty_pages, "page", "pages"),
        milliseconds(report.total_us),
        milliseconds(report.stop_us),
    );
    if report.killed > 0 {
        text += &format!("\n  killed, born since the checkpoint: {}", report.killed);
    }
    if report.revived > 0 {
        text += &format!(
            "\n  brought back, processes and threads: {}",
            report.revived
        );
    }
    if report.reset_connections > 0 {
        text += &format!("\n  connections reset: {}", report.reset_connections);
    }
    let files = &report.files;
    if !files.included.is_empty() {
        text += &format!(
            "\n  files in {}: {}, {}",
            files.included.join(", "),
            match report.outcome {
                Outcome::RolledBack => count(files.files, "change undone", "changes undone"),
                _ => count(files.files, "file", "files"),
            },
            size(files.bytes),
        );
    }
    for mount in &files.left_out {
        text += &format!(
            "\n  files in {} are not included: {}",
            mount.mount_point, mount.why
        );
    }
    text.push('\n');
    text
}

fn count(number: u64, one: &str, many: &str) -> String {
    format!(
        "{} {}",
        thousands(number),
        if number == 1 { one } else { many }
    )
}

/// A number with a comma before each three digits.
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn milliseconds(microseconds: u64) -> String {
    format!("{:.2} ms", microseconds as f64 / 1000.0)
}

/// A size with a binary unit, as `1.5 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    let mut scaled = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if scaled < 1024.0 {
            return if unit == "B" {
                format!("{bytes} B")
            } else {
                format!("{scaled:.1} {unit}")
            };
        }
        scaled /= 1024.0;
    }
    format!("{scaled:.1} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rolled_back() -> Report {
        Report {
            outcome: Outcome::RolledBack,
            stop_us: 740,
            total_us: 810,
            phases: BTreeMap::new(),
            processes: 3,
            threads: 1,
            dirty_pages: 1024,
            copied_bytes: 4 << 20,
            header_bytes: 9000,
            killed: 2,
            revived: 1,
            reset_connections: 0,
            files: Files::default(),
            refused: None,
        }
    }

    #[test]
    fn sentence_for_people() {
        assert_eq!(
            sentence("default", &rolled_back()),
            "rolled back \"default\": 3 processes, 1 thread, 1,024 pages in 0.81 ms (stop 0.74 ms)\n  \
             killed, born since the checkpoint: 2\n  brought back, processes and threads: 1\n"
        );
    }

    #[test]
    fn every_outcome_prints_the_same_fields() {
        let refusal = Refusal {
            object: "o".into(),
            holder: "h".into(),
            remedy: "r".into(),
        };
        let refused = Printed::failed(&anyhow::Error::from(refusal).context("x"), Duration::ZERO);
        let lost = Printed::failed(&LostError("x".into()).into(), Duration::ZERO);
        let error = Printed::failed(&anyhow::anyhow!("x"), Duration::from_micros(7));
        let fields = |printed: &Printed| -> Vec<String> {
            let value = serde_json::to_value(printed).unwrap();
            value.as_object().unwrap().keys().cloned().collect()
        };
        let done = Printed::done(rolled_back());
        for (printed, outcome) in [
            (&done, "rolled_back"),
            (&refused, "refused"),
            (&lost, "lost"),
            (&error, "error"),
        ] {
            assert_eq!(fields(printed), fields(&done));
            assert_eq!(printed.outcome, outcome);
        }
        assert_eq!(refused.refused.unwrap().object, "o");
        assert_eq!((error.total_us, error.error.as_deref()), (7, Some("x")));
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(1_234_567), "1,234,567");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(100 << 20), "100.0 MiB");
    }

    #[test]
    fn names_of_checkpoints() {
        assert!(checkpoint_name("before upgrade 3.1/ä").is_ok());
        assert!(checkpoint_name("").is_err());
        assert!(checkpoint_name("a\nb").is_err());
        assert!(checkpoint_name(&"x".repeat(129)).is_err());
    }
}
