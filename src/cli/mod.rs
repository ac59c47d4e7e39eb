//! The command line, one file per verb.
//!
//! A verb is a file `src/cli/VERB.rs` with a `clap::Args` struct named after the verb and a function
//! `run(&Global, Args) -> anyhow::Result<Status>`; it is plugged in by three lines here: the `mod`, the variant of
//! `Command` and the arm of `dispatch`. What a verb prints goes through `output`, never `println!`: a caller
//! may have closed our standard output, and `println!` panics then.
//!
//! A verb that failed returns an error, whose exit status follows from what is in its chain (see `Status::of`):
//! [`Refusal`] is 3, `LostError` is 4, `UsageError` is 2, anything else 1. A verb that already reported its
//! outcome, as with `--json`, returns the `Status` itself.
//!
//! Nothing is set up before the verb runs: no threads (libcontainer clones with raw `clone3`), and no log unless
//! one is asked for.

mod again;
mod check;
mod checkpoint;
mod checkpoints;
mod create;
mod delete;
mod diff;
mod exec;
mod fault_points;
mod features;
mod foreground;
mod fork;
mod inspect;
mod keeper;
mod kill;
mod list;
mod log;
mod output;
mod pause;
mod persist;
mod ps;
mod release;
mod restore;
mod resume;
mod rollback;
mod run;
mod spec;
mod start;
mod state;
mod target;
mod terminal;
mod to_disk;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::outcome::Refusal;

/// What `--version` prints after the name: callers such as containerd look for the line with `spec:`.
const VERSION: &str = concat!("version ", env!("CARGO_PKG_VERSION"), "\nspec: 1.2.0");

/// In-memory checkpoint and in-place rollback of running containers, and the OCI runtime to run them.
#[derive(Debug, Parser)]
#[command(name = "snapback", version = VERSION, disable_version_flag = true, max_term_width = 120)]
struct Cli {
    #[command(flatten)]
    global: Global,
    /// Print the version
    #[arg(short = 'v', long, action = clap::ArgAction::Version)]
    version: (),
    #[command(subcommand)]
    command: Command,
}

/// The options in front of the verb.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Directory of the containers' states
    #[arg(long, value_name = "DIR", default_value = "/run/snapback")]
    pub(crate) root: PathBuf,
    /// Write log lines to this file instead of standard error
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// Format of the log
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "text")]
    pub(crate) log_format: log::Format,
    /// Log what is done, not only what fails
    #[arg(long)]
    pub(crate) debug: bool,
    /// Refused: cgroups are made through the file system only
    #[arg(long)]
    pub(crate) systemd_cgroup: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
enum Command {
    /// Create a container; its program waits for start
    Create(create::Create),
    /// Let the program of a created container run
    Start(liboci_cli::Start),
    /// Create and start a container
    Run(run::Run),
    /// Run another program in a running container
    Exec(liboci_cli::Exec),
    /// Print the state of a container as JSON
    State(liboci_cli::State),
    /// List the containers
    List(liboci_cli::List),
    /// List the processes of a container
    Ps(liboci_cli::Ps),
    /// Freeze the processes of a container
    Pause(liboci_cli::Pause),
    /// Let a paused container run on
    Resume(liboci_cli::Resume),
    /// Send a signal to a container
    Kill(kill::Kill),
    /// Delete a container
    Delete(liboci_cli::Delete),
    /// Write a default config.json
    Spec(spec::Spec),
    /// Print what this runtime offers as JSON
    Features(liboci_cli::Features),
    Checkpoint(checkpoint::Checkpoint),
    Rollback(rollback::Rollback),
    Checkpoints(checkpoints::Checkpoints),
    Persist(persist::Persist),
    Restore(restore::Restore),
    Fork(fork::Fork),
    Release(release::Release),
    Diff(diff::Diff),
    Inspect(inspect::Inspect),
    Check(check::Check),
    /// Hold the checkpoints of a process tree; started by `checkpoint`
    #[command(hide = true)]
    Keeper(keeper::Keeper),
    /// Print the names that the environment variable SNAPBACK_FAULT takes
    #[command(hide = true)]
    FaultPoints,
}

fn dispatch(global: &Global, command: Command) -> anyhow::Result<Status> {
    match command {
        Command::Create(args) => create::run(global, &args),
        Command::Start(args) => start::run(global, &args),
        Command::Run(args) => run::run(global, &args),
        Command::Exec(args) => exec::run(global, &args),
        Command::State(args) => state::run(global, &args),
        Command::List(args) => list::run(global, &args),
        Command::Ps(args) => ps::run(global, &args),
        Command::Pause(args) => pause::run(global, &args),
        Command::Resume(args) => resume::run(global, &args),
        Command::Kill(args) => kill::run(global, &args),
        Command::Delete(args) => delete::run(global, &args),
        Command::Spec(args) => spec::run(&args),
        Command::Features(_) => features::run(),
        Command::Checkpoint(args) => checkpoint::run(global, args),
        Command::Rollback(args) => rollback::run(global, args),
        Command::Checkpoints(args) => checkpoints::run(global, args),
        Command::Persist(args) => persist::run(global, args),
        Command::Restore(args) => restore::run(global, args),
        Command::Fork(args) => fork::run(global, args),
        Command::Release(args) => release::run(global, args),
        Command::Diff(args) => diff::run(global, args),
        Command::Keeper(args) => keeper::run(global, args),
        Command::Inspect(args) => inspect::run(global, &args),
        Command::Check(args) => check::run(args),
        Command::FaultPoints => fault_points::run(),
    }
}

/// How the command ends: its exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// 0: done.
    Done,
    /// 1: an error.
    Error,
    /// 2: the command line makes no sense.
    Usage,
    /// 3: refused, nothing was touched.
    Refused,
    /// 4: a rollback failed after changes began; the container was killed.
    Lost,
    /// The exit status of a program run in the foreground (128 + the signal that ended it).
    Program(u8),
}

impl Status {
    /// The exit status of a failed verb, by what the chain of its error holds.
    fn of(error: &anyhow::Error) -> Status {
        error
            .chain()
            .find_map(|cause| {
                if cause.is::<Refusal>() {
                    Some(Status::Refused)
                } else if cause.is::<LostError>() {
                    Some(Status::Lost)
                } else if cause.is::<UsageError>() {
                    Some(Status::Usage)
                } else {
                    None
                }
            })
            .unwrap_or(Status::Error)
    }

    fn code(self) -> u8 {
        match self {
            Status::Done => 0,
            Status::Error => 1,
            Status::Usage => 2,
            Status::Refused => 3,
            Status::Lost => 4,
            Status::Program(code) => code,
        }
    }
}

/// The options contradict one another or miss something: exit status 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

/// A rollback failed after changes began and the container was killed: exit status 4.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct LostError(pub(crate) String);

/// Runs the command line `args` (with the program's name in front) and returns the exit status: 0 done, 1 error,
/// 2 usage, 3 refused with nothing touched, 4 lost; `run` and `exec` in the foreground return the program's own.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // A failure to print help or usage to a closed stream leaves nothing to tell and nobody to tell it to.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let ended = log::start(&cli.global).and_then(|()| dispatch(&cli.global, cli.command));
    let status = ended.unwrap_or_else(|error| {
        output::error(&cli.global, &error);
        Status::of(&error)
    });
    ExitCode::from(status.code())
}

#[cfg(test)]
mod tests {
    use anyhow::Context;
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn status_follows_the_cause_through_contexts() {
        let refusal = Refusal {
            object: "fd 7: io_uring ring".into(),
            holder: "pid 12 (redis-server)".into(),
            remedy: "close it".into(),
        };
        let refused = Err::<(), _>(refusal).context("checkpoint").unwrap_err();
        assert_eq!(Status::of(&refused), Status::Refused);
        let lost = anyhow::Error::from(LostError("killed".into())).context("rollback");
        assert_eq!(Status::of(&lost), Status::Lost);
        assert_eq!(Status::of(&UsageError("no".into()).into()), Status::Usage);
        assert_eq!(Status::of(&anyhow::anyhow!("plain")), Status::Error);
    }
}
